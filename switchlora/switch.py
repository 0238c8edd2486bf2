"""The switch: from all parameters to low-rank adapters, all or nothing, in the same process."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from switchlora.criteria import SwitchCriterion, Verdict
from switchlora.errors import SwitchFailed, check_choice, check_patterns, near
from switchlora.initializers import AdapterInit, Factors, empty_factors
from switchlora.layers import scaling_one
from switchlora.learner import Learner, carry_factor_moments, carry_moments
from switchlora.models import eval_mode
from switchlora.monitor import Measurement, UpdateMonitor
from switchlora.ranks import RankPolicy, SwitchContext, saves_parameters
from switchlora.spectral import captured_energy
from switchlora.surgery import (
    Target,
    applied_ranks,
    count_parameters,
    find_targets,
    inject,
    kept_parameters,
    restore,
    train_only,
)

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

    def __post_init__(self) -> None:
        check_choice("switch.moments", self.moments, ("surviving", "factors", "reset"))
        check_patterns("switch.targets", self.targets)
        check_patterns("switch.keep", self.keep)
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
    moments_carried: int
    parameters: int
    """of the model before the switch, which adapters do not add to"""
    trainable_before: int
    trainable_after: int
    seconds: float


def switch(
    learner: Learner,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    history: Sequence[Measurement],
    probe: Tensor,
    rebuild: Callable[[], Learner],
) -> tuple[Learner, SwitchReport]:
    """Replace the targets by adapters and the learner by ``rebuild()``; return it with a report.

    All or nothing: when anything raises, modules and flags are put back, the optimizer has not
    been touched, and SwitchFailed says why. The global RNG is left where it was. ``probe`` (N, C,
    H, W) are the images on which the drift of the logits is measured.
    """
    begin = time.perf_counter()
    model = learner.model
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    parameters, before = count_parameters(model), count_parameters(model, trainable=True)
    replaced: dict[str, nn.Linear] = {}
    learner.optimizer.zero_grad(set_to_none=True)
    with torch.random.fork_rng():
        try:
            logits = _logits(model, probe)
            ranks, left_full = choose_ranks(model, policy, monitor, history)
            factors, captured = _choose_factors(model, policy, monitor, ranks)
            replaced.update(inject(model, monitor.targets, factors, policy.scaling))
            assert applied_ranks(model, monitor.targets, factors) == ranks
            train_only(model, *_frozen_and_kept(policy, monitor.targets, ranks, left_full))
            drift = _checked_drift(logits, _logits(model, probe), policy.max_drift)
            new = rebuild()
            carried = _carry(model, policy.moments, learner, new, replaced)
        except BaseException as error:
            restore(model, replaced)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[name])
            if isinstance(error, Exception):
                raise SwitchFailed(f"{type(error).__name__}: {error}") from error
            raise
    return new, SwitchReport(
        ranks=ranks,
        left_full=left_full,
        captured_energy=captured,
        drift=drift,
        moments_carried=carried,
        parameters=parameters,
        trainable_before=before,
        trainable_after=count_parameters(model, trainable=True),
        seconds=time.perf_counter() - begin,
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
    targets = monitor.targets
    kept = kept_parameters(model, {t.module for t in targets.values()}, policy.keep)
    context = SwitchContext(
        history,
        monitor.updates(policy.remove_weight_decay),
        monitor.initial_stable_ranks,
        total_parameters=count_parameters(model),
        other_trainable=sum(parameter.numel() for parameter in kept.values()),
    )
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
    if len(left_full) == len(wanted):
        raise ValueError("no rank saves parameters on any target: choose smaller ranks")
    return {n: r for n, r in wanted.items() if n not in left_full}, left_full


def _choose_factors(
    model: nn.Module, policy: SwitchPolicy, monitor: UpdateMonitor, ranks: Mapping[str, int]
) -> tuple[dict[str, Factors], dict[str, float]]:
    updates = monitor.updates(policy.remove_weight_decay)
    factors, captured = {}, {}
    for name, rank in ranks.items():
        weight, update = monitor.targets[name].weight(model), updates[name]
        s = policy.scaling(rank)
        factors[name] = (
            policy.init(weight / s, update / s, rank) if rank else empty_factors(weight)
        )
        captured[name] = captured_energy(update, factors[name].A) if rank else 0.0
    return factors, captured


def _frozen_and_kept(
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    ranks: Mapping[str, int],
    left_full: Sequence[str],
) -> tuple[set[str], list[str]]:
    full = sorted({targets[name].module for name in left_full})
    kept = [*policy.keep, *(rf"^{re.escape(module)}\." for module in full)]
    return {targets[name].module for name in ranks}, kept


def _carry(
    model: nn.Module,
    moments: str,
    old: Learner,
    new: Learner,
    replaced: Mapping[str, nn.Linear],
) -> int:
    if moments == "reset":
        return 0
    carried = carry_moments(old.optimizer, new.optimizer)
    if moments == "factors":
        weights = {name: linear.weight for name, linear in replaced.items()}
        carried += carry_factor_moments(model, old.optimizer, new.optimizer, weights)
    return carried


@torch.no_grad()
def _logits(model: nn.Module, probe: Tensor) -> Tensor:
    with eval_mode(model):
        return model(probe).float()


def _checked_drift(before: Tensor, after: Tensor, limit: float) -> float:
    drift = float((before - after).abs().max())
    if not drift <= limit:
        raise ValueError(
            f"the logits moved by {drift:.2g}, more than switch.max_drift={limit:g}: the model "
            "does not compute with the adapters"
        )
    return drift
