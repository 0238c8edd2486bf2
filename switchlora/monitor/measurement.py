"""What one window of updates measured of every target."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerStats:
    """One target in one window. W_ref is the weight at the start of the window.

    Effective ranks and leading singular values are filled in exact mode only, the stability of
    the bases only where it is asked for.
    """

    weight_norm: float
    """||W||_F"""
    update_norm: float
    """||W - W_ref||_F: a rotation at constant norm counts"""
    weight_stable_rank: float
    """||W||_F^2 / ||W||_2^2"""
    update_stable_rank: float
    """the same of W - W_ref; 0 where nothing moved"""
    grad_norm: float
    """of the last gradient of the window as the optimizer saw it; NaN where there is none"""
    weight_effective_rank: float | None = None
    update_effective_rank: float | None = None
    weight_singular_values: tuple[float, ...] = ()
    update_singular_values: tuple[float, ...] = ()
    basis_stability: float | None = None
    """mean cosine between the columns of U V^T, where W = U S V^T, and those of W_ref's"""

    @property
    def relative_update_norm(self) -> float:
        """||W - W_ref||_F / ||W||_F."""
        return self.update_norm / self.weight_norm if self.weight_norm else math.inf


@dataclass(frozen=True)
class Measurement:
    """All targets at the end of one window."""

    num_updates: int
    epoch: float
    """epochs done, a fraction in the middle of one"""
    train_loss: float
    """mean over the updates of the window"""
    layers: Mapping[str, LayerStats]

    def only(self, targets: Collection[str]) -> "Measurement":
        """The measurement of some of the targets."""
        return replace(self, layers={n: s for n, s in self.layers.items() if n in targets})
