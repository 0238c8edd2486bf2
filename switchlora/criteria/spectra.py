"""Switch criteria on spectra: they fire when stable ranks, or singular bases, stop moving."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from operator import attrgetter

import numpy as np

from switchlora.criteria.basic import Verdict, by_layer, carried, held_back, too_short, vote
from switchlora.errors import check_choice, check_range, check_share
from switchlora.monitor import LayerStats, Measurement


@dataclass(frozen=True)
class StableRank:
    """Fire when stable ranks stop moving (Cuttlefish; Wang et al., arXiv 2305.02538).

    With rho the stable rank of a target and P = ``patience``:

    - e is the exponential moving average of rho over the windows, with weight 2 / (P + 1).
    - g = |de/dt| by central differences, one-sided in the last window.
    - The target is stable once the mean of its last P values of g is <= ``epsilon``. It then
      stays stable.

    The criterion fires when at least a share ``quorum`` of the targets is stable. Options:

    - ``of``: 'weight' takes rho of the weight, 'update' takes rho of the window's update.
    - ``relative``: divide g by e. One epsilon then suits narrow and wide layers.
    - ``relaxed``: pairs (p, f). When a share p of the targets, or less, is not yet stable, epsilon
      is multiplied by f. Of several matching pairs the one with the smallest p counts.
    - ``integer``: cut off the decimals of rho, as the public code does.
    """

    epsilon: float = 0.1
    patience: int = 5
    of: str = "weight"
    relative: bool = False
    quorum: float = 1.0
    relaxed: Sequence[tuple[float, float]] = ()
    integer: bool = False

    def __post_init__(self) -> None:
        check_share("quorum", self.quorum)
        check_range("patience", self.patience, 1)
        check_choice("of", self.of, ("weight", "update"))
        for pair in self.relaxed:
            if not isinstance(pair, Sequence) or len(pair) != 2 or not 0 < pair[0] <= 1:
                raise ValueError(
                    f"switch.criterion.relaxed is {self.relaxed}: give pairs of the share of the "
                    "targets left and a factor, [[0.1875, 2.5]] for 9 of 48 targets"
                )

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Return the verdict; margins: the largest value so far of epsilon minus the mean of g.

        Each value uses the epsilon of its own window, as ``relaxed`` then made it.
        """
        if len(history) < self.patience + 1:
            return too_short(history, self.patience + 1)
        ranks = {name: self._ranks(stats) for name, stats in by_layer(history).items()}
        recent = {name: values[-self.patience :] for name, values in ranks.items()}
        if verdict := held_back(recent, f"{self.of} stable rank"):
            return verdict
        slopes = {}
        for name, values in ranks.items():
            slopes[name] = self.derivatives(np.array(carried(values.tolist())))
        margins = dict.fromkeys(slopes, -inf)
        for t in range(len(history) - self.patience):
            epsilon = self.epsilon * self._factor(margins)
            for name, slope in slopes.items():
                margin = epsilon - float(slope[t])
                margins[name] = max(margins[name], margin)
        rule = f"smoothed derivative of the {self.of} stable rank <= {epsilon:g}"
        return vote(margins, self.quorum, rule)

    def derivatives(self, ranks: np.ndarray) -> np.ndarray:
        """Return, for each window t >= P, the mean of the last P values of g.

        Only ``ranks`` up to window t are used: the value is what was known at t.
        """
        P = self.patience
        smooth = _exponential_average(ranks, 2 / (P + 1))
        scale = np.ones_like(smooth)
        if self.relative:
            scale = np.maximum(smooth, 1e-30)
        central = np.abs(smooth[2:] - smooth[:-2]) / 2 / scale[1:-1]
        one_sided = np.abs(np.diff(smooth)) / scale[1:]
        means = []
        for t in range(P, len(ranks)):
            total = central[t - P : t - 1].sum() + one_sided[t - 1]
            means.append(total / P)
        return np.array(means)

    def _ranks(self, stats: Sequence[LayerStats]) -> np.ndarray:
        statistic = attrgetter(f"{self.of}_stable_rank")
        ranks = np.array(list(map(statistic, stats)))
        return np.trunc(ranks) if self.integer else ranks

    def _factor(self, margins: Mapping[str, float]) -> float:
        """Return the factor that ``relaxed`` gives epsilon while some targets are not stable."""
        left = sum(margin < 0 for margin in margins.values()) / len(margins)
        matching = [(most, factor) for most, factor in self.relaxed if left <= most]
        if not matching:
            return 1.0
        _, factor = min(matching)
        return factor


@dataclass(frozen=True)
class BasisStability:
    """Fire when singular bases stop turning: OIALR's test (Coquelin et al., arXiv 2401.08505).

    Let W = U S V^T, with W the weight or, if it is wide, its transpose. A target is stable when
    the mean cosine between the columns of U V^T now and at the start of the window is at least
    ``threshold``. Turning counts, growing does not. The criterion fires when at least a share
    ``quorum`` of the targets is stable, but not before ``delay`` windows (published: 5 windows of
    2000 updates). It raises ValueError when monitor.bases is false.
    """

    threshold: float = 0.99
    quorum: float = 1.0
    delay: int = 5

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)
        check_share("quorum", self.quorum)
        check_range("delay", self.delay, 0)

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Return the verdict; margin: the mean cosine of the last window minus the threshold."""
        if not history:
            return too_short(history, 1)
        last = history[-1]
        margins = {}
        for name, stats in last.layers.items():
            if stats.basis_stability is None:
                raise ValueError(
                    f"switch/criterion=oialr reads how far singular bases turn, which was not "
                    f"measured of {name}: set monitor.bases=true"
                )
            margins[name] = stats.basis_stability - self.threshold
        if verdict := held_back({name: [m] for name, m in margins.items()}, "basis stability"):
            return verdict
        if len(history) < self.delay:
            return Verdict(False, {}, f"window {len(history)} of a delay of {self.delay}")
        return vote(margins, self.quorum, f"bases stable to a mean cosine >= {self.threshold:g}")


def _exponential_average(values: np.ndarray, weight: float) -> np.ndarray:
    average = np.array(values, dtype=float)
    for t in range(1, len(average)):
        average[t] = weight * values[t] + (1 - weight) * average[t - 1]
    return average
