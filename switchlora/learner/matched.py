r"""Learning rates with which factors move the weight as far as full training did.

An update of the factors changes the effective weight by

    dW = s (dB A + B dA).

**Steps of one size** (Adam, AdamW, Lion): an update of full training changes each entry of W by
about eta u, whatever the gradient. Here eta is the learning rate and u the size of the optimizer's
step. The outputs for an input of norm 1 change by up to eta u sqrt(in), if the signs along a row
of dW agree. An update of B changes them by up to s eta_B u sqrt(r) ||A||_2, if the signs along a
row of dB agree. So the steps match where

    eta_B / eta = c kappa / (s sqrt(r) ||A||_2),    eta_A / eta = c kappa / (s sqrt(r) ||B||_2).

kappa was measured: it hardly grows with the width, and ``AGREEMENT`` is well below the unstable
values at widths 128, 320 and 384. At c = 1 the steps are 0.7 to 1.3 times as near Adam's edge of
stability (Cohen et al., arXiv 2207.14484) as those of full training (docs/results/rates.md).

**Steps in proportion to the gradient** (SGD): s dB A = -eta_B s^2 G A^T A. No direction moves
further than c times what full training moves it where

    eta_B / eta = c / (s ||A||_2)^2,            eta_A / eta = c / (s ||B||_2)^2.

Where both factors move W, their steps add up like independent ones: c becomes c / sqrt(2).

Where B = 0, a step of A does not move W. With steps of one size A then has c times the rate of the
weights. It starts as large as the weights of a new ``nn.Linear``, and moves as they do. With the
rate of B, as in LoRA, A grows, and the steps of B with it: at width 384 ||A||_2 was 3 to 9 times
as large after 130 updates, and the loss twice as high (docs/results/rates.md). That the rate of A
should be far below that of B is derived by Hayou, Ghosh & Yu (LoRA+, arXiv 2402.12354). SGD moves
A by little where B is small, so there A has the rate of B.

Norms are those of the factors when they were put on. Rates stay until new factors come.

Rows of A that are orthogonal and of norm sqrt(1/3), and B = 0, give about ten times the rate of
the weights at rank 12, and five times at rank 48. That the best rate of LoRA is about ten times
that of full training is reported by Schulman et al. ("LoRA Without Regret", 2025). That it falls
with the rank at s = 1 is derived by Chen, Villar & Hayou (arXiv 2602.06204).
"""

import math
from typing import NamedTuple

from switchlora.adapters import Adapter, Norms

PER_OCTAVE = 4
AGREEMENT = 20.0
"""kappa: how much further an output moves than an entry of the weight, in full training"""


class Scales(NamedTuple):
    """The learning rates of A and B, relative to that of the weights."""

    A: float
    B: float


def matched_scales(adapter: Adapter, norms: Norms, proportional: bool, step: float) -> Scales:
    """Return the rates of the factors of one adapter, by the equations of this module.

    ``norms`` are ||A||_2 and ||B||_2 when the factors were put on. ``proportional`` says whether
    the optimizer's steps are in proportion to the gradient. ``step`` is c.
    """
    A, B, _, s = adapter
    if norms.A and norms.B and A.requires_grad and B.requires_grad:
        step /= math.sqrt(2)

    def rate_beside(norm: float) -> float:
        """Return the rate beside a factor of this norm, or 0 beside one that is zero."""
        if not norm:
            return 0.0
        if proportional:
            return step / (s * norm) ** 2
        return step * AGREEMENT / (s * math.sqrt(len(A)) * norm)

    of_A, of_B = rate_beside(norms.B), rate_beside(norms.A)
    beside_zero = of_A or of_B if proportional else step
    return Scales(_rounded(of_A or beside_zero), _rounded(of_B or beside_zero))


def _rounded(scale: float) -> float:
    """Return the nearest of the powers of 2^(1/4), or 1 for a scale of 0.

    Factors of the same scale share a parameter group. An update then needs few kernels.

    >>> _rounded(9.0) == _rounded(10.0)
    True
    """
    if not scale:
        return 1.0
    return 2 ** (round(PER_OCTAVE * math.log2(scale)) / PER_OCTAVE)
