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
    """lower end of the exponent's 95 % interval; ``high`` is its upper end"""
    high: float
    runs: int

    def __call__(self, flops: np.ndarray) -> np.ndarray:
        """Return the loss at ``flops`` FLOPs."""
        return self.amplitude * np.asarray(flops) ** -self.exponent

    @property
    def stderr(self) -> float:
        """Standard error of the exponent."""
        return (self.high - self.low) / 2 / quantile(self.runs - 2)

    def band(self, at: np.ndarray, flops: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Return the 95 % interval of the fitted loss ``at`` FLOPs; it was fitted to ``flops``.

        It is the confidence band of the line through (log C, log L).
        """
        logs = np.log(flops)
        spread = np.sum((logs - logs.mean()) ** 2)
        away = (np.log(at) - logs.mean()) ** 2
        stderr = self.stderr * np.sqrt(spread / self.runs + away)
        factor = np.exp(quantile(self.runs - 2) * stderr)
        return self(at) / factor, self(at) * factor

    def steeper_by(self, other: "PowerLaw") -> tuple[float, float, float]:
        """Return how much larger its exponent is than the ``other``'s, with a 95 % interval.

        The interval is Welch's. Its half width is sqrt(s1^2 + s2^2) times Student's t quantile for
        Satterthwaite's degrees of freedom.
        """
        mine = self.stderr**2
        theirs = other.stderr**2
        spread = mine**2 / (self.runs - 2) + theirs**2 / (other.runs - 2)
        freedom = (mine + theirs) ** 2 / spread
        difference = self.exponent - other.exponent
        margin = quantile(freedom) * math.sqrt(mine + theirs)
        return difference, difference - margin, difference + margin


def quantile(freedom: float) -> float:
    """Return Student's t at the end of the two-sided 95 % interval."""
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def fit_power_law(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit L = a C^-b (Kaplan et al., arXiv 2001.08361) by a line through (log C, log L).

    The half width of b's interval is the standard error of the slope times Student's t quantile
    for n - 2 degrees of freedom. It assumes independent runs. At least three points are needed,
    at two or more different numbers of FLOPs.
    """
    assert len(flops) >= LEAST_RUNS
    line = linregress(np.log(flops), np.log(losses))
    exponent = -float(line.slope)
    margin = quantile(len(flops) - 2) * float(line.stderr)
    return PowerLaw(
        amplitude=math.exp(line.intercept),
        exponent=exponent,
        low=exponent - margin,
        high=exponent + margin,
        runs=len(flops),
    )


def verdict(name: str, law: PowerLaw, baseline_name: str, baseline: PowerLaw) -> str:
    """Return one sentence that says whether ``law`` is steeper than ``baseline``."""
    difference, low, high = law.steeper_by(baseline)
    told = (
        f"exponents {law.exponent:.3f} and {baseline.exponent:.3f}, "
        f"difference {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    )
    if low <= 0 <= high:
        return f"{name} is not seen to be steeper than {baseline_name}: {told}."
    how = "steeper" if difference > 0 else "flatter"
    return f"{name} is {how} than {baseline_name}: {told}."
