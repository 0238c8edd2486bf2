"""Tell schedulers of new parameter groups, so that they go on.

A scheduler keeps a value per group. Each new group gets the value of the group that it is like,
multiplied by its scale where the value is a learning rate. It may take the place of an older one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.scheduler.scheduler import Scheduler as TimmScheduler
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau, SequentialLR

from switchlora.loop.groups import FactorGroup

Tell = Callable[[], None]
"""changes a scheduler; cannot fail"""
SCALED = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
"""lists of schedulers with a learning rate for each group"""
COPIED = ("lr_lambdas", "base_momentums", "max_momentums", "base_values", "warmup_steps")
"""lists of schedulers with something else for each group; timm's multiply by ``LR_SCALE``"""


def prepared(scheduler: Any, groups: int, new: Sequence[FactorGroup]) -> list[Tell]:
    """Return what tells ``scheduler``, which knows ``groups``, of the ``new`` ones.

    A function is called with the new groups, to tell a scheduler of another kind. ValueError for a
    scheduler that is neither torch's nor timm's, or that does not know all groups.
    """
    if callable(scheduler):
        return [partial(scheduler, new)] if new else []
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
    if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau, TimmScheduler)):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} is neither torch's nor timm's: give a function "
            "of the new groups in its place, that tells it"
        )
    tells = []
    if isinstance(scheduler, (ChainedScheduler, SequentialLR)):
        for inner in scheduler._schedulers:
            tells += prepared(inner, groups, new)
    for name in (*SCALED, *COPIED):
        values = getattr(scheduler, name, None)
        if isinstance(values, list):
            if len(values) != groups:
                raise ValueError(
                    f"scheduler {type(scheduler).__name__} knows {len(values)} groups of an "
                    f"optimizer that has {groups}"
                )
            tells.append(_set(scheduler, name, values, new))
    return tells


def is_timms(scheduler: Any) -> bool:
    """Return whether a scheduler multiplies the rate of a group by the group's ``lr_scale``."""
    return isinstance(scheduler, TimmScheduler)


def _set(scheduler: Any, name: str, values: list, new: Sequence[FactorGroup]) -> Tell:
    found = list(values)
    for group in new:
        value = values[group.like]
        scaled = value * group.scale if name in SCALED else value
        found[group.place : group.place + 1] = [scaled]
    return lambda: setattr(scheduler, name, found)
