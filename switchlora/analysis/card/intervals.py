"""95 % intervals: Wilson's for a share, and by resampling the images for everything else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap

LEVEL = 0.95
RESAMPLES, SEED, BATCH = 1000, 0, 50
Statistic = Callable[[np.ndarray], float]
"""maps the numbers of units, some of them several times, to a number"""


class Interval(NamedTuple):
    """A number that was measured, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """Return the same in another unit."""
        return Interval(*(factor * number for number in self))

    def plain(self) -> dict[str, float]:
        """Return it as a dict for JSON."""
        return self._asdict()


def wilson(count: int, trials: int) -> dict[str, float]:
    """Return ``count`` of ``trials`` in %, with Wilson's interval."""
    found = binomtest(count, trials).proportion_ci(LEVEL, method="wilson")
    return Interval(count / trials, float(found.low), float(found.high)).scaled(100).plain()


def resampled(statistic: Statistic, units: int, reflected: bool = False) -> Interval:
    """Return a statistic over ``units``, with the interval of a seeded bootstrap.

    ``reflected`` reflects the interval at the value, for a statistic that is larger on resampled
    units than on fresh ones. It does not go below 0.
    """
    everyone = np.arange(units)
    method = "basic" if reflected else "percentile"
    low, high = ends((everyone,), statistic, method=method, vectorized=False)
    if reflected:
        low, high = max(low, 0.0), max(high, 0.0)
    return Interval(float(statistic(everyone)), low, high)


def resampled_mean(values: np.ndarray) -> Interval:
    """Return the mean of one value a unit, with the interval of a seeded bootstrap."""
    low, high = ends((np.asarray(values, dtype=float),), np.mean, vectorized=True)
    return Interval(float(values.mean()), low, high)


def ends(
    data: tuple[np.ndarray, ...],
    statistic: Callable[..., Any],
    vectorized: bool,
    method: str = "percentile",
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Return the ends of scipy's seeded bootstrap interval of a statistic."""
    found = bootstrap(
        data,
        statistic,
        vectorized=vectorized,
        method=method,
        n_resamples=resamples,
        batch=BATCH,
        confidence_level=LEVEL,
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
