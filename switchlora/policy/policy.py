"""The switch policy: when to switch, which targets, to which ranks, from which factors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from switchlora.adapters import (
    CODES,
    DEFAULT_TARGETS,
    FACTORS,
    AdaptedLinear,
    Adapter,
    Target,
    adapted_linear,
    find_targets,
    made_class,
    scaling_one,
)
from switchlora.criteria import AllOf, AnyOf, PredictedCost, SwitchCriterion, Verdict
from switchlora.errors import check_choice, check_patterns, check_range
from switchlora.initializers import AdapterInit, update_directions
from switchlora.monitor import Measurement
from switchlora.names import some
from switchlora.policy.growth import InRank
from switchlora.policy.guard import Guard
from switchlora.policy.stages import Refresh, Restart, Stages
from switchlora.ranks import Budget, RankPolicy

AdapterFactory = Callable[[nn.Linear, Mapping[str, Adapter]], AdaptedLinear]
RESIDUAL_DTYPES = {"bf16": torch.bfloat16, **CODES}


def check_adapter(policy: "SwitchPolicy") -> None:
    """Raise ValueError for options that the adapter of ``policy`` cannot use.

    - Adapters beside a residual weight (LoRA) have no use for ``least_gain``.
    - Adapters that replace their weight have no use for options that need a residual weight, such
      as ``restart``. Their row slices switch together, and none is frozen alone.
    - Guided adapters also need a joint phase.
    """
    kind = made_class(policy.adapter).kind
    if isinstance(policy.restart, Refresh) and kind != "core":
        raise ValueError(
            f"switch/restart=oialr turns the bases of a core, and switch/adapter={kind} has none: "
            "use switch/adapter=core"
        )
    if kind == "core" and list(policy.trained_factors) != ["B"]:
        raise ValueError(
            "switch/adapter=core trains the core between two frozen bases: give "
            "switch.train_factors=[B]"
        )
    if policy.growth and kind not in ("lora", "factorized"):
        raise ValueError(f"switch/adapter={kind} does not go with switch.growth: use lora")
    if policy.keeps_residual:
        if kind == "switchlora":
            _refuse_with_switchlora(policy)
        if policy.least_gain is not None:
            raise ValueError(
                "switch.least_gain measures factors in place of weights: use "
                "switch/adapter=factorized"
            )
        return
    if policy.split_qkv and policy.stages:
        raise ValueError(
            f"switch/adapter={kind} keeps no residual weight, so q, k and v of a fused qkv switch "
            "together: leave out switch.split_qkv or switch.stages"
        )
    refused = {
        "joint_epochs": policy.joint_epochs and kind != "guided",
        "stages": policy.stages and kind == "guided",
        "restart": isinstance(policy.restart, Restart),
        "split_qkv": policy.split_qkv and kind != "factorized",
        "moments=factors": policy.moments == "factors" and kind == "core",
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


def with_share(criterion: SwitchCriterion, rank: RankPolicy) -> SwitchCriterion:
    """Return ``criterion``; what predicts a cost, alone or joined, gets a ``Budget``'s share."""
    if isinstance(criterion, AllOf | AnyOf):
        return replace(criterion, criteria=[with_share(each, rank) for each in criterion.criteria])
    if not isinstance(criterion, PredictedCost) or criterion.share is not None:
        return criterion
    return replace(criterion, share=rank.share if isinstance(rank, Budget) else None)


def _refuse_with_switchlora(policy: "SwitchPolicy") -> None:
    """Raise ValueError for options that do not go with single vectors that are switched."""
    refused = {
        "joint_epochs": policy.joint_epochs,
        "stages": policy.stages,
        "split_qkv": policy.split_qkv,
        "residual_dtype": policy.residual_dtype,
    }
    for name, asked in refused.items():
        if asked:
            raise ValueError(f"switch/adapter=switchlora does not go with switch.{name}")


@dataclass(frozen=True)
class SwitchPolicy:
    """When to switch, with which adapters, and which parameters go on training.

    - ``earliest``, ``latest``: the updates between which the criterion may fire.
    - ``keep``: regular expressions for the parameters that go on training beside the factors.
      Target weights never do.
    - ``moments``: what the new optimizer inherits. 'surviving': the state of tensors that still
      train. 'factors': that, and the projection of the weights' state onto the factors. 'reset':
      nothing.
    """

    criterion: SwitchCriterion
    rank: RankPolicy
    init: AdapterInit
    scaling: Callable[[int], float] = scaling_one
    adapter: AdapterFactory = adapted_linear
    """makes the adapted linear: factors beside the residual weight, or instead of the weight"""
    targets: Sequence[str] = DEFAULT_TARGETS
    split_qkv: bool = False
    keep: Sequence[str] = (".*",)
    earliest: int = 0
    latest: int | None = None
    joint_epochs: float = 0.0
    """epochs in which weights and factors train together; then the weights are frozen"""
    stages: Stages | None = None
    restart: Restart | Refresh | None = None
    growth: InRank | None = None
    """the rule by which the ranks of the adapters grow"""
    guard: Guard | None = None
    moments: str = "surviving"
    remove_weight_decay: bool = False
    """remove the share of decoupled weight decay from the recent update"""
    max_drift: float = 1e-3
    """largest accepted change of a logit, for adapters with a residual weight; a larger change
    undoes the switch"""
    least_gain: float | None = None
    """least speed-up of the factors over the target; a target with less stays as it is. It is
    measured at the switch with the shapes of the batch"""
    train_factors: Sequence[str] | None = None
    """factors that train; None: those of the start, see ``trained_factors``. With [B], A stays as
    the switch set it, and no layer keeps its inputs for the backward pass"""
    dropout: float = 0.0
    """dropout rate of an adapter's inputs in training"""
    residual_dtype: str | None = None
    """'bf16' halves the bytes of the frozen residual weights, and 'int8', 'fp8' and 'nf4' quantise
    them once, when they freeze. Rounding them moves the logits. 'bf16' does not go with a start at
    B = 0: a bf16 sum would lose the adapter's first small steps"""
    max_rounding_drift: float = 1.0
    """largest accepted change of a logit by that rounding; a larger one undoes the switch"""
    freeze: Sequence[str] = ()
    """regular expressions, searched in the names of parameters and targets: these are frozen
    without an adapter. A module's bias stops when all its targets do. A frozen front of a model
    needs no backward pass"""

    def __post_init__(self) -> None:
        for part in ("criterion", "rank", "init", "scaling", "adapter"):
            if not callable(getattr(self, part)):
                raise ValueError(
                    f"switch.{part} is {getattr(self, part)!r}, which cannot be called: write "
                    f"switch/{part}=CHOICE"
                )
        check_choice("switch.moments", self.moments, ("surviving", "factors", "reset"))
        check_patterns("switch.targets", self.targets)
        check_patterns("switch.keep", self.keep)
        check_patterns("switch.freeze", self.freeze)
        check_range("switch.joint_epochs", self.joint_epochs, 0)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"switch.dropout is {self.dropout}: give a share from 0 to below 1")
        if self.residual_dtype is not None:
            check_choice("switch.residual_dtype", self.residual_dtype, tuple(RESIDUAL_DTYPES))
        if "B" not in self.trained_factors or set(self.trained_factors) - set(FACTORS):
            raise ValueError(
                f"switch.train_factors is {list(self.trained_factors)}: give [A, B] or [B]"
            )
        check_range("switch.max_rounding_drift", self.max_rounding_drift, 0)
        if self.quantises and isinstance(self.restart, Restart):
            raise ValueError(
                f"switch.residual_dtype={self.residual_dtype} does not go with switch.restart: "
                "what a restart merges is smaller than a step of the codes, and would be lost"
            )
        if self.latest is not None and self.latest < self.earliest:
            raise ValueError(
                f"switch.latest={self.latest} is before switch.earliest={self.earliest}"
            )
        for one, other in (
            ("stages", "joint_epochs"),
            ("stages", "restart"),
            ("growth", "restart"),
        ):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"switch.{one} does not go with switch.{other}: leave one out")
        if self.least_gain is not None:
            check_range("switch.least_gain", self.least_gain, 0)
        check_adapter(self)
        object.__setattr__(self, "criterion", with_share(self.criterion, self.rank))

    @property
    def keeps_residual(self) -> bool:
        """Whether the adapter keeps a residual weight; the switch then keeps the function."""
        return made_class(self.adapter).keeps_residual

    @property
    def trained_factors(self) -> Sequence[str]:
        """The factors that train: ``train_factors``, or those of the start.

        From ``update_directions`` B alone trains beside the frozen weight. A spans the directions
        of recent updates, and stays. LoRA-FA (arXiv 2308.03303) does so from a random A. Of a
        core, B alone trains from any start. Else both factors train.
        """
        if self.train_factors is not None:
            return self.train_factors
        kind = made_class(self.adapter).kind
        B_alone = kind == "core" or kind == "lora" and self.init is update_directions
        return ("B",) if B_alone else FACTORS

    @property
    def quantises(self) -> bool:
        """Whether frozen residual weights become codes of 8 or 4 bits."""
        return self.residual_dtype in CODES

    @property
    def must_save(self) -> bool:
        """Whether a target stays full when its adapter would save no parameters."""
        return made_class(self.adapter).must_save

    def find_targets(self, model: nn.Module) -> dict[str, Target]:
        """Return the targets of this policy in ``model``, by name."""
        return find_targets(model, self.targets, self.split_qkv)

    def decide(self, history: Sequence[Measurement], again: bool = False) -> Verdict:
        """Return the criterion's verdict; it never fires before ``earliest`` or after ``latest``.

        It does not fire either when a number of the last measurement is not finite.

        Set ``again`` after a switch was taken back: the guard's criterion, if any, then decides.
        """
        if history and (lost := history[-1].not_finite):
            return Verdict(False, {}, f"what is measured of {some(lost)} is not finite")
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
        """Return the targets that switch after ``verdict``, of those in ``waiting``.

        - All of them when the verdict fires.
        - Those of the next stage, if the policy has stages and ``num_updates`` is in its bounds.
        - None otherwise.

        ``last_stage`` is the update of the stage before (None: there was none).
        """
        if verdict.fires:
            return list(waiting)
        if self.stages is None or not self._may_switch(num_updates):
            return []
        since = num_updates if last_stage is None else num_updates - last_stage
        return self.stages.ready(verdict.margins, waiting, since)

    def after_joint_phase(self, position: int, batches: int) -> int:
        """Return where the epoch goes on after the joint phase, which ended at ``position``.

        Both count batches; an epoch has ``batches`` of them.
        """
        return position

    def _may_switch(self, num_updates: int) -> bool:
        late = self.latest is not None and num_updates > self.latest
        return num_updates >= self.earliest and not late


class Decision(NamedTuple):
    """What a policy says after ``num_updates`` updates: a verdict, and the targets to switch."""

    num_updates: int
    verdict: Verdict
    chosen: list[str]

    @property
    def reason(self) -> str:
        """Why targets switch, or what holds them back."""
        if self.chosen and not self.verdict.fires:
            return f"{len(self.chosen)} targets have converged alone"
        return self.verdict.reason


def decisions(
    policy: SwitchPolicy, history: Sequence[Measurement], targets: Mapping[str, Target]
) -> Iterator[Decision]:
    """Yield what a run with ``policy`` decides on a history, until something switches.

    The first decision comes before the first update, the others after each measurement. A stage
    of some ``targets`` is a switch too: what a run measures after it, the history does not tell.
    """
    for known in range(len(history) + 1):
        done = history[known - 1].num_updates if known else 0
        verdict = policy.decide(history[:known])
        chosen = policy.chosen(verdict, targets, done, None)
        yield Decision(done, verdict, chosen)
        if verdict.fires or chosen:
            return
