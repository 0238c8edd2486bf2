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

    def overlaps(self, other: "PowerLaw") -> bool:
        """Whether the intervals of both exponents have a point in common."""
        return self.low <= other.high and other.low <= self.high


def fit_power_law(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit L = a C^-b (Kaplan et al., arXiv 2001.08361) by a line through (log C, log L).

    b's interval is the standard error of the slope times Student's t quantile for n - 2 degrees of
    freedom; it takes runs as independent. Needs three points at two different FLOPs or more.
    """
    assert len(flops) >= LEAST_RUNS
    line = linregress(np.log(flops), np.log(losses))
    margin = float(t.ppf((1 + CONFIDENCE) / 2, len(flops) - 2) * line.stderr)
    exponent = -float(line.slope)
    amplitude = math.exp(line.intercept)
    return PowerLaw(amplitude, exponent, exponent - margin, exponent + margin, len(flops))


def verdict(name: str, law: PowerLaw, baseline_name: str, baseline: PowerLaw) -> str:
    """One plain sentence on whether ``law`` is steeper than ``baseline``."""
    told = f"95 % intervals of the exponents, {law.exponent:.3f} against {baseline.exponent:.3f},"
    if law.overlaps(baseline):
        return f"{name} is not seen to be steeper than {baseline_name}: the {told} overlap."
    direction = "steeper" if law.exponent > baseline.exponent else "flatter"
    return f"{name} is {direction} than {baseline_name}: the {told} do not overlap."
