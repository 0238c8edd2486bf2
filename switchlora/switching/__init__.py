"""What changes the model: the switch and what comes after it, all or nothing."""

from switchlora.switching.changes import SwitchReport, grow, restart, settle, switch, take_back
from switchlora.switching.plan import WHOLE, check_start, choose_ranks, with_frozen_front
from switchlora.switching.transaction import Outcome, trained_tensors

__all__ = [
    "Outcome",
    "SwitchReport",
    "WHOLE",
    "check_start",
    "choose_ranks",
    "grow",
    "restart",
    "settle",
    "switch",
    "take_back",
    "trained_tensors",
    "with_frozen_front",
]
