"""The policy of a switch: when it happens, which targets it takes, and what follows it."""

from switchlora.policy.growth import InRank as InRank
from switchlora.policy.guard import (
    Guard as Guard,
    Loss as Loss,
    Standing as Standing,
    extrapolate as extrapolate,
)
from switchlora.policy.policy import (
    RESIDUAL_DTYPES as RESIDUAL_DTYPES,
    Decision as Decision,
    SwitchPolicy as SwitchPolicy,
    decisions as decisions,
)
from switchlora.policy.published import SkippingPolicy as SkippingPolicy
from switchlora.policy.stages import (
    Refresh as Refresh,
    Restart as Restart,
    Stages as Stages,
)
