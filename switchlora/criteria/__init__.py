"""When to switch: criteria are pure functions of the history of measurements."""

from switchlora.criteria.basic import (
    LOSS,
    AllOf,
    AnyOf,
    AtEpoch,
    LossPlateau,
    SwitchCriterion,
    UpdateNorm,
    Verdict,
    at_start,
    never,
)
from switchlora.criteria.prelora import PreLoRA
from switchlora.criteria.spectra import BasisStability, StableRank

__all__ = [
    "AllOf",
    "AnyOf",
    "AtEpoch",
    "BasisStability",
    "LOSS",
    "LossPlateau",
    "PreLoRA",
    "StableRank",
    "SwitchCriterion",
    "UpdateNorm",
    "Verdict",
    "at_start",
    "never",
]
