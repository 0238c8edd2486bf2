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
        self._lowered: list[tuple[dict[str, Any], Any, Any]] = []
        """groups with their own rates, and the lower ones that they have inside of a step"""
        self._hooks: list[RemovableHandle] = []
        if done < updates:
            self._hooks = [
                optimizer.register_step_pre_hook(self._lower),
                optimizer.register_step_post_hook(self._put_back),
            ]

    def _lower(self, optimizer: Optimizer, *_: Any) -> None:
        if self.done == self.updates:
            return
        self._restore()  # a step that raised an error left them low
        share = (self.done + 1) / self.updates
        for group in optimizer.param_groups:
            rate = group["lr"]
            group["lr"] = rate * share
            self._lowered.append((group, rate, group["lr"]))

    def _put_back(self, *_: Any) -> None:
        if self.done == self.updates:
            return
        self._restore()
        self.done += 1

    def _restore(self) -> None:
        """Give the groups their own rates, but for those that have got others since."""
        for group, rate, lowered in self._lowered:
            if group["lr"] is lowered:
                group["lr"] = rate
        self._lowered.clear()

    def stop(self) -> None:
        """Leave the rates to the scheduler from now on."""
        self._restore()
        for hook in self._hooks:
            hook.remove()
