"""What a run is in the middle of: counters, phase, history."""

from dataclasses import dataclass, field
from enum import StrEnum

from switchlora.monitor import Measurement


class Phase(StrEnum):
    """Which parameters train."""

    FULL = "full"
    ADAPTER = "adapter"


@dataclass
class TrainState:
    """The run's position; everything else is weights, moments or configuration."""

    num_updates: int = 0
    """optimizer updates made; the learning rate is a function of it"""
    epoch: int = 0
    phase: Phase = Phase.FULL
    history: list[Measurement] = field(default_factory=list)
    best_top1: float = 0.0
    """on the validation split, in %"""
    switch_update: int | None = None
    switch_epoch: float | None = None
    failed_switches: list[str] = field(default_factory=list)
    """reasons of the switches that were undone"""
    skipped_updates: int = 0
    """updates left out because loss or gradient was not finite"""
    skipped_in_a_row: int = 0
