"""Decide from the history of measurements whether training has settled enough to switch.

A criterion is a pure function of the logged history. It can therefore be replayed on a finished
run. To add one, write a function, or a frozen dataclass with ``__call__``, and a yaml in
``conf/switch/criterion``. The criteria on spectra are in ``spectra``.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from operator import itemgetter

from switchlora.errors import check_range, check_share
from switchlora.monitor import LayerStats, Measurement

LOSS = "train_loss"
SMALLEST = 1e-12
"""what is smaller counts as zero where a change is given in per cent"""


@dataclass(frozen=True)
class Verdict:
    """The answer of a criterion.

    - ``fires``: whether to switch now.
    - ``margins``: the distance of each target to its threshold, in the criterion's unit. A
      positive margin means that the target has converged. A test of the loss has its margin under
      'train_loss'.
    - ``reason``: one sentence on why the criterion fired, or on what held it back.
    """

    fires: bool
    margins: Mapping[str, float]
    reason: str


SwitchCriterion = Callable[[Sequence[Measurement]], Verdict]


def never(history: Sequence[Measurement]) -> Verdict:
    """Never fire: all parameters train to the end."""
    return Verdict(False, {}, "switch/criterion=never trains all parameters to the end")


def at_start(history: Sequence[Measurement]) -> Verdict:
    """Fire before the first update: LoRA from the start."""
    return Verdict(True, {}, "switch/criterion=at_start switches before the first update")


@dataclass(frozen=True)
class AtEpoch:
    """Fire at the first measurement at or after ``epoch``, a date set in advance (Pufferfish)."""

    epoch: float

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Return whether ``epoch`` is reached; there are no margins."""
        done = history[-1].epoch if history else 0.0
        if math.isnan(done):
            raise ValueError("AtEpoch counts epochs: give updates_per_epoch")
        fires = bool(history) and done >= self.epoch
        return Verdict(fires, {}, f"epoch {done:.2f} of the set {self.epoch:g}")


@dataclass(frozen=True)
class UpdateNorm:
    """Fire when the relative update norms have come down from their peak and stay down.

    The relative update norm of a target in window t is u_t = ||W_t - W_{t-1}||_F / ||W_t||_F. The
    target has converged when u_t <= ``fraction`` * max_{s <= t} u_s in each of the last
    ``patience`` windows. The criterion fires when at least a share ``quorum`` of the targets has
    converged.
    """

    fraction: float = 0.9
    patience: int = 3
    quorum: float = 1.0

    def __post_init__(self) -> None:
        check_share("quorum", self.quorum)
        check_range("patience", self.patience, 1)

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Return the verdict; margin: ``fraction`` minus the largest u_t / peak of the windows."""
        if len(history) < self.patience + 1:
            return too_short(history, self.patience + 1)
        norms = {}
        for name, stats in by_layer(history).items():
            norms[name] = [window.relative_update_norm for window in stats]
        recent = {name: values[-self.patience :] for name, values in norms.items()}
        if verdict := held_back(recent, "update norm"):
            return verdict
        margins = {}
        for name, values in norms.items():
            peak = max(filter(isfinite, values))
            margins[name] = self.fraction - max(recent[name]) / max(peak, 1e-30)
        rule = (
            f"update norms at or under {self.fraction:g} of their peak for {self.patience} windows"
        )
        return vote(margins, self.quorum, rule)


@dataclass(frozen=True)
class LossPlateau:
    """Fire when the train loss has stopped falling.

    With l(t) the mean train loss of window t, the loss has stopped falling when
    100 * (l(t-1) - l(t)) / l(t-1) <= ``tolerance`` per cent in each of the last ``patience``
    windows.
    """

    tolerance: float = 1.0
    patience: int = 3

    def __post_init__(self) -> None:
        check_range("patience", self.patience, 1)

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Return the verdict; margin 'train_loss': tolerance minus the largest improvement."""
        if len(history) < self.patience + 1:
            return too_short(history, self.patience + 1)
        losses = [measured.train_loss for measured in history[-self.patience - 1 :]]
        if verdict := held_back({LOSS: losses}, "mean"):
            return verdict
        largest = -min(relative_changes(losses))
        margin = self.tolerance - largest
        reason = (
            f"train loss fell by at most {largest:.3g} % a window over {self.patience} windows "
            f"(tolerance {self.tolerance:g} %)"
        )
        return Verdict(margin >= 0, {LOSS: margin}, reason)


@dataclass(frozen=True)
class AllOf:
    """Fire when each of ``criteria`` fires; a target's margin is its smallest one."""

    criteria: Sequence[SwitchCriterion]

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Ask all ``criteria`` and join their verdicts."""
        verdicts = [criterion(history) for criterion in self.criteria]
        holding = [verdict for verdict in verdicts if not verdict.fires]
        reason = _reasons(holding or verdicts, " and ")
        return Verdict(not holding, _combined(verdicts, min), reason)


@dataclass(frozen=True)
class AnyOf:
    """Fire when one of ``criteria`` fires; a target's margin is its largest one."""

    criteria: Sequence[SwitchCriterion]

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Ask all ``criteria`` and join their verdicts."""
        verdicts = [criterion(history) for criterion in self.criteria]
        firing = [verdict for verdict in verdicts if verdict.fires]
        reason = _reasons(firing or verdicts, " or ")
        return Verdict(bool(firing), _combined(verdicts, max), reason)


def joined(criterion: SwitchCriterion) -> list[SwitchCriterion]:
    """Return the criteria that ``criterion`` joins, at any depth, or itself."""
    if not isinstance(criterion, AllOf | AnyOf):
        return [criterion]
    return [part for each in criterion.criteria for part in joined(each)]


def by_layer(history: Sequence[Measurement]) -> dict[str, list[LayerStats]]:
    """Return the statistics of each target, in the order of the windows."""
    stats = {}
    for name in history[-1].layers:
        stats[name] = [measurement.layers[name] for measurement in history]
    return stats


def relative_changes(values: Sequence[float]) -> list[float]:
    """Return the signed change from each value to the next, in % of the earlier one's size."""
    changes = []
    for before, after in pairwise(values):
        if abs(before) < SMALLEST and abs(after) < SMALLEST:
            changes.append(0.0)
        else:
            changes.append(100 * (after - before) / max(abs(before), SMALLEST))
    return changes


def carried(values: Sequence[float]) -> list[float]:
    """Return ``values``, of which each that is not finite gives way to the finite one before it.

    >>> carried([1.0, math.nan, 2.0])
    [1.0, 1.0, 2.0]
    """
    known = next(filter(isfinite, values), math.nan)
    found = []
    for value in values:
        known = value if isfinite(value) else known
        found.append(known)
    return found


def held_back(read: Mapping[str, Iterable[float]], what: str) -> Verdict | None:
    """Return a verdict that does not fire if a number that the criterion reads is not finite.

    ``read`` has the numbers by target, or by 'train_loss'. ``what`` says what they are.
    """
    lost = [name for name, values in read.items() if not all(map(isfinite, values))]
    if not lost:
        return None
    others = f" and of {len(lost) - 1} more" if len(lost) > 1 else ""
    return Verdict(False, {}, f"the {what} of {lost[0]}{others} is not finite")


def vote(margins: Mapping[str, float], quorum: float, rule: str) -> Verdict:
    """Fire when at least a share ``quorum`` of the targets has a margin of 0 or more."""
    converged = sum(margin >= 0 for margin in margins.values())
    worst, margin = min(margins.items(), key=itemgetter(1))
    place = "furthest from it" if margin < 0 else "closest call"
    reason = (
        f"{converged} of {len(margins)} targets have {rule} (quorum {quorum:.0%}); "
        f"{place}: {worst} by {abs(margin):.3g}"
    )
    return Verdict(converged >= quorum * len(margins), margins, reason)


def too_short(history: Sequence[Measurement], needed: int) -> Verdict:
    """Return the verdict of a criterion that needs more windows than are measured."""
    return Verdict(False, {}, f"{len(history)} of the {needed} windows it needs are measured")


def _reasons(verdicts: Sequence[Verdict], separator: str) -> str:
    return separator.join(verdict.reason for verdict in verdicts)


def _combined(
    verdicts: Sequence[Verdict],
    choose: Callable[[list[float]], float],
) -> dict[str, float]:
    """Return the margin that ``choose`` picks for each target, of those in the verdicts."""
    margins: dict[str, list[float]] = {}
    for verdict in verdicts:
        for name, margin in verdict.margins.items():
            margins.setdefault(name, []).append(margin)
    return {name: choose(given) for name, given in margins.items()}
