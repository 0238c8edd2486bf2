"""The guard: it checks whether the adapter keeps up with what full training would have reached.

It extrapolates the losses of the full phase as a power law and compares the losses after the
switch with this curve. Early training follows a power law well (Kaplan et al., arXiv 2001.08361;
Hestness et al., arXiv 1712.00409). A guard is a pure function of logged losses.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from switchlora.criteria import SwitchCriterion
from switchlora.errors import check_choice, check_range

LEAST_POINTS = 3
ACTIONS = ("warn", "ranks", "full")
SPLITS = {"train": "train", "val": "validation"}


class Loss(NamedTuple):
    """The mean loss of a window of updates ('train'), or on the validation split ('val')."""

    num_updates: int
    split: str
    phase: str
    value: float


class Standing(NamedTuple):
    """How the adapter stands against full training.

    - ``behind``: whether it is too far behind.
    - ``excess``: the share by which its last loss is above the expected one.
    - ``reason``: one sentence with the numbers.
    """

    behind: bool
    excess: float
    reason: str


@dataclass(frozen=True)
class Guard:
    """Watch the losses after a switch and act when the adapter falls behind full training.

    The expected loss of full training after n updates is L(n) = L(m) (n / m)^slope, with L(m) its
    last level. The slope of log L on log n is the flattest one that the windows of the full phase
    allow: the upper end of Theil and Sen's 95 % interval. The interval is robust to noisy windows
    and wide when there are few of them.

    The adapter is behind when its train or validation loss exceeds L(n) by more than the share
    ``tolerance``, ``patience`` times in a row. The guard looks at the end of an epoch. ``act``
    says what it then does:

    - 'warn': log it.
    - 'ranks': multiply the ranks by ``growth``, with new directions from the gradient. If no rank
      can grow, do as 'full'.
    - 'full': merge the adapter and train all parameters again, with a learning-rate ramp of
      ``rewarmup_updates`` updates. The next switch needs ``criterion`` (None: the policy's) to
      fire on measurements made after that.

    After ``most`` returns to full training the guard only logs.
    """

    tolerance: float = 0.1
    patience: int = 2
    act: str = "full"
    growth: int = 2
    rewarmup_updates: int = 20
    most: int = 2
    criterion: SwitchCriterion | None = None

    def __post_init__(self) -> None:
        check_range("switch.guard.tolerance", self.tolerance, 0)
        check_range("switch.guard.patience", self.patience, 1)
        check_range("switch.guard.growth", self.growth, 2)
        check_range("switch.guard.most", self.most, 1)
        check_range("switch.guard.rewarmup_updates", self.rewarmup_updates, 0)
        check_choice("switch.guard.act", self.act, ACTIONS)

    @property
    def acts(self) -> bool:
        """Whether it changes what trains where a run is behind, and does not only warn."""
        return self.act != "warn"

    def __call__(self, losses: Sequence[Loss], since: int) -> Standing:
        """Return the standing after update ``since``, that of the last switch or action."""
        trained = {loss.num_updates for loss in losses if loss.phase == "full"}
        full = [loss for loss in losses if loss.num_updates in trained]  # a switch moves no loss
        later = [loss for loss in losses if loss.num_updates not in trained]
        after = [loss for loss in later if loss.num_updates > since]
        worst = Standing(False, -np.inf, "nothing to compare with yet")
        for split in ("val", "train"):
            expected = extrapolate(full, split)
            found = [loss for loss in after if loss.split == split]
            if expected is not None and found:
                worst = max(worst, self._standing(found[-self.patience :], expected))
        return worst

    def _standing(self, found: Sequence[Loss], expected: Callable[[int], float]) -> Standing:
        """Return the standing after the last losses of one split, at most ``patience`` of them."""
        excesses = [_excess(loss.value, expected(loss.num_updates)) for loss in found]
        behind = len(found) == self.patience and min(excesses) > self.tolerance
        last = found[-1]
        reason = self._reason(behind, last, expected(last.num_updates))
        return Standing(behind, excesses[-1], reason)

    def _reason(self, behind: bool, last: Loss, expected: float) -> str:
        excess = _excess(last.value, expected)
        name = SPLITS[last.split]
        side = "above" if excess > 0 else "below"
        times = f", {self.patience} time(s) running" if behind else ""
        return (
            f"{name} loss {last.value:.4f} is {abs(excess):.1%} {side} what full training was "
            f"heading for ({expected:.4f}; tolerance {self.tolerance:.0%}{times})"
        )


def _excess(value: float, expected: float) -> float:
    """Return the share by which a loss is above the expected one; inf for NaN or inf.

    A loss of 0 where 0 was expected is no excess.
    """
    if not math.isfinite(value):
        return math.inf
    if not expected:
        return math.inf if value > 0 else 0.0
    return value / expected - 1


def extrapolate(full: Sequence[Loss], split: str) -> Callable[[int], float] | None:
    """Return L(n), the expected loss of full training on a ``split``; None with too few losses.

    ``full`` holds the losses of the full phase. A power law has no place for a loss that is not
    finite, zero or negative: these are left out. The slope comes from the train windows, since
    there are more of them. The level comes from the split itself: on 'val' the last loss, on
    'train' the median of the last three, each carried along the line.
    """
    usable = [loss for loss in full if loss.num_updates and 0 < loss.value < math.inf]
    train = [(loss.num_updates, loss.value) for loss in usable if loss.split == "train"]
    level = [(loss.num_updates, loss.value) for loss in usable if loss.split == split]
    if len(train) < LEAST_POINTS or not level:
        return None
    from scipy.stats import theilslopes  # this import takes seconds, and few runs need it

    updates, values = np.log(train).T
    slope = min(theilslopes(values, updates).high_slope, 0.0)
    n, height = np.log(level[-(LEAST_POINTS if split == "train" else 1) :]).T
    intercept = float(np.median(height - slope * n))
    return lambda num_updates: float(np.exp(intercept + slope * np.log(num_updates)))
