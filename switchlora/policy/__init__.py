"""What a switch is made of: when, of what, to what ranks, and what follows."""

from switchlora.policy.guard import Guard, Loss, Standing, extrapolate
from switchlora.policy.policy import RESIDUAL_DTYPES, SwitchPolicy
from switchlora.policy.stages import Restart, Stages

__all__ = [
    "Guard",
    "Loss",
    "RESIDUAL_DTYPES",
    "Restart",
    "Stages",
    "Standing",
    "SwitchPolicy",
    "extrapolate",
]
