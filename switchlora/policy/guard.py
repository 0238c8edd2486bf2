"""The guard: is the adapter still where full training would be?

It compares the losses after a switch with the full phase's curve, carried on as a power law, which
early training follows well (Kaplan et al., arXiv 2001.08361; Hestness et al., arXiv 1712.00409).
A guard is a pure function of logged losses.
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


class Loss(NamedTuple):
    """The mean loss of a window of updates ('train'), or on the validation split ('val')."""

    num_updates: int
    split: str
    phase: str
    value: float


class Standing(NamedTuple):
    """Whether the adapter is too far behind, by how much at the last look, and why."""

    behind: bool
    excess: float
    reason: str


@dataclass(frozen=True)
class Guard:
    """Watches the losses after a switch and says what to do when the adapter falls behind.

    Full training is expected at L(n) = L(m) (n / m)^slope, with L(m) its last level and the
    flattest slope of log L on log n that the full phase's windows allow: the end of Theil and
    Sen's 95 % interval, robust to noisy windows, wide where there are few. The adapter is behind
    when train or validation loss exceeds that by more than ``tolerance``, a share, ``patience``
    times running, at the end of an epoch. Then: 'warn' says so; 'ranks' multiplies the ranks by
    ``growth``, with new directions from the gradient, and where none can grow acts as 'full'. That
    returns to full training, with the learning rate ramped over ``rewarmup_updates``, at ``most``
    so many times; ``criterion`` (None: the one before) must fire on what is measured from there.
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

    def __call__(self, losses: Sequence[Loss], since: int) -> Standing:
        """The standing after ``since``, the update of the last switch or action."""
        trained = {loss.num_updates for loss in losses if loss.phase == "full"}
        full = [loss for loss in losses if loss.num_updates in trained]  # a switch moves no loss
        after = [
            loss for loss in losses if loss.num_updates > since and loss.num_updates not in trained
        ]
        worst = Standing(False, -np.inf, "nothing to compare with yet")
        for split, name in (("val", "validation"), ("train", "train")):
            expected = extrapolate(full, split)
            found = [loss for loss in after if loss.split == split][-self.patience :]
            if expected is None or not found:
                continue
            excesses = [_excess(loss.value, expected(loss.num_updates)) for loss in found]
            behind = len(found) == self.patience and min(excesses) > self.tolerance
            reason = self._reason(name, behind, found[-1], expected(found[-1].num_updates))
            worst = max(worst, Standing(behind, excesses[-1], reason))
        return worst

    def _reason(self, name: str, behind: bool, last: Loss, expected: float) -> str:
        excess = _excess(last.value, expected)
        side = "above" if excess > 0 else "below"
        times = f", {self.patience} time(s) running" if behind else ""
        return (
            f"{name} loss {last.value:.4f} is {abs(excess):.1%} {side} what full training was "
            f"heading for ({expected:.4f}; tolerance {self.tolerance:.0%}{times})"
        )


def _excess(value: float, expected: float) -> float:
    """Share by which a loss is above what was expected; one that is no number is endlessly."""
    return value / expected - 1 if math.isfinite(value) else math.inf


def extrapolate(full: Sequence[Loss], split: str) -> Callable[[int], float] | None:
    """L(n) of full training on a ``split``, from its own losses; None with too few of them.

    The slope comes from the train windows, of which there are more. The level is the last loss of
    the split, on 'train' the median of the last three put on the line.
    """
    train = [(loss.num_updates, loss.value) for loss in full if loss.split == "train"]
    level = [(loss.num_updates, loss.value) for loss in full if loss.split == split]
    if len(train) < LEAST_POINTS or not level:
        return None
    from scipy.stats import theilslopes  # seconds of imports, of which few runs have a use

    updates, values = np.log(train).T
    slope = min(theilslopes(values, updates).high_slope, 0.0)
    n, height = np.log(level[-(LEAST_POINTS if split == "train" else 1) :]).T
    intercept = float(np.median(height - slope * n))
    return lambda num_updates: float(np.exp(intercept + slope * np.log(num_updates)))
