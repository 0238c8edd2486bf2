r"""Learning rates with which factors move the weight as far as full training did.

An update of full training changes each entry of W by about eta u. Here eta is the learning rate
and u the size of the optimizer's step. An update of the factors changes the effective weight by

    dW = s (dB A + B dA).

**Steps of one size** (Adam, AdamW, Lion): u hardly depends on the size of the gradient. An entry
of s dB A is a sum of r terms eta_B u A_kj whose signs hardly agree. Its root mean square is
s eta_B u ||A||_F / sqrt(in). This is c eta u where

    eta_B / eta = c sqrt(in) / (s ||A||_F),        eta_A / eta = c sqrt(out) / (s ||B||_F).

**Steps in proportion to the gradient** (SGD): here s dB A = -eta_B s^2 G A^T A. The mean
eigenvalue of A^T A on the row space of A is ||A||_F^2 / r. So the step is c times that of full
training, projected onto this space, where

    eta_B / eta = c r / (s ||A||_F)^2,             eta_A / eta = c r / (s ||B||_F)^2.

Where both factors move W, their steps add up like independent ones: c becomes c / sqrt(2). Where
B = 0, a step of A does not move W. A then has the rate of B, as in LoRA.

Norms are those of the factors when they were put on. Rates stay until new factors come.

Rows of A of norm sqrt(1/3) and B = 0 give eta_B / eta = c sqrt(3 in / r) / s. That the best rate
of LoRA falls with the rank at s = 1 is derived by Chen, Villar & Hayou (arXiv 2602.06204). That it
is about ten times the best rate of full training is reported by Schulman et al. ("LoRA Without
Regret", 2025).
"""

import math
from typing import NamedTuple

from switchlora.adapters import Adapter, Norms

PER_OCTAVE = 4


class Scales(NamedTuple):
    """The learning rates of A and B, relative to that of the weights."""

    A: float
    B: float


def matched_scales(adapter: Adapter, norms: Norms, proportional: bool, step: float) -> Scales:
    """Return the rates of the factors of one adapter, by the equations of this module.

    ``norms`` are ||A||_F and ||B||_F when the factors were put on. ``proportional`` says whether
    the optimizer's steps are in proportion to the gradient. ``step`` is c.
    """
    A, B, _, s = adapter
    rank, in_features = A.shape
    out_features = len(B)
    if norms.A and norms.B and A.requires_grad and B.requires_grad:
        step /= math.sqrt(2)
    of_A = of_B = 0.0
    if proportional:
        if norms.B:
            of_A = step * rank / (s * norms.B) ** 2
        if norms.A:
            of_B = step * rank / (s * norms.A) ** 2
    else:
        if norms.B:
            of_A = step * math.sqrt(out_features) / (s * norms.B)
        if norms.A:
            of_B = step * math.sqrt(in_features) / (s * norms.A)
    return Scales(_rounded(of_A or of_B), _rounded(of_B or of_A))


def _rounded(scale: float) -> float:
    """Return the nearest of the powers of 2^(1/4), or 1 for a scale of 0.

    Factors of the same scale share a parameter group. An update then needs few kernels.

    >>> _rounded(9.0) == _rounded(10.0)
    True
    """
    if not scale:
        return 1.0
    return 2 ** (round(PER_OCTAVE * math.log2(scale)) / PER_OCTAVE)
