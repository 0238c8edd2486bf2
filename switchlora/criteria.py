"""Switch criteria: the history of measurements -> has training settled enough to switch?

A criterion is a pure function of the logged history, so it can be replayed on a finished run.
A new one is a function, or a frozen dataclass with ``__call__``, and a yaml in
``conf/switch/criterion``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from switchlora.errors import check_choice, check_range, check_share
from switchlora.monitor import LayerStats, Measurement
from switchlora.surgery import family

LOSS = "train_loss"


@dataclass(frozen=True)
class Verdict:
    """What a criterion says.

    ``margins`` holds, per target (and under 'train_loss' for a test of the loss), the distance to
    its own threshold in the criterion's unit; positive means converged. ``reason`` is one
    sentence: why it fired, or what held it back.
    """

    fires: bool
    margins: Mapping[str, float]
    reason: str


SwitchCriterion = Callable[[Sequence[Measurement]], Verdict]


def never(history: Sequence[Measurement]) -> Verdict:
    """Full training to the end."""
    return Verdict(False, {}, "criterion=never trains all parameters to the end")


def at_start(history: Sequence[Measurement]) -> Verdict:
    """Fires before the first update: LoRA from the start."""
    return Verdict(True, {}, "criterion=at_start switches before the first update")


@dataclass(frozen=True)
class AtEpoch:
    """Fires at the first measurement at or after ``epoch``: a switch by date (Pufferfish)."""

    epoch: float

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Compare the epochs done with the date."""
        done = history[-1].epoch if history else 0.0
        fires = bool(history) and done >= self.epoch
        return Verdict(fires, {}, f"epoch {done:.2f} of the set {self.epoch:g}")


@dataclass(frozen=True)
class UpdateNorm:
    """Per-layer plateau of the relative update norm u_t = ||W_t - W_{t-1}||_F / ||W_t||_F.

    A target has converged when each of its last ``patience`` windows satisfies u_t <= ``fraction``
    * max_{s <= t} u_s: its updates have come down from their peak and stay down. Fires when at
    least a share ``quorum`` of the targets has converged.
    """

    fraction: float = 0.7
    patience: int = 3
    quorum: float = 1.0

    def __post_init__(self) -> None:
        check_share("quorum", self.quorum)
        check_range("patience", self.patience, 1)

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Margin: ``fraction`` minus the largest u_t / peak among the last windows."""
        if len(history) < self.patience + 1:
            return _too_short(history, self.patience + 1)
        margins = {}
        for name, stats in _by_layer(history).items():
            norms = [s.relative_update_norm for s in stats]
            margins[name] = self.fraction - max(norms[-self.patience :]) / max(max(norms), 1e-30)
        rule = (
            f"update norms at or under {self.fraction:g} of their peak for {self.patience} windows"
        )
        return _vote(margins, self.quorum, rule)


@dataclass(frozen=True)
class StableRank:
    """Per-layer plateau of the stable rank (Cuttlefish; Wang et al., arXiv 2305.02538).

    e = EMA of rho with weight 2 / (P + 1); g = |de/dt| by central differences, one-sided at the
    end. A target is stable, and stays so, once the mean of its last P values of g is <=
    ``epsilon``. rho is the stable rank of the weight or, with ``of='update'``, of the window's
    update; ``relative`` divides g by e, so that one epsilon suits narrow and wide layers.
    """

    epsilon: float = 0.1
    patience: int = 5
    of: str = "weight"
    relative: bool = False
    quorum: float = 1.0

    def __post_init__(self) -> None:
        check_share("quorum", self.quorum)
        check_range("patience", self.patience, 1)
        check_choice("of", self.of, ("weight", "update"))

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Margin: epsilon minus the smallest smoothed derivative seen so far."""
        if len(history) < self.patience + 1:
            return _too_short(history, self.patience + 1)
        margins = {}
        for name, stats in _by_layer(history).items():
            ranks = [getattr(s, f"{self.of}_stable_rank") for s in stats]
            margins[name] = self.epsilon - float(np.min(self.derivatives(np.array(ranks))))
        rule = f"smoothed derivative of the {self.of} stable rank <= {self.epsilon:g}"
        return _vote(margins, self.quorum, rule)

    def derivatives(self, ranks: np.ndarray) -> np.ndarray:
        """Mean of the last P absolute derivatives at each t >= P, as it was seen at t."""
        smooth = _exponential_average(ranks, 2 / (self.patience + 1))
        scale = smooth if self.relative else np.ones_like(smooth)
        central = np.abs(smooth[2:] - smooth[:-2]) / 2 / np.maximum(scale[1:-1], 1e-30)
        last = np.abs(np.diff(smooth)) / np.maximum(scale[1:], 1e-30)
        P = self.patience
        return np.array(
            [(central[t - P : t - 1].sum() + last[t - 1]) / P for t in range(P, len(ranks))]
        )


@dataclass(frozen=True)
class PreLoRA:
    """PreLoRA's partial-convergence test (arXiv 2509.21619, in the form of its public code).

    d_i(t) = 100 * | n_i(t) - n_i(t-1) | / n_i(t-1),  n_i = ||W_i||_F;  D_F = mean of d_i over a
    family. Fires when, for all k - 1 consecutive pairs of the last k windows, D_F < tau for every
    family and 100 * |l(t) - l(t-1)| / l(t-1) <= zeta for the window's mean train loss. Both in per
    cent. ``signal='update_norm'`` measures 100 * ||W_i(t) - W_i(t-1)||_F / ||W_i(t-1)||_F instead,
    which sees a rotation at constant norm.
    """

    tau: float = 5.0
    zeta: float = 10.0
    windows: int = 3
    signal: str = "weight_norm"

    def __post_init__(self) -> None:
        check_choice("signal", self.signal, ("weight_norm", "update_norm"))
        check_range("windows", self.windows, 2)

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Margins are each target's own, tau - max d_i, though the family's mean decides."""
        if len(history) < self.windows:
            return _too_short(history, self.windows)
        recent = history[-self.windows :]
        changes = {name: self._changes(stats) for name, stats in _by_layer(recent).items()}
        families = _family_means(changes)
        loss = max(_relative_changes([m.train_loss for m in recent]))
        margins = {name: self.tau - max(d) for name, d in changes.items()}
        margins[LOSS] = self.zeta - loss
        worst, change = max(families.items(), key=lambda item: item[1])
        fires = change < self.tau and loss <= self.zeta
        return Verdict(fires, margins, self._reason(worst, change, loss, margins))

    def _changes(self, stats: Sequence[LayerStats]) -> list[float]:
        if self.signal == "weight_norm":
            return _relative_changes([s.weight_norm for s in stats])
        pairs = zip(stats, stats[1:], strict=False)
        return [100 * new.update_norm / max(old.weight_norm, 1e-12) for old, new in pairs]

    def _reason(self, worst: str, change: float, loss: float, margins: Mapping[str, float]) -> str:
        hidden = sum(m <= 0 for name, m in margins.items() if name != LOSS)
        moving = f"; {hidden} target(s) alone move by more" if hidden else ""
        return (
            f"family {worst} changed most, {change:.3g} % (tau {self.tau:g} %), train loss "
            f"changed {loss:.3g} % (zeta {self.zeta:g} %) over {self.windows} windows{moving}"
        )


@dataclass(frozen=True)
class LossPlateau:
    """Fires when the window's mean train loss has stopped falling.

    100 * (l(t-1) - l(t)) / l(t-1) <= ``tolerance`` per cent in each of the last ``patience``
    windows.
    """

    tolerance: float = 1.0
    patience: int = 3

    def __post_init__(self) -> None:
        check_range("patience", self.patience, 1)

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Margin: tolerance minus the largest improvement, under 'train_loss'."""
        if len(history) < self.patience + 1:
            return _too_short(history, self.patience + 1)
        losses = [m.train_loss for m in history[-self.patience - 1 :]]
        gains = [100 * (a - b) / a for a, b in zip(losses, losses[1:], strict=False)]
        margin = self.tolerance - max(gains)
        reason = (
            f"train loss fell by at most {max(gains):.3g} % a window over {self.patience} windows "
            f"(tolerance {self.tolerance:g} %)"
        )
        return Verdict(margin >= 0, {LOSS: margin}, reason)


@dataclass(frozen=True)
class AllOf:
    """Fires when every one of ``criteria`` fires; margins are the smallest of each target."""

    criteria: Sequence[SwitchCriterion]

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Ask all of them."""
        verdicts = [criterion(history) for criterion in self.criteria]
        holding = [v.reason for v in verdicts if not v.fires]
        reason = " and ".join(holding or [v.reason for v in verdicts])
        return Verdict(not holding, _combined(verdicts, min), reason)


@dataclass(frozen=True)
class AnyOf:
    """Fires when one of ``criteria`` fires; margins are the largest of each target."""

    criteria: Sequence[SwitchCriterion]

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Ask all of them."""
        verdicts = [criterion(history) for criterion in self.criteria]
        firing = [v.reason for v in verdicts if v.fires]
        reason = " or ".join(firing or [v.reason for v in verdicts])
        return Verdict(bool(firing), _combined(verdicts, max), reason)


def _by_layer(history: Sequence[Measurement]) -> dict[str, list[LayerStats]]:
    return {name: [m.layers[name] for m in history] for name in history[-1].layers}


def _relative_changes(values: Sequence[float]) -> list[float]:
    return [
        0.0 if max(abs(a), abs(b)) < 1e-12 else 100 * abs(b - a) / max(abs(a), 1e-12)
        for a, b in zip(values, values[1:], strict=False)
    ]


def _family_means(changes: Mapping[str, list[float]]) -> dict[str, float]:
    members: dict[str, list[list[float]]] = {}
    for name, values in changes.items():
        members.setdefault(family(name), []).append(values)
    return {
        name: max(mean(at_once) for at_once in zip(*rows, strict=True))
        for name, rows in members.items()
    }


def _exponential_average(values: np.ndarray, weight: float) -> np.ndarray:
    average = np.array(values, dtype=float)
    for t in range(1, len(average)):
        average[t] = weight * values[t] + (1 - weight) * average[t - 1]
    return average


def _vote(margins: Mapping[str, float], quorum: float, rule: str) -> Verdict:
    converged = sum(margin >= 0 for margin in margins.values())
    worst = min(margins, key=lambda name: margins[name])
    place = "furthest from it" if margins[worst] < 0 else "closest call"
    reason = (
        f"{converged} of {len(margins)} targets have {rule} (quorum {quorum:.0%}); "
        f"{place}: {worst} by {abs(margins[worst]):.3g}"
    )
    return Verdict(converged >= quorum * len(margins), margins, reason)


def _combined(verdicts: Sequence[Verdict], choose: Callable) -> dict[str, float]:
    names = dict.fromkeys(name for v in verdicts for name in v.margins)
    return {n: choose(v.margins[n] for v in verdicts if n in v.margins) for n in names}


def _too_short(history: Sequence[Measurement], needed: int) -> Verdict:
    return Verdict(False, {}, f"{len(history)} of the {needed} windows it needs are measured")
