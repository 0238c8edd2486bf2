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
    value = float(statistic(everyone))
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "confidence_level": LEVEL}
    found = bootstrap(
        (everyone,),
        statistic,
        vectorized=False,
        batch=BATCH,
        method="basic" if reflected else "percentile",
        random_state=np.random.default_rng(SEED),
        **options,
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (
        Interval(value, max(low, 0.0), max(high, 0.0)) if reflected else Interval(value, low, high)
    )


def resampled_mean(values: np.ndarray) -> Interval:
    """Return the mean of one value a unit, with the interval of a seeded bootstrap."""
    return resampled(lambda rows: float(values[rows].mean()), len(values))
