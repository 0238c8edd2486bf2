"""The power law of loss and training FLOPs, with the confidence interval of its exponent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress, t

CONFIDENCE = 0.95
LEAST_RUNS = 3


@dataclass(frozen=True)
class PowerLaw:
    """L = amplitude * C^-exponent, fitted to ``runs`` points (C, L)."""

    amplitude: float
    exponent: float
    low: float
    """of the exponent's 95 % interval"""
    high: float
    runs: int

    def __call__(self, flops: np.ndarray) -> np.ndarray:
        """The loss at a number of FLOPs."""
        return self.amplitude * np.asarray(flops) ** -self.exponent

    @property
    def stderr(self) -> float:
        """Standard error of the exponent."""
        return (self.high - self.low) / 2 / quantile(self.runs - 2)

    def steeper_by(self, other: "PowerLaw") -> tuple[float, float, float]:
        """How much larger its exponent is than the ``other``'s, with the 95 % interval of that.

        Welch's: sqrt(s1^2 + s2^2) times Student's t quantile for Satterthwaite's degrees of
        freedom.
        """
        mine, theirs = self.stderr**2, other.stderr**2
        freedom = (mine + theirs) ** 2 / (mine**2 / (self.runs - 2) + theirs**2 / (other.runs - 2))
        difference = self.exponent - other.exponent
        margin = quantile(freedom) * math.sqrt(mine + theirs)
        return difference, difference - margin, difference + margin


def quantile(freedom: float) -> float:
    """Student's t that the two-sided 95 % interval reaches to."""
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def fit_power_law(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit L = a C^-b (Kaplan et al., arXiv 2001.08361) by a line through (log C, log L).

    b's interval is the standard error of the slope times Student's t quantile for n - 2 degrees of
    freedom; it takes runs as independent. Needs three points at two different FLOPs or more.
    """
    assert len(flops) >= LEAST_RUNS
    line = linregress(np.log(flops), np.log(losses))
    margin = quantile(len(flops) - 2) * float(line.stderr)
    exponent = -float(line.slope)
    amplitude = math.exp(line.intercept)
    return PowerLaw(amplitude, exponent, exponent - margin, exponent + margin, len(flops))


def verdict(name: str, law: PowerLaw, baseline_name: str, baseline: PowerLaw) -> str:
    """One plain sentence on whether ``law`` is steeper than ``baseline``."""
    difference, low, high = law.steeper_by(baseline)
    told = (
        f"exponents {law.exponent:.3f} and {baseline.exponent:.3f}, "
        f"difference {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    )
    if low <= 0 <= high:
        return f"{name} is not seen to be steeper than {baseline_name}: {told}."
    return f"{name} is {'steeper' if difference > 0 else 'flatter'} than {baseline_name}: {told}."
