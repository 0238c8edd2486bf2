"""Raise the learning rates again after a switch, beside whatever scheduler sets them."""

from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Ramp:
    """Multiplies all learning rates by 1/n, 2/n ... 1 in the next n = ``updates`` steps.

    The groups hold their own rates outside of ``optimizer.step``, as the scheduler set them.
    ``done`` of the steps are made. After the last one its hooks do nothing: a hook that removes
    itself would break the loop in which torch calls those of others.
    """

    def __init__(self, optimizer: Optimizer, updates: int, done: int = 0) -> None:
        self.updates = updates
        self.done = done
        self._rates: list[Any] = []
        self._hooks: list[RemovableHandle] = []
        if done < updates:
            self._hooks = [
                optimizer.register_step_pre_hook(self._lower),
                optimizer.register_step_post_hook(self._put_back),
            ]

    def _lower(self, optimizer: Optimizer, *_: Any) -> None:
        if self.done == self.updates:
            return
        share = (self.done + 1) / self.updates
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * share

    def _put_back(self, optimizer: Optimizer, *_: Any) -> None:
        if self.done == self.updates:
            return
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.done += 1

    def stop(self) -> None:
        """Leave the rates to the scheduler from now on."""
        for hook in self._hooks:
            hook.remove()
