"""The switch: from all parameters to low-rank adapters, all or nothing, in the same process."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchlora.criteria import SwitchCriterion, Verdict
from switchlora.distributed import agreed_checksum, from_primary, full, lost_rank, together
from switchlora.errors import SwitchFailed, check_choice, check_patterns, near
from switchlora.initializers import AdapterInit, Factors, empty_factors
from switchlora.layers import FACTORS, Adapter, scaling_one
from switchlora.learner import Learner, set_checkpointing
from switchlora.models import eval_mode
from switchlora.moments import factor_moments, load_moments, moments_of
from switchlora.monitor import Measurement, UpdateMonitor
from switchlora.ranks import RankPolicy, SwitchContext, saves_parameters
from switchlora.spectral import captured_energy
from switchlora.surgery import (
    Target,
    adapted_modules,
    applied_ranks,
    count_parameters,
    find_targets,
    frozen_outright,
    inject,
    kept_parameters,
    restore,
    round_residual,
    train_only,
)

RESIDUAL_DTYPES = {"bf16": torch.bfloat16}
DEFAULT_TARGETS = (
    r"attn\.(qkv|[qkv]_proj)",
    r"attn\.proj",
    r"mlp\.(fc1|fc1_[gx]|w12)",
    r"mlp\.(fc2|w3)",
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
    targets: Sequence[str] = DEFAULT_TARGETS
    split_qkv: bool = False
    keep: Sequence[str] = (".*",)
    earliest: int = 0
    latest: int | None = None
    moments: str = "surviving"
    remove_weight_decay: bool = False
    """take decoupled weight decay's share out of the recent update"""
    max_drift: float = 1e-3
    """largest logit change that is accepted; a larger one undoes the switch"""
    train_factors: Sequence[str] = FACTORS
    """which factors train; with [B], A stays where the switch put it, and no layer keeps its
    inputs for the backward pass"""
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

    def find_targets(self, model: nn.Module) -> dict[str, Target]:
        """Targets of this policy in ``model``."""
        return find_targets(model, self.targets, self.split_qkv)

    def decide(self, history: Sequence[Measurement]) -> Verdict:
        """The criterion's verdict, held back outside the earliest and latest update."""
        verdict = self.criterion(history)
        done = history[-1].num_updates if history else 0
        if verdict.fires and done < self.earliest:
            why = f"waits for switch.earliest={self.earliest}, at update {done}: {verdict.reason}"
            return Verdict(False, verdict.margins, why)
        if verdict.fires and self.latest is not None and done > self.latest:
            why = f"too late, switch.latest={self.latest} is past: {verdict.reason}"
            return Verdict(False, verdict.margins, why)
        return verdict


@dataclass(frozen=True)
class SwitchReport:
    """What the switch did."""

    ranks: Mapping[str, int]
    """applied rank per target; 0 is frozen without an adapter"""
    left_full: Sequence[str]
    """targets that stay as they are, since their rank would save nothing"""
    captured_energy: Mapping[str, float]
    """share of the recent update's energy in the adapter's row space; NaN where nothing moved"""
    drift: float
    """largest absolute change of a logit on the probe images, in float32"""
    rounding_drift: float | None
    """the same from keeping the residual weights in fewer bytes"""
    checksum: str
    """of all trained tensors, the same on all ranks"""
    moments_carried: int
    parameters: int
    """of the model before the switch, which adapters do not add to"""
    trainable_before: int
    trainable_after: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What the primary rank has chosen, on the CPU.

    Factors are contiguous: products of transposed ones would round in another way than those of
    the tensors that a checkpoint gives back.
    """

    ranks: dict[str, int]
    left_full: list[str]
    factors: dict[str, Factors]
    captured_energy: dict[str, float]


def switch(
    learner: Learner,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    history: Sequence[Measurement],
    probe: Tensor,
    rebuild: Callable[[nn.Module], Learner],
) -> tuple[Learner, SwitchReport]:
    """Replace the targets by adapters and the learner by ``rebuild(model)``; report on it.

    All or nothing, on all ranks: when anything raises on any of them, modules and flags are put
    back, the optimizer has not been touched, and SwitchFailed says why. The primary rank chooses
    ranks and factors. The global RNG is left where it was. ``probe`` (N, C, H, W) are the images
    on which the drift of the logits is measured, the same on all ranks. A sharded model is
    gathered and stays as it is.
    """
    begin = time.perf_counter()
    learner.optimizer.zero_grad(set_to_none=True)
    moments = {} if policy.moments == "reset" else _whole(learner)
    model = learner.plain()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    parameters, before = count_parameters(model), count_parameters(model, trainable=True)
    replaced: dict[str, nn.Linear] = {}
    with torch.random.fork_rng([probe.device] if probe.is_cuda else []):
        try:
            with together():
                logits = _logits(model, probe)
            plan = from_primary(lambda: make_plan(model, policy, monitor, history))
            with together():
                factors = _placed(plan.factors, model)
                replaced.update(inject(model, monitor.targets, factors, policy.scaling))
                assert applied_ranks(model, monitor.targets, factors) == plan.ranks
                train_only(model, _kept(model, policy, monitor, plan), policy.train_factors)
                adapted = _logits(model, probe)
                drift = _checked_drift(logits, adapted, policy.max_drift)
                rounding = _round_residuals(model, policy, adapted, probe)
            after = count_parameters(model, trainable=True)
            checksum = agreed_checksum(trained_tensors(model))
            adapters = _snapshot(model)
            new = rebuild(model)
            with together():
                carried = _carry(policy.moments, moments, adapters, learner, new)
        except BaseException as error:
            restore(model, replaced)
            set_checkpointing(model, learner.recipe.activation_checkpointing)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[name])
            if isinstance(error, Exception) and lost_rank(error) is None:
                raise SwitchFailed(f"{type(error).__name__}: {error}") from error
            raise
    return new, SwitchReport(
        ranks=plan.ranks,
        left_full=plan.left_full,
        captured_energy=plan.captured_energy,
        drift=drift,
        rounding_drift=rounding,
        checksum=checksum,
        moments_carried=carried,
        parameters=parameters,
        trainable_before=before,
        trainable_after=after,
        seconds=time.perf_counter() - begin,
    )


def make_plan(
    model: nn.Module,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    history: Sequence[Measurement],
) -> Plan:
    """Ranks and factors of every target, from the recent updates of ``model``, a plain one."""
    ranks, left_full = choose_ranks(model, policy, monitor, history)
    updates = monitor.updates(policy.remove_weight_decay, of=model)
    factors, captured = {}, {}
    for name, rank in ranks.items():
        weight, update = monitor.targets[name].weight(model), updates[name]
        s = policy.scaling(rank)
        chosen = policy.init(weight / s, update / s, rank) if rank else empty_factors(weight)
        check_start(policy, name, chosen)
        factors[name] = Factors(*(factor.cpu().contiguous() for factor in chosen))
        captured[name] = captured_energy(update, chosen.A) if rank else 0.0
    return Plan(ranks, left_full, factors, captured)


def check_start(policy: SwitchPolicy, name: str, factors: Factors) -> None:
    """ValueError for an adapter at B = 0 beside a residual weight that is rounded.

    W_res lies on the grid of bf16 numbers, so W_res + s B A is rounded back to it as long as the
    adapter is smaller than half a step of the grid, and its first updates would do nothing.
    """
    if policy.residual_dtype is not None and len(factors.A) and not factors.B.any():
        raise ValueError(
            f"switch.residual_dtype={policy.residual_dtype} does not go with a start at B = 0, "
            f"as {name} has: use switch/init=update_svd or residual_dtype=null"
        )


def choose_ranks(
    model: nn.Module,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    history: Sequence[Measurement],
) -> tuple[dict[str, int], list[str]]:
    """Rank per target to switch, and the targets left full because their rank saves nothing.

    A fused module switches whole: one row slice that saves nothing leaves all of it full.
    """
    kept = _kept(model, policy, monitor)
    _, frozen = frozen_outright(model, monitor.targets, policy.freeze)
    targets = {name: t for name, t in monitor.targets.items() if name not in frozen}
    context = SwitchContext(
        [measured.only(targets) for measured in history],
        monitor.updates(policy.remove_weight_decay, of=model).only(targets),
        monitor.initial_stable_ranks,
        total_parameters=count_parameters(model),
        other_trainable=sum(parameter.numel() for parameter in kept.values()),
        train_factors=policy.train_factors,
    )
    if not targets:
        raise ValueError("switch.freeze leaves no target, so nothing would adapt: freeze fewer")
    wanted = policy.rank(context)
    if odd := sorted(set(wanted) ^ set(targets)):
        raise ValueError(
            f"the rank policy must give each target a rank, but '{odd[0]}' is "
            f"{'missing' if odd[0] in targets else 'no target'}; {near(odd[0], targets)}"
        )
    if not any(wanted.values()):
        raise ValueError("every rank is 0, so nothing would adapt: choose larger ranks")
    useless = {
        targets[name].module
        for name, rank in wanted.items()
        if not saves_parameters(rank, targets[name].weight(model).shape)
    }
    left_full = [name for name in wanted if targets[name].module in useless]
    for name in frozen:
        if (module := monitor.targets[name].module) in useless:
            raise ValueError(
                f"switch.freeze freezes {name}, but {module} stays full, since ranks this large "
                "save nothing: lower the ranks, or freeze all of it"
            )
    if len(left_full) == len(wanted):
        raise ValueError("no rank saves parameters on any target: choose smaller ranks")
    ranks = {n: r for n, r in wanted.items() if n not in left_full} | dict.fromkeys(frozen, 0)
    return {n: ranks[n] for n in monitor.targets if n in ranks}, left_full


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that train, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _whole(learner: Learner) -> dict[str, dict[str, object]]:
    """Moments by name; sharded ones whole and on the CPU, one at a time on the device."""
    return {
        name: {k: full(v).cpu() if isinstance(v, DTensor) else v for k, v in state.items()}
        for name, state in moments_of(learner.model, learner.optimizer).items()
    }


def _snapshot(model: nn.Module) -> dict[str, dict[str, Adapter]]:
    """The adapters where they are now: sharding moves the parameters themselves."""
    return {
        name: {
            part: a._replace(A=a.A.detach(), B=a.B.detach())
            for part, a in module.adapters().items()
        }
        for name, module in adapted_modules(model).items()
    }


def _placed(factors: Mapping[str, Factors], model: nn.Module) -> dict[str, Factors]:
    device = next(model.parameters()).device
    return {name: Factors(A.to(device), B.to(device)) for name, (A, B) in factors.items()}


def _kept(
    model: nn.Module, policy: SwitchPolicy, monitor: UpdateMonitor, plan: Plan | None = None
) -> dict[str, nn.Parameter]:
    """What trains on besides the factors: with no plan yet, no target's weight is among it."""
    targets = monitor.targets
    full_modules = {targets[name].module for name in plan.left_full} if plan else set()
    patterns = [*policy.keep, *(rf"^{re.escape(module)}\." for module in sorted(full_modules))]
    adapted = {target.module for target in targets.values()} - full_modules
    frozen, _ = frozen_outright(model, targets, policy.freeze)
    kept = kept_parameters(model, adapted, patterns)
    return {name: parameter for name, parameter in kept.items() if name not in frozen}


def _round_residuals(
    model: nn.Module, policy: SwitchPolicy, logits: Tensor, probe: Tensor
) -> float | None:
    if policy.residual_dtype is None:
        return None
    for module in adapted_modules(model).values():
        round_residual(module, RESIDUAL_DTYPES[policy.residual_dtype])
    return float((logits - _logits(model, probe)).abs().max())


def _carry(
    how: str,
    moments: Mapping[str, Mapping[str, object]],
    adapters: Mapping[str, Mapping[str, Adapter]],
    old: Learner,
    new: Learner,
) -> int:
    if type(old.optimizer) is not type(new.optimizer):
        return 0
    if how == "factors":
        moments = {**moments, **factor_moments(adapters, moments)}
    return load_moments(new.model, new.optimizer, moments)


@torch.no_grad()
def _logits(model: nn.Module, probe: Tensor) -> Tensor:
    with eval_mode(model):
        return model(probe.to(next(model.parameters()).device)).float()


def _checked_drift(before: Tensor, after: Tensor, limit: float) -> float:
    drift = float((before - after).abs().max())
    if not drift <= limit:
        raise ValueError(
            f"the logits moved by {drift:.2g}, more than switch.max_drift={limit:g}: the model "
            "does not compute with the adapters"
        )
    return drift
