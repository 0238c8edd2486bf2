"""Measure how far each weight moves, and in how many directions."""

from switchlora.monitor.measurement import (
    LayerStats as LayerStats,
    Measurement as Measurement,
)
from switchlora.monitor.monitor import UpdateMonitor as UpdateMonitor
from switchlora.monitor.spectral import (
    captured_energy as captured_energy,
    effective_rank as effective_rank,
    energies as energies,
    polar_factor as polar_factor,
    spectral_norm as spectral_norm,
    stable_rank as stable_rank,
    truncated_svd as truncated_svd,
)
