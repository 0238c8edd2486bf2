"""Plan a switch before it happens: which targets, at what ranks, with which factors."""

import re
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from switchlora.adapters import (
    Factors,
    Target,
    call_order,
    factorized_linear,
    frozen_outright,
    is_factor,
    kept_parameters,
    made_class,
    plain_parameters,
    training_flags,
)
from switchlora.cost import measured_gains
from switchlora.criteria import AtEpoch, LossPlateau
from switchlora.initializers import empty_factors
from switchlora.models import eval_mode
from switchlora.monitor import Measurement, UpdateMonitor, captured_energy
from switchlora.names import near
from switchlora.policy import SwitchPolicy
from switchlora.ranks import SwitchContext, Weights, saves_parameters

WHOLE = (AtEpoch, LossPlateau)
"""criteria that judge all targets at once"""


@dataclass(frozen=True)
class Plan:
    """The choices of the primary rank for one switch; tensors are on the CPU.

    Factors have the strides of tensors loaded from a checkpoint. With other strides, products of
    a resumed run would round differently.
    """

    ranks: dict[str, int]
    left_full: list[str]
    waiting: list[str]
    """targets of later stages"""
    factors: dict[str, Factors]
    captured_energy: dict[str, float]


def make_plan(
    model: nn.Module,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    history: Sequence[Measurement],
    chosen: Collection[str] | None = None,
    inputs: Tensor | None = None,
    precision: str = "fp32",
) -> Plan:
    """Choose ranks and factors for the ``chosen`` targets (None: all that the monitor measures).

    ``model`` is the plain model. ``inputs`` is a share of a batch. If the policy has a
    ``least_gain``, the speed of the factors is measured on ``inputs``. Targets that gain less stay
    full. ValueError when no target is left to adapt.
    """
    ranks, left_full = choose_ranks(model, policy, monitor, history, chosen)
    if policy.least_gain is not None and inputs is not None:
        slow = _slow(model, policy, monitor, ranks, inputs, precision)
        left_full += slow
        ranks = _without(ranks, slow)
        if not ranks and policy.stages is None:
            raise ValueError(
                f"no target is switch.least_gain={policy.least_gain:g} times faster with factors, "
                "so nothing would adapt: choose smaller ranks or a smaller gain"
            )
    updates = monitor.updates(policy.remove_weight_decay, of=model)
    factors = start_factors(model, policy, monitor.targets, updates, ranks)
    captured = {}
    for name, rank in ranks.items():
        update = updates[name]
        captured[name] = captured_energy(update, factors[name].A.to(update)) if rank else 0.0
    waiting = [name for name in monitor.targets if name not in ranks and name not in left_full]
    return Plan(ranks, left_full, waiting, factors, captured)


def start_factors(
    model: nn.Module,
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    updates: Mapping[str, Tensor],
    ranks: Mapping[str, int],
) -> dict[str, Factors]:
    """Return the factors with which each target of ``ranks`` starts, on the CPU, in its dtype.

    ``updates`` are the recent updates (out, in) of the targets. A rank of 0 gives empty factors.
    """
    factors = {}
    for name, rank in ranks.items():
        weight = targets[name].weight(model)
        if rank:
            scaling = policy.scaling(rank)
            start = policy.init(weight / scaling, updates[name] / scaling, rank)
        else:
            start = empty_factors(weight)
        check_start(policy, name, start)
        factors[name] = Factors(
            as_loaded(start.A).to(weight.dtype), as_loaded(start.B).to(weight.dtype)
        )
    return factors


def _without(ranks: Mapping[str, int], names: Collection[str]) -> dict[str, int]:
    return {name: rank for name, rank in ranks.items() if name not in names}


def as_loaded(factor: Tensor) -> Tensor:
    """Return ``factor`` (m, n) on the CPU with strides (n, 1).

    ``contiguous`` alone does not suffice: a single column counts as contiguous with any strides.
    """
    return factor.detach().cpu().contiguous().flatten().view(factor.shape)


def check_start(policy: SwitchPolicy, name: str, factors: Factors) -> None:
    """Raise ValueError for an adapter at B = 0 beside a residual weight in bf16.

    W_res lies on the grid of bf16 numbers. W_res + s B A is rounded back to W_res as long as the
    adapter is smaller than half a step of the grid. Its first updates would do nothing. Codes with
    scales are on no such grid: what they stand for is summed with the adapter in float32.
    """
    if policy.residual_dtype == "bf16" and len(factors.A) and not factors.B.any():
        raise ValueError(
            f"switch.residual_dtype={policy.residual_dtype} does not go with a start at B = 0, "
            f"as {name} has: use switch/init=update_svd or switch.residual_dtype=null"
        )


def choose_ranks(
    model: nn.Module,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    history: Sequence[Measurement],
    chosen: Collection[str] | None = None,
) -> tuple[dict[str, int], list[str]]:
    """Return the rank of each target that switches, and the targets that stay full.

    A target stays full when its rank saves no parameters. A fused module switches as a whole: if
    one of its row slices saves nothing, all of them stay full. In stages each slice switches or
    stays on its own. Rank 0 freezes a target without an adapter. ValueError when nothing would
    adapt, or when the rank policy returns other targets than it was given.
    """
    now = monitor.targets
    if chosen is not None:
        now = {name: target for name, target in now.items() if name in chosen}
    _, frozen = frozen_outright(model, now, policy.freeze, monitor.known)
    targets = {name: target for name, target in now.items() if name not in frozen}
    if not targets and chosen is None:
        raise ValueError("switch.freeze leaves no target, so nothing would adapt: freeze fewer")
    wanted = policy.rank(_context(model, policy, monitor, history, targets)) if targets else {}
    _check_names(wanted, targets)
    whole = bool(targets) and policy.stages is None
    if whole and not any(wanted.values()):
        raise ValueError("every rank is 0, so nothing would adapt: choose larger ranks")
    useless = set()
    for name, rank in wanted.items():
        shape = targets[name].weight(model).shape
        if policy.must_save and not saves_parameters(rank, shape):
            useless.add(_unit(policy, targets[name]))
    for name in frozen:
        unit = _unit(policy, now[name])
        if unit in useless:
            raise ValueError(
                f"switch.freeze freezes {name}, but {unit} stays full, since ranks this large "
                "save nothing: lower the ranks, or freeze all of it"
            )
    left_full = [name for name in wanted if _unit(policy, targets[name]) in useless]
    if whole and len(left_full) == len(wanted):
        raise ValueError("no rank saves parameters on any target: choose smaller ranks")
    ranks = {}
    for name in now:
        if name in frozen:
            ranks[name] = 0
        elif name not in left_full:
            ranks[name] = wanted[name]
    return ranks, left_full


def _check_names(wanted: Mapping[str, int], targets: Mapping[str, Target]) -> None:
    """Raise ValueError unless the rank policy gave each target a rank, and nothing else."""
    odd = sorted(set(wanted) ^ set(targets))
    if odd:
        raise ValueError(
            f"the rank policy must give each target a rank, but '{odd[0]}' is "
            f"{'missing' if odd[0] in targets else 'no target'}; {near(odd[0], targets)}"
        )


def trained_after(
    model: nn.Module,
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    full: Collection[str] = (),
    waits: bool = False,
) -> dict[str, nn.Parameter]:
    """Return the parameters other than the factors that train after the switch, by name.

    ``full`` names the targets that keep training their whole weight. A target in ``full`` can be a
    row slice beside slices with adapters; its dense rows then train. While some targets still wait
    for a later stage (``waits``), everything that is not frozen trains.
    """
    full_modules = {targets[name].module for name in full}
    patterns = [".*"] if waits else list(policy.keep)
    patterns += [rf"^{re.escape(module)}\." for module in sorted(full_modules)]
    adapted = {target.module for target in targets.values()} - full_modules
    frozen, _ = frozen_outright(model, targets, policy.freeze)
    frozen |= {t.parameter_name(model) for name, t in targets.items() if name not in full}
    kept = kept_parameters(model, adapted, patterns)
    return {name: parameter for name, parameter in kept.items() if name not in frozen}


def with_frozen_front(
    model: nn.Module,
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    margins: Mapping[str, float],
    chosen: Sequence[str],
    probe: Tensor | Callable[[nn.Module], Tensor],
) -> SwitchPolicy:
    """Return ``policy`` with the still front of the model added to ``freeze``.

    The targets that train are taken in the order of their calls. The leading ones stand still as
    long as they are in ``chosen`` with a margin of ``stages.still`` or more. The front is all that
    is called before the first target that does not stand still. Its parameters are frozen
    outright: no gradient has to reach them. Parameters outside of submodules, such as
    ``pos_embed``, freeze with it. If no target stands still, the policy is returned as it is.
    """
    if policy.stages is None or policy.stages.still is None:
        return policy
    place = {name: number for number, name in enumerate(call_order(model, probe))}
    trains = [name for name, flag in training_flags(model).items() if flag]
    modules = {name: _module_of(name, place) for name in trains}
    with_weights = {modules[name] for name in trains if not name.endswith(".bias")}
    called = {name: place[t.module] for name, t in targets.items() if t.module in with_weights}
    moving = sorted(called, key=lambda name: called[name])
    asked = {name: margin for name, margin in margins.items() if name in chosen}
    still = policy.stages.front(asked, moving)
    if not still:
        return policy
    rest = moving[len(still) :]
    end = called[rest[0]] if rest else called[still[-1]] + 1
    patterns = []
    for name in trains:
        in_front = place.get(modules[name], end) < end
        if in_front or "." not in name:
            patterns.append(f"^{re.escape(name)}$")
    return replace(policy, freeze=[*policy.freeze, *patterns])


def _module_of(parameter_name: str, modules: Container[str]) -> str:
    """Return which of ``modules`` has this parameter; an adapter's lie two levels below it."""
    name = parameter_name.rpartition(".")[0]
    return name if not name or name in modules else name.rpartition(".")[0]


def _unit(policy: SwitchPolicy, target: Target) -> str:
    """Return the unit that switches together: the target in stages, its whole module otherwise."""
    return target.name if policy.stages else target.module


def _context(
    model: nn.Module,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    history: Sequence[Measurement],
    targets: Mapping[str, Target],
) -> SwitchContext:
    full = []
    for name, target in monitor.known.items():
        if name not in monitor.targets and target.trains_in_full(model):
            full.append(name)
    kept = trained_after(model, policy, monitor.known, full)
    adapters = [p for name, p in model.named_parameters() if is_factor(name) and p.requires_grad]
    other_trainable = sum(parameter.numel() for parameter in (*kept.values(), *adapters))
    sizes = {name: target.weight(model).numel() for name, target in monitor.targets.items()}
    switching = sum(sizes[name] for name in targets)
    return SwitchContext(
        [measured.only(targets) for measured in history],
        monitor.updates(policy.remove_weight_decay, of=model).only(targets),
        monitor.initial_stable_ranks,
        total_parameters=plain_parameters(model),
        other_trainable=other_trainable,
        train_factors=policy.trained_factors,
        weights=Weights(model, targets),
        part=switching / sum(sizes.values()),
    )


@torch.no_grad()
def _slow(
    model: nn.Module,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    ranks: Mapping[str, int],
    inputs: Tensor,
    precision: str,
) -> list[str]:
    """Return the targets that gain less than ``least_gain`` from factors, by the unit.

    The gain is measured. One target that gains less keeps its whole unit full.
    """
    assert policy.least_gain is not None
    adapted = {name: rank for name, rank in ranks.items() if rank}
    own = made_class(policy.adapter).begins_anew
    make = policy.adapter if own else factorized_linear  # what a guided one becomes
    with eval_mode(model), torch.enable_grad():
        gains = measured_gains(model, monitor.targets, adapted, inputs, precision, make)
    units = set()
    for name, gain in gains.items():
        if gain < policy.least_gain:
            units.add(_unit(policy, monitor.targets[name]))
    return [name for name in ranks if _unit(policy, monitor.targets[name]) in units]
