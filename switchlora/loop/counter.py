"""Count the updates that an optimizer makes, whoever calls it."""

from typing import Any

from torch.optim import Optimizer


class UpdateCounter:
    """Counts the updates of ``optimizer``.

    A GradScaler calls no ``step`` where gradients are not finite. A fused optimizer gets
    ``found_inf`` from it, and skips the update itself.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.idle = 0
        """calls of ``since_last`` without an update before them"""
        self._made = 0
        optimizer.register_step_post_hook(self._count)

    def since_last(self) -> int:
        """Return the number of updates since the last call."""
        made, self._made = self._made, 0
        self.idle = 0 if made else self.idle + 1
        return made

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf:
            self._made += 1
