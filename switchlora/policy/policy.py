"""What a switch is made of: when, of what, to what ranks, from which start, and what follows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import skip_init

from switchlora.adapters import (
    DEFAULT_TARGETS,
    FACTORS,
    AdaptedLinear,
    Adapter,
    Target,
    adapted_linear,
    find_targets,
    scaling_one,
)
from switchlora.criteria import SwitchCriterion, Verdict
from switchlora.errors import check_choice, check_patterns, check_range
from switchlora.initializers import AdapterInit
from switchlora.monitor import Measurement
from switchlora.policy.guard import Guard
from switchlora.policy.stages import Restart, Stages
from switchlora.ranks import RankPolicy

AdapterFactory = Callable[[nn.Linear, Mapping[str, Adapter]], AdaptedLinear]
RESIDUAL_DTYPES = {"bf16": torch.bfloat16}


def sample_of(make: AdapterFactory) -> AdaptedLinear:
    """A small module as ``make`` makes them."""
    adapter = Adapter(torch.zeros(1, 2), torch.zeros(2, 1), slice(0, 2), 1.0)
    return make(skip_init(nn.Linear, 2, 2), {"": adapter})  # draws no random numbers


def check_adapter(policy: "SwitchPolicy") -> None:
    """ValueError for options that an adapter which stands instead of its weight has no use for."""
    kind = sample_of(policy.adapter).kind
    if kind == AdaptedLinear.kind:
        if policy.least_gain is not None:
            raise ValueError(
                "switch.least_gain measures factors in place of weights: use "
                "switch/adapter=factorized"
            )
        return
    refused = {
        "joint_epochs": policy.joint_epochs and kind != "guided",
        "stages": policy.stages and kind == "guided",
        "restart": policy.restart,
        "split_qkv": policy.split_qkv,
        "residual_dtype": policy.residual_dtype,
        "guard.act=ranks": policy.guard and policy.guard.act == "ranks",
    }
    for name, asked in refused.items():
        if asked:
            raise ValueError(
                f"switch/adapter={kind} keeps no residual weight, so it does not go with "
                f"switch.{name}"
            )
    if kind == "guided" and not policy.joint_epochs:
        raise ValueError(
            "switch/adapter=guided fades its dense weight out in the joint phase: give "
            "switch.joint_epochs"
        )


@dataclass(frozen=True)
class SwitchPolicy:
    """When to switch, with what, and what goes on training.

    ``earliest`` and ``latest`` bound, in updates, when the criterion may fire. ``keep`` names the
    parameters besides the factors that go on training (regular expressions; target weights never
    do). ``moments`` says what the new optimizer inherits: 'surviving' tensors' state, that plus
    its projection onto the 'factors', or nothing ('reset').
    """

    criterion: SwitchCriterion
    rank: RankPolicy
    init: AdapterInit
    scaling: Callable[[int], float] = scaling_one
    adapter: AdapterFactory = adapted_linear
    """what a target becomes: factors beside its residual weight, or instead of it"""
    targets: Sequence[str] = DEFAULT_TARGETS
    split_qkv: bool = False
    keep: Sequence[str] = (".*",)
    earliest: int = 0
    latest: int | None = None
    joint_epochs: float = 0.0
    """epochs in which weights and factors train together before the weights are frozen"""
    skip_rest_of_epoch: bool = False
    """after the joint phase: a published bug of PreLoRA's, to compare with"""
    stages: Stages | None = None
    restart: Restart | None = None
    guard: Guard | None = None
    moments: str = "surviving"
    remove_weight_decay: bool = False
    """take decoupled weight decay's share out of the recent update"""
    max_drift: float = 1e-3
    """largest logit change that is accepted, where a residual weight keeps the function; a larger
    one undoes the switch"""
    least_gain: float | None = None
    """how many times faster than a target its factors must be, measured at the switch with the
    batch's shapes, if it is not to stay as it is"""
    train_factors: Sequence[str] = FACTORS
    """which factors train; with [B], A stays where the switch put it, and no layer keeps its
    inputs for the backward pass"""
    dropout: float = 0.0
    """of an adapter's inputs while it trains"""
    residual_dtype: str | None = None
    """'bf16' halves the bytes of the frozen residual weights; their rounding moves the logits. Not
    for starts at B = 0: a bf16 sum of the two would lose the adapter's first small steps"""
    freeze: Sequence[str] = ()
    """what stops training without an adapter: regular expressions, searched in the names of
    parameters and targets, of whose modules the biases stop too; a frozen front of a model costs
    no backward pass"""

    def __post_init__(self) -> None:
        check_choice("switch.moments", self.moments, ("surviving", "factors", "reset"))
        check_patterns("switch.targets", self.targets)
        check_patterns("switch.keep", self.keep)
        check_patterns("switch.freeze", self.freeze)
        check_range("switch.joint_epochs", self.joint_epochs, 0)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"switch.dropout is {self.dropout}: give a share from 0 to below 1")
        if self.residual_dtype is not None:
            check_choice("switch.residual_dtype", self.residual_dtype, tuple(RESIDUAL_DTYPES))
        if "B" not in self.train_factors or set(self.train_factors) - set(FACTORS):
            raise ValueError(
                f"switch.train_factors is {list(self.train_factors)}: give [A, B] or [B]"
            )
        if self.latest is not None and self.latest < self.earliest:
            raise ValueError(
                f"switch.latest {self.latest} is before switch.earliest {self.earliest}"
            )
        for one, other in (("stages", "joint_epochs"), ("stages", "restart")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"switch.{one} does not go with switch.{other}: leave one out")
        if self.skip_rest_of_epoch and not self.joint_epochs:
            raise ValueError(
                "switch.skip_rest_of_epoch needs switch.joint_epochs, after which it is"
            )
        if self.least_gain is not None:
            check_range("switch.least_gain", self.least_gain, 0)
        check_adapter(self)

    @property
    def keeps_residual(self) -> bool:
        """Whether factors stand beside a residual weight, which keeps the function."""
        return sample_of(self.adapter).kind == AdaptedLinear.kind

    def find_targets(self, model: nn.Module) -> dict[str, Target]:
        """Targets of this policy in ``model``."""
        return find_targets(model, self.targets, self.split_qkv)

    def decide(self, history: Sequence[Measurement], again: bool = False) -> Verdict:
        """The criterion's verdict, held back outside the earliest and latest update.

        ``again`` asks the guard's criterion, if it has one: after a switch was taken back.
        """
        own = self.guard.criterion if again and self.guard else None
        verdict = (own or self.criterion)(history)
        done = history[-1].num_updates if history else 0
        if verdict.fires and done < self.earliest:
            why = f"waits for switch.earliest={self.earliest}, at update {done}: {verdict.reason}"
            return Verdict(False, verdict.margins, why)
        if verdict.fires and self.latest is not None and done > self.latest:
            why = f"too late, switch.latest={self.latest} is past: {verdict.reason}"
            return Verdict(False, verdict.margins, why)
        return verdict

    def chosen(
        self,
        verdict: Verdict,
        waiting: Mapping[str, Target],
        num_updates: int,
        last_stage: int | None,
    ) -> list[str]:
        """The targets that switch after this verdict: all, none, or those of a stage."""
        if verdict.fires:
            return list(waiting)
        if self.stages is None or not self._may_switch(num_updates):
            return []
        since = num_updates if last_stage is None else num_updates - last_stage
        return self.stages.ready(verdict.margins, waiting, since)

    def _may_switch(self, num_updates: int) -> bool:
        late = self.latest is not None and num_updates > self.latest
        return num_updates >= self.earliest and not late
