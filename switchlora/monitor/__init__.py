"""What measures: how far each weight moves, and in how many directions."""

from switchlora.monitor.measurement import LayerStats, Measurement
from switchlora.monitor.monitor import UpdateMonitor
from switchlora.monitor.spectral import (
    captured_energy,
    effective_rank,
    energies,
    spectral_norm,
    stable_rank,
    truncated_svd,
)

__all__ = [
    "LayerStats",
    "Measurement",
    "UpdateMonitor",
    "captured_energy",
    "effective_rank",
    "energies",
    "spectral_norm",
    "stable_rank",
    "truncated_svd",
]
