"""The statistics of all targets over one window of updates."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one target in one window. W_ref is the weight at the start of the window.

    Effective ranks, leading singular values and kept energies are filled in exact mode only. The
    stability of the bases is filled only if it was asked for.
    """

    weight_norm: float
    """||W||_F"""
    update_norm: float
    """||W - W_ref||_F; a rotation at constant norm counts too"""
    weight_stable_rank: float
    """||W||_F^2 / ||W||_2^2"""
    update_stable_rank: float
    """stable rank of W - W_ref; 0 if nothing moved"""
    grad_norm: float
    """norm of the window's last gradient, as the optimizer saw it; NaN if there is none"""
    weight_effective_rank: float | None = None
    update_effective_rank: float | None = None
    weight_singular_values: tuple[float, ...] = ()
    update_singular_values: tuple[float, ...] = ()
    update_kept_energies: tuple[float, ...] = ()
    """||D v_i||^2 / ||D||_F^2 of the update D = W - W_ref, for the leading right singular vectors
    v_i of the window before. The sum of the first r is what an adapter with these rows keeps"""
    basis_stability: float | None = None
    """mean cosine between the columns of U V^T now and at the window's start, for W = U S V^T"""

    @property
    def relative_update_norm(self) -> float:
        """||W - W_ref||_F / ||W||_F; 0 of a weight that is zero and stays zero."""
        if self.weight_norm:
            return self.update_norm / self.weight_norm
        return math.inf if self.update_norm else 0.0

    @property
    def finite(self) -> bool:
        """Whether norms and stable ranks are numbers; there may be no gradient."""
        numbers = (
            self.weight_norm,
            self.update_norm,
            self.weight_stable_rank,
            self.update_stable_rank,
        )
        return all(map(math.isfinite, numbers))


@dataclass(frozen=True)
class Measurement:
    """The statistics of all targets at the end of one window."""

    num_updates: int
    epoch: float
    """epochs done; a fraction in the middle of an epoch"""
    train_loss: float
    """mean over the updates of the window"""
    layers: Mapping[str, LayerStats]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Measurement":
        """Return the measurement of which ``plain`` is ``dataclasses.asdict``."""
        layers = {name: LayerStats(**stats) for name, stats in plain["layers"].items()}
        return cls(**{**plain, "layers": layers})

    @property
    def not_finite(self) -> list[str]:
        """The targets of which a norm or a stable rank is no number."""
        return [name for name, stats in self.layers.items() if not stats.finite]

    def only(self, targets: Collection[str]) -> "Measurement":
        """Return the measurement of some of the targets."""
        layers = {}
        for name, stats in self.layers.items():
            if name in targets:
                layers[name] = stats
        return replace(self, layers=layers)
