"""Bugs of published code, to compare with."""

from dataclasses import dataclass

from switchlora.policy.policy import SwitchPolicy


@dataclass(frozen=True)
class SkippingPolicy(SwitchPolicy):
    """Skip the rest of the epoch after the joint phase, as PreLoRA's public code does."""

    def after_joint_phase(self, position: int, batches: int) -> int:
        """Return the end of the epoch."""
        return batches
