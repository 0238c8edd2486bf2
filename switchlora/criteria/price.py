"""Decide by what a switch would cost in accuracy, as far as the update norms tell it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from switchlora.criteria.basic import Verdict, by_layer, carried, held_back, too_short
from switchlora.errors import check_range, check_share
from switchlora.monitor import Measurement

NO_SHARE = (
    "switch.criterion.share is null: give the share of the parameters that will train on, since "
    "switch.rank has none"
)


@dataclass(frozen=True)
class PredictedCost:
    """Fire as soon as a switch is predicted to cost at most ``tolerance`` points of accuracy.

    Let u_t be the relative update norm of a target in window t. Its height u_t / max_{s <= t} u_s
    says how much movement is left. Where a share p of the parameters trains on, a switch cost

        cost = k h,    k = max(``least``, ``slope`` ln(``free_share`` / p)),

    in points of top1, with h the mean height of the targets. Slope and free share were measured
    with 5,000 Fashion-MNIST images and shares of 5 to 30 %, ``least`` with 20,000. See
    docs/results/signals.md for that, and how to measure yours.

    The peak of the norms must be past, and the predicted cost low in each of the last ``patience``
    windows. ``share`` is p; None: a policy gives that of its ``Budget``. Without one it never
    fires.
    """

    tolerance: float = 0.3
    share: float | None = None
    slope: float = 1.15
    free_share: float = 0.176
    least: float = 0.3
    patience: int = 2

    def __post_init__(self) -> None:
        if self.share is not None:
            check_share("switch.criterion.share", self.share)
        check_share("switch.criterion.free_share", self.free_share)
        check_range("switch.criterion.tolerance", self.tolerance, 0)
        check_range("switch.criterion.slope", self.slope, 0)
        check_range("switch.criterion.least", self.least, 0)
        check_range("switch.criterion.patience", self.patience, 1)

    def points(self, share: float) -> float:
        """Return the points that a switch costs at the peak of the norms."""
        return max(self.least, self.slope * math.log(self.free_share / share))

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Return the verdict; margin: ``tolerance`` minus the cost by each target's own height."""
        if self.share is None:
            return Verdict(False, {}, NO_SHARE)
        if len(history) < self.patience + 1:
            return too_short(history, self.patience + 1)
        norms = {}
        for name, stats in by_layer(history).items():
            norms[name] = [window.relative_update_norm for window in stats]
        recent = {name: values[-self.patience :] for name, values in norms.items()}
        if verdict := held_back(recent, "update norm"):
            return verdict
        norms = {name: carried(values) for name, values in norms.items()}
        points = self.points(self.share)
        margins = {}
        for name, values in norms.items():
            margins[name] = self.tolerance - points * heights(values)[-1]
        of_windows = zip(*map(heights, norms.values()), strict=True)
        height = max([fmean(window) for window in of_windows][-self.patience :])
        cost = points * height
        fires = cost <= self.tolerance and height < 1
        reason = (
            f"a switch is predicted to cost {cost:.2f} points at {self.share:.0%} trained, "
            f"{self.tolerance:g} are accepted; update norms are at {height:.2f} of their peak"
        )
        return Verdict(fires, margins, reason)


def heights(values: Sequence[float]) -> list[float]:
    """Return each value over the largest so far; 1 where all are zero.

    >>> heights([0.5, 1.0, 0.25])
    [1.0, 1.0, 0.25]
    """
    found = []
    peak = 0.0
    for value in values:
        peak = max(peak, value)
        found.append(value / peak if peak else 1.0)
    return found
