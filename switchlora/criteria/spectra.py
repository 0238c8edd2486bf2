"""Switch criteria that read spectra: have stable ranks, or singular bases, stopped moving?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from switchlora.criteria.basic import Verdict, by_layer, too_short, vote
from switchlora.errors import check_choice, check_range, check_share
from switchlora.monitor import Measurement


@dataclass(frozen=True)
class StableRank:
    """Per-layer plateau of the stable rank (Cuttlefish; Wang et al., arXiv 2305.02538).

    e = EMA of rho with weight 2 / (P + 1); g = |de/dt| by central differences, one-sided at the
    end. A target is stable, and stays so, once the mean of its last P values of g is <=
    ``epsilon``. While at most n targets are left, epsilon is multiplied by f, for the smallest n
    that holds of the pairs (n, f) in ``relaxed``. rho is the stable rank of the weight or, with
    ``of='update'``, of the window's update; ``integer`` cuts its decimals off, as the public code
    does; ``relative`` divides g by e, so that one epsilon suits narrow and wide layers.
    """

    epsilon: float = 0.1
    patience: int = 5
    of: str = "weight"
    relative: bool = False
    quorum: float = 1.0
    relaxed: Sequence[tuple[int, float]] = ()
    integer: bool = False

    def __post_init__(self) -> None:
        check_share("quorum", self.quorum)
        check_range("patience", self.patience, 1)
        check_choice("of", self.of, ("weight", "update"))
        if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in self.relaxed):
            raise ValueError(
                f"relaxed is {self.relaxed}: give pairs of targets left and factor, [[9, 2.5]]"
            )

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Margin: the largest so far of epsilon, as relaxed then, minus the derivative."""
        if len(history) < self.patience + 1:
            return too_short(history, self.patience + 1)
        slopes = {name: self.derivatives(r) for name, r in self._ranks(history).items()}
        margins = dict.fromkeys(slopes, -inf)
        for t in range(len(history) - self.patience):
            epsilon = self.epsilon * self._factor(margins)
            margins = {n: max(m, epsilon - float(slopes[n][t])) for n, m in margins.items()}
        rule = f"smoothed derivative of the {self.of} stable rank <= {epsilon:g}"
        return vote(margins, self.quorum, rule)

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

    def _ranks(self, history: Sequence[Measurement]) -> dict[str, np.ndarray]:
        series = {
            name: np.array([getattr(s, f"{self.of}_stable_rank") for s in stats])
            for name, stats in by_layer(history).items()
        }
        return {n: np.trunc(r) for n, r in series.items()} if self.integer else series

    def _factor(self, margins: Mapping[str, float]) -> float:
        left = sum(margin < 0 for margin in margins.values())
        return min(((n, f) for n, f in self.relaxed if left <= n), default=(0, 1.0))[1]


@dataclass(frozen=True)
class BasisStability:
    """OIALR's test of directions (Coquelin et al., arXiv 2401.08505).

    With W = U S V^T of the tall one of weight and transpose, a target is stable when the mean
    cosine between the columns of U V^T now and at the start of the window is at least
    ``threshold``: turning counts, growing does not. Fires when at least a share ``quorum`` of the
    targets is stable, but not before ``delay`` windows (published: 5, of 2000 updates). ValueError
    where monitor.bases is false.
    """

    threshold: float = 0.99
    quorum: float = 1.0
    delay: int = 5

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)
        check_share("quorum", self.quorum)
        check_range("delay", self.delay, 0)

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Margin: the mean cosine of the last window minus the threshold."""
        if not history:
            return too_short(history, 1)
        last = history[-1]
        margins = {}
        for name, stats in last.layers.items():
            if stats.basis_stability is None:
                raise ValueError(
                    f"criterion=oialr reads how far singular bases turn, which was not measured "
                    f"of {name}: set monitor.bases=true"
                )
            margins[name] = stats.basis_stability - self.threshold
        if len(history) < self.delay:
            return Verdict(False, {}, f"window {len(history)} of a delay of {self.delay}")
        return vote(margins, self.quorum, f"bases stable to a mean cosine >= {self.threshold:g}")


def _exponential_average(values: np.ndarray, weight: float) -> np.ndarray:
    average = np.array(values, dtype=float)
    for t in range(1, len(average)):
        average[t] = weight * values[t] + (1 - weight) * average[t - 1]
    return average
