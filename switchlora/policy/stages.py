"""What follows a switch: further stages, layer by layer, and restarts of the adapter."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from switchlora.adapters import Target
from switchlora.criteria import LOSS
from switchlora.errors import check_choice, check_range, check_share
from switchlora.initializers import AdapterInit
from switchlora.names import family


@dataclass(frozen=True)
class Stages:
    """Switch in stages: what has converged by its own margin goes first, the rest trains on.

    A stage takes each ``by`` 'target' (a row slice of a fused one is a target), 'family' or
    'block' group whose members have all converged, at least ``least`` targets at once and
    ``interval`` updates after the stage before, since each stage rebuilds the learner; when the
    criterion fires, the last stage takes all that are left. A target whose margin, in the
    criterion's unit, reaches ``still`` needs no adapter, if nothing that trains is called before
    it: this front of the model is frozen outright, and the backward pass ends behind it.
    """

    by: str = "target"
    interval: int = 0
    least: int = 1
    still: float | None = None

    def __post_init__(self) -> None:
        check_choice("switch.stages.by", self.by, ("target", "family", "block"))
        check_range("switch.stages.interval", self.interval, 0)
        check_range("switch.stages.least", self.least, 1)

    def ready(
        self, margins: Mapping[str, float], waiting: Mapping[str, Target], updates_since: int
    ) -> list[str]:
        """Of the targets that wait, those to switch ``updates_since`` the last stage.

        None as long as a test of the loss holds the criterion back.
        """
        if updates_since < self.interval or margins.get(LOSS, 0.0) < 0:
            return []
        moving = {self._group(t) for n, t in waiting.items() if not margins.get(n, -math.inf) >= 0}
        found = [name for name, target in waiting.items() if self._group(target) not in moving]
        return found if len(found) >= min(self.least, len(waiting)) else []

    def front(self, margins: Mapping[str, float], moving: Sequence[str]) -> list[str]:
        """Those first of the ``moving`` targets, in the order of their calls, that stand still."""
        limit = self.still
        if limit is None:
            return []
        return list(takewhile(lambda name: margins.get(name, -math.inf) >= limit, moving))

    def _group(self, target: Target) -> str:
        if self.by == "target":
            return target.name
        shared = family(target.module)
        return shared if self.by == "family" else target.module.removesuffix(shared)


@dataclass(frozen=True)
class Restart:
    """Merge the adapter and start a new one, each ``every_epochs`` (ReLoRA, arXiv 2307.05695).

    ``init`` is the new start, None the policy's; with update_svd the recent update is that since
    the last merge. Of the factors' moments a share ``pruned`` is set to zero, 'random' entries or
    those of smallest 'magnitude', or all of them ('zero'); all other moments survive.
    ``adapter.rewarmup_updates`` ramps the learning rate after each restart: the jagged cosine.
    """

    every_epochs: float = 2.0
    init: AdapterInit | None = None
    prune: str = "random"
    pruned: float = 0.999

    def __post_init__(self) -> None:
        if not self.every_epochs > 0:
            raise ValueError(
                f"switch.restart.every_epochs is {self.every_epochs}: give more than 0"
            )
        check_choice("switch.restart.prune", self.prune, ("random", "magnitude", "zero"))
        check_share("switch.restart.pruned", self.pruned)
