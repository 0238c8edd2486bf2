"""The changes of the trained tensors of a run, each made in the same process or undone.

- ``switch`` puts adapters on targets.
- ``settle`` ends the joint phase.
- ``restart`` and ``grow`` replace adapters by new ones.
- ``take_back`` merges the adapters and returns to full training.

Each is a change of the plain model inside ``operate``. When anything fails on any rank,
``operate`` undoes the change on all ranks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchlora.adapters import (
    Adapter,
    Factors,
    GuidedLinear,
    Target,
    adapted_modules,
    applied_ranks,
    core_modules,
    inject,
    is_factor,
    merge,
    settled,
    train_only,
    training_flags,
)
from switchlora.learner import POWERS, Moments, factor_moments, prune_moments
from switchlora.monitor import Measurement, truncated_svd
from switchlora.policy import Refresh, Restart, SwitchPolicy
from switchlora.process import from_primary, together
from switchlora.ranks import largest_saving_rank
from switchlora.switching.plan import Plan, as_loaded, make_plan, start_factors, trained_after
from switchlora.switching.transaction import Adapters, L, Outcome, Replaced, Scene, operate


@dataclass(frozen=True)
class SwitchReport(Outcome):
    """The facts that a switch reports."""

    ranks: Mapping[str, int]
    """applied rank per target; a target of rank 0 is frozen without an adapter"""
    left_full: Sequence[str]
    """targets that stay as they are: factors would save no parameters, or too little time"""
    captured_energy: Mapping[str, float]
    """share of the recent update's energy in the adapter's row space; NaN where nothing moved"""
    waiting: Sequence[str] = ()
    """targets that train on as they are until a later stage"""
    factors: Sequence[str] = ()
    """factors that train"""

    def after(self, earlier: "SwitchReport") -> "SwitchReport":
        """Return one report of this stage and the ``earlier`` ones."""
        return replace(
            self,
            ranks={**earlier.ranks, **self.ranks},
            left_full=[*earlier.left_full, *self.left_full],
            captured_energy={**earlier.captured_energy, **self.captured_energy},
            drift=max(earlier.drift, self.drift),
            rounding_drift=_larger(earlier.rounding_drift, self.rounding_drift),
            parameters=earlier.parameters,
            trainable_before=earlier.trainable_before,
            seconds=earlier.seconds + self.seconds,
        )


def _larger(one: float | None, other: float | None) -> float | None:
    known = [drift for drift in (one, other) if drift is not None]
    return max(known, default=None)


@dataclass(frozen=True)
class Growth(Outcome):
    """The facts that a growth of the ranks reports."""

    ranks: Mapping[str, int]
    """new rank per adapted target"""


def switch(
    scene: Scene[L],
    history: Sequence[Measurement],
    chosen: Sequence[str] | None = None,
    inputs: Tensor | None = None,
) -> tuple[L, SwitchReport]:
    """Put adapters on the ``chosen`` targets (None: all) and return the new learner and a report.

    The switch succeeds on all ranks or on none. When anything raises on any rank, modules and
    flags are put back, the optimizer has not been touched, and SwitchFailed says why. The primary
    rank chooses ranks and factors. The global RNG is left where it was. A sharded model is
    gathered and stays as it is. With a joint phase the weights train on beside their factors.

    ``inputs`` is a share of a batch, on which ``policy.least_gain`` is measured.
    """
    policy, monitor, precision = scene.policy, scene.monitor, scene.learner.precision
    flags = training_flags(scene.learner.model)

    def change(model: nn.Module, replaced: Replaced) -> Plan:
        plan = from_primary(
            lambda: make_plan(model, policy, monitor, history, chosen, inputs, precision)
        )
        with together():
            _inject(model, policy, monitor.known, plan.factors, replaced)
            assert applied_ranks(model, monitor.targets, plan.factors) == plan.ranks
            if policy.joint_epochs:
                _train_as(model, flags, policy)
            else:
                _train_adapters(model, scene, plan.ranks, bool(plan.waiting))
        return plan

    limit = policy.max_drift if policy.keeps_residual else math.inf
    learner, outcome, plan = operate(scene, change, INHERIT[policy.moments], limit)
    report = SwitchReport(
        **vars(outcome),
        ranks=plan.ranks,
        left_full=plan.left_full,
        captured_energy=plan.captured_energy,
        waiting=plan.waiting,
        factors=list(policy.trained_factors),
    )
    return learner, report


def settle(scene: Scene[L], ranks: Mapping[str, int]) -> tuple[L, Outcome]:
    """End the joint phase: freeze the weights of the targets, or drop them from guided adapters.

    ``ranks`` are those of the switch. A guided adapter needs its dense weight in the joint phase
    only.
    """

    def change(model: nn.Module, replaced: Replaced) -> None:
        with together():
            for name, module in adapted_modules(model).items():
                if isinstance(module, GuidedLinear):
                    replaced[name] = module
                    model.set_submodule(name, settled(module))
            _train_adapters(model, scene, ranks, waits=False)

    inherit = nothing if scene.policy.moments == "reset" else surviving
    learner, outcome, _ = operate(scene, change, inherit, scene.policy.max_drift)
    return learner, outcome


def restart(scene: Scene[L], num_updates: int) -> tuple[L, Outcome]:
    """Merge the adapters and start new ones of the same ranks (ReLoRA, arXiv 2307.05695).

    The references of the monitor are the weights at the last merge. Moments of the factors are
    pruned as ``policy.restart`` says. All other moments survive. ``num_updates`` seeds the draws:
    each restart draws other directions.
    """
    policy, targets = scene.policy, scene.monitor.targets
    how = policy.restart
    assert isinstance(how, Restart)
    init = how.init or policy.init
    flags = training_flags(scene.learner.model)

    def change(model: nn.Module, replaced: Replaced) -> None:
        torch.manual_seed(num_updates)  # operate puts the random state back
        ranks = applied_ranks(model, targets, targets)
        updates = scene.monitor.updates(policy.remove_weight_decay, of=model)
        factors = from_primary(
            lambda: start_factors(model, replace(policy, init=init), targets, updates, ranks)
        )
        with together():
            _inject(model, policy, targets, factors, replaced)
            _train_as(model, flags, policy)

    def inherit(moments: Moments, _: Adapters) -> Moments:
        factors = {n: deepcopy(dict(state)) for n, state in moments.items() if is_factor(n)}
        prune_moments(factors, how.prune, how.pruned, seed=num_updates)
        return {**moments, **factors}

    learner, outcome, _ = operate(scene, change, inherit, policy.max_drift)
    return learner, outcome


def refresh(scene: Scene[L], number: int) -> tuple[L, Outcome]:
    """Turn and cut the bases of the last layers that train a core (OIALR, arXiv 2401.08505).

    ``number`` counts the refreshes, this one too. As in the public code, the optimizer's moments
    of a core that was cut are cut to its shape, and all other moments survive.
    """
    policy, targets = scene.policy, scene.monitor.known
    how = policy.restart
    assert isinstance(how, Refresh)
    flags = training_flags(scene.learner.model)

    def change(model: nn.Module, replaced: Replaced) -> None:
        factors = from_primary(lambda: _refreshed(model, policy, how, number))
        with together():
            _inject(model, policy, targets, factors, replaced)
            _train_as(model, flags, policy)

    learner, outcome, _ = operate(scene, change, cut_to_cores, math.inf)
    return learner, outcome


def _refreshed(
    model: nn.Module, policy: SwitchPolicy, how: Refresh, number: int
) -> dict[str, Factors]:
    """Return the new factors, on the CPU, of the layers that a refresh takes."""
    modules = core_modules(model)
    factors = {}
    for name in how.last(list(modules), number):
        A, B = modules[name].refreshed(how.cutoff)
        factors[name] = Factors(as_loaded(A), as_loaded(B / policy.scaling(len(A))))
    return factors


def cut_to_cores(moments: Moments, adapters: Adapters) -> Moments:
    """Return the moments, those of each core cut to its shape."""
    found = dict(moments)
    for module, parts in adapters.items():
        name = f"{module}.lora_B"
        for adapter in parts.values():
            if name in moments:
                found[name] = _cut(moments[name], len(adapter.B))
    return found


def _cut(state: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the first ``size`` rows and columns of the matrices in an optimizer's state."""
    found = {}
    for key, value in state.items():
        is_matrix = isinstance(value, Tensor) and value.dim() == 2
        found[key] = value[:size, :size].clone() if is_matrix else value
    return found


def grow(
    scene: Scene[L],
    gradients: Callable[[], Mapping[str, Tensor]],
    ranks: Mapping[str, int],
) -> tuple[L, Growth]:
    """Raise the ranks of adapters to ``ranks``, by target: see ``larger_ranks``.

    Factors keep their moments. What is new has moments of zero.

    ``gradients()`` returns the gradient of the loss by the effective weight (out, in) of each
    adapted target. It is called on the primary rank. The part of the gradient outside the row
    space of A gives the new rows of A: its leading right singular vectors, with the norm sqrt(1/3)
    of LoRA's start. The new columns of B are zero, so the function of the network does not change.
    SwitchFailed when no rank can grow.
    """
    policy, targets = scene.policy, scene.monitor.known
    flags = training_flags(scene.learner.model)

    def change(model: nn.Module, replaced: Replaced) -> dict[str, int]:
        wider = from_primary(lambda: _wider(model, policy, targets, gradients, ranks))
        with together():
            _inject(model, policy, targets, wider, replaced)
            _train_as(model, flags, policy)
        return {name: len(factors.A) for name, factors in wider.items()}

    learner, outcome, grown = operate(scene, change, widened, policy.max_drift)
    return learner, Growth(**vars(outcome), ranks=grown)


def larger_ranks(
    model: nn.Module, targets: Mapping[str, Target], wanted: Callable[[Adapter], int]
) -> dict[str, int]:
    """Return the ``wanted`` ranks that are above those of now, as far as factors save parameters.

    They are of those ``targets`` that have an adapter, by name.
    """
    adapted = adapted_modules(model)
    larger = {}
    for name, target in targets.items():
        if target.module not in adapted or target.is_dense(model):
            continue
        adapter = adapted[target.module].adapters()[target.part]
        limit = largest_saving_rank((len(adapter.B), adapter.A.shape[1]))
        rank = min(wanted(adapter), limit)
        if rank > len(adapter.A):
            larger[name] = rank
    return larger


def take_back(scene: Scene[L], trained: Iterable[str]) -> tuple[L, Outcome]:
    """Merge all adapters and train the ``trained`` parameters of the full phase again.

    Parameters that trained on keep their moments. Merged weights begin with fresh moments, since
    the moments of the factors do not determine them.
    """
    names = set(trained)

    def change(model: nn.Module, replaced: Replaced) -> None:
        with together():
            replaced.update(merge(model))
            train_only(model, names)

    inherit = nothing if scene.policy.moments == "reset" else without_factors
    learner, outcome, _ = operate(scene, change, inherit, scene.policy.max_drift)
    return learner, outcome


def _inject(
    model: nn.Module,
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    factors: Mapping[str, Factors],
    replaced: Replaced,
) -> None:
    device = next(model.parameters()).device
    placed = {name: Factors(A.to(device), B.to(device)) for name, (A, B) in factors.items()}
    make, dropout = policy.adapter, policy.dropout
    replaced.update(inject(model, targets, placed, policy.scaling, make, dropout))


def _train_adapters(
    model: nn.Module, scene: Scene[L], ranks: Mapping[str, int], waits: bool
) -> None:
    """Train the factors, the parameters that the policy keeps, and the targets that stay full."""
    policy, targets = scene.policy, scene.monitor.known
    full = []
    for name, target in targets.items():
        if name not in ranks and target.trains_in_full(model):
            full.append(name)
    train_only(model, trained_after(model, policy, targets, full, waits), policy.trained_factors)


def _train_as(model: nn.Module, flags: Mapping[str, bool], policy: SwitchPolicy) -> None:
    """Train the parameters whose names trained before (``flags``), and the factors."""
    kept = [name for name, trains in flags.items() if trains and not is_factor(name)]
    train_only(model, kept, policy.trained_factors)


def _wider(
    model: nn.Module,
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    gradients: Callable[[], Mapping[str, Tensor]],
    ranks: Mapping[str, int],
) -> dict[str, Factors]:
    """Return the factors after growth, of each target with a gradient. ValueError if none grew."""
    if not ranks:
        raise ValueError("no rank can grow without becoming as costly as its weight")
    adapted = adapted_modules(model)
    factors = {}
    for name, gradient in gradients().items():
        target = targets[name]
        if target.is_dense(model):
            continue
        adapter = adapted[target.module].adapters()[target.part]
        if name in ranks:
            A, B = _grown(adapter, gradient, ranks[name], policy.scaling(ranks[name]))
        else:
            A, B = adapter.A.detach(), adapter.B.detach()
        factors[name] = Factors(as_loaded(A), as_loaded(B))
    return factors


def _grown(adapter: Adapter, gradient: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) with the product that the adapter has now."""
    A, B = adapter.A.detach(), adapter.B.detach()
    basis = torch.linalg.qr(A.mT).Q
    outside = gradient - (gradient @ basis) @ basis.mT
    rows = truncated_svd(outside, rank - len(A)).Vh / 3**0.5
    columns = B.new_zeros(len(B), len(rows))
    old = B * (adapter.scaling / scaling)
    return torch.cat([A, rows]), torch.cat([old, columns], dim=1)


def nothing(moments: Moments, adapters: Adapters) -> Moments:
    """Return no moments: the new optimizer starts anew."""
    return {}


def surviving(moments: Moments, adapters: Adapters) -> Moments:
    """Return the moments as they are. Those of tensors that no longer train are dropped later."""
    return moments


def with_factors(moments: Moments, adapters: Adapters) -> Moments:
    """Return the moments, and those of the weights projected onto the new factors."""
    return {**moments, **factor_moments(adapters, moments)}


def without_factors(moments: Moments, adapters: Adapters) -> Moments:
    """Return the moments of everything but factors."""
    return {name: state for name, state in moments.items() if not is_factor(name)}


def widened(moments: Moments, adapters: Adapters) -> Moments:
    """Return the moments, with zeros for the rows of A and the columns of B that are new.

    Factors whose moments are not those of their entries (LoRA-RITE) begin afresh.
    """
    found = dict(moments)
    for name, parts in adapters.items():
        for part, (A, B, _, _) in parts.items():
            end = f".{part}" if part else ""
            for key, factor in ((f"{name}.lora_A{end}", A), (f"{name}.lora_B{end}", B)):
                state = found.pop(key, {})
                if not POWERS.keys().isdisjoint(state):
                    found[key] = {what: _padded(value, factor) for what, value in state.items()}
    return found


def _padded(value: Any, factor: Tensor) -> Any:
    """Return a moment with zeros up to the shape of ``factor``; a counter as it is."""
    if not isinstance(value, Tensor) or value.ndim != factor.ndim:
        return value
    rows, columns = (new - old for new, old in zip(factor.shape, value.shape, strict=True))
    return F.pad(value, (0, columns, 0, rows))


INHERIT = {"reset": nothing, "surviving": surviving, "factors": with_factors}
"""by ``switch.moments``, the moments that the optimizer starts with after a switch"""
