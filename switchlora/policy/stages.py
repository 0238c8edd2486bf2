"""Switching in stages, layer by layer, and restarts of the adapter after the switch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from switchlora.adapters import Target
from switchlora.criteria import LOSS
from switchlora.errors import check_choice, check_range, check_share
from switchlora.initializers import AdapterInit
from switchlora.names import family


def by_target(target: Target) -> str:
    """Return the target's name: each is a group of its own."""
    return target.name


def by_family(target: Target) -> str:
    """Return the name that the target's module shares with those of other blocks."""
    return family(target.module)


def by_block(target: Target) -> str:
    """Return the name of the block that holds the target."""
    return target.module.removesuffix(family(target.module))


GROUPS = {"target": by_target, "family": by_family, "block": by_block}
"""by ``switch.stages.by``, the group of a target"""


@dataclass(frozen=True)
class Stages:
    """Switch in stages: converged targets switch first, the others train on in full.

    A target has converged when its own margin is 0 or more. A stage takes each group of targets
    whose members have all converged. ``by`` says what a group is:

    - 'target': one target. A row slice of a fused linear is a target.
    - 'family': the targets of the same name in all blocks.
    - 'block': the targets of one block.

    A stage takes at least ``least`` targets, or all that are left. It comes at least ``interval``
    updates after the stage before, since each stage rebuilds the learner. When the criterion
    fires, the last stage takes all targets that are left.

    A target whose margin reaches ``still``, in the criterion's unit, needs no adapter if nothing
    that trains is called before it. This front of the model is frozen outright, so the backward
    pass ends behind it. With None nothing is frozen outright.
    """

    by: str = "target"
    interval: int = 52
    least: int = 1
    still: float | None = None

    def __post_init__(self) -> None:
        check_choice("switch.stages.by", self.by, tuple(GROUPS))
        check_range("switch.stages.interval", self.interval, 0)
        check_range("switch.stages.least", self.least, 1)

    def ready(
        self, margins: Mapping[str, float], waiting: Mapping[str, Target], updates_since: int
    ) -> list[str]:
        """Return which of the ``waiting`` targets switch now, ``updates_since`` the last stage.

        The list is empty as long as a test of the loss holds the criterion back.
        """
        if updates_since < self.interval or margins.get(LOSS, 0.0) < 0:
            return []
        group_of = GROUPS[self.by]
        moving = set()
        for name, target in waiting.items():
            if not margins.get(name, -math.inf) >= 0:
                moving.add(group_of(target))
        found = [name for name, target in waiting.items() if group_of(target) not in moving]
        return found if len(found) >= min(self.least, len(waiting)) else []

    def front(self, margins: Mapping[str, float], moving: Sequence[str]) -> list[str]:
        """Return the first of the ``moving`` targets, up to the first one below ``still``.

        ``moving`` names the targets that train, in the order of their calls.
        """
        limit = self.still
        if limit is None:
            return []
        return list(takewhile(lambda name: margins.get(name, -math.inf) >= limit, moving))


@dataclass(frozen=True)
class Refresh:
    """Turn and cut the bases of layers that train a core, each ``every_epochs`` (OIALR).

    From arXiv 2401.08505, in the form of its public code. The bases become those of the core's
    singular vectors, and the core becomes diagonal. Singular values below ``cutoff`` times the
    largest are cut, but at most half of them. The n-th refresh takes the share n ``step`` of the
    layers, the last ones first. The learning rate rises again over ``rewarmup_updates``.
    """

    every_epochs: float = 1.0
    cutoff: float = 0.1
    step: float = 0.1
    rewarmup_updates: int | None = 0

    def __post_init__(self) -> None:
        if not self.every_epochs > 0:
            raise ValueError(
                f"switch.restart.every_epochs is {self.every_epochs}: give more than 0"
            )
        check_share("switch.restart.cutoff", self.cutoff)
        check_share("switch.restart.step", self.step)
        if self.rewarmup_updates is not None:
            check_range("switch.restart.rewarmup_updates", self.rewarmup_updates, 0)

    def last(self, names: Sequence[str], number: int) -> list[str]:
        """Return which of ``names`` the refresh of this ``number``, from 1 on, takes.

        >>> Refresh(step=0.3).last(["a", "b", "c", "d"], 1)
        ['c', 'd']
        """
        share = round(number * self.step, 9)  # 3 * 0.1 is a little more than 0.3
        count = math.ceil(round(share * len(names), 6))
        return list(names[-count:])


@dataclass(frozen=True)
class Restart:
    """Merge the adapter and start a new one, each ``every_epochs`` (ReLoRA, arXiv 2307.05695).

    ``init`` chooses the new factors (None: the policy's initializer). For update_svd, the recent
    update is the one since the last merge. ``prune`` says which moments of the factors are set to
    zero; all other moments survive:

    - 'random': a share ``pruned`` of the entries, at random.
    - 'magnitude': the share ``pruned`` of smallest magnitude.
    - 'zero': all of them.

    The learning rate rises again over ``rewarmup_updates`` after each restart: the jagged cosine.
    None: over as many as after the switch, ``adapter.rewarmup_updates``.
    """

    every_epochs: float = 2.0
    init: AdapterInit | None = None
    prune: str = "random"
    pruned: float = 0.999
    rewarmup_updates: int | None = None

    def __post_init__(self) -> None:
        if not self.every_epochs > 0:
            raise ValueError(
                f"switch.restart.every_epochs is {self.every_epochs}: give more than 0"
            )
        check_choice("switch.restart.prune", self.prune, ("random", "magnitude", "zero"))
        check_share("switch.restart.pruned", self.pruned)
        if self.rewarmup_updates is not None:
            check_range("switch.restart.rewarmup_updates", self.rewarmup_updates, 0)
