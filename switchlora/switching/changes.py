"""What changes the trained tensors of a run, all or nothing, in the same process.

``switch`` puts adapters on targets, ``settle`` ends the joint phase, ``restart`` and ``grow``
replace adapters by new ones, ``take_back`` merges them and returns to full training. Each is a
change of the plain model inside ``operate``, which undoes it on all ranks when anything fails on
any.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from switchlora.adapters import (
    Factors,
    GuidedLinear,
    Target,
    adapted_modules,
    applied_ranks,
    inject,
    is_factor,
    merge,
    settled,
    train_only,
    training_flags,
)
from switchlora.learner import Learner, Moments, factor_moments, prune_moments
from switchlora.monitor import Measurement, UpdateMonitor, truncated_svd
from switchlora.policy import SwitchPolicy
from switchlora.process import from_primary, together
from switchlora.ranks import largest_saving_rank
from switchlora.switching.plan import as_loaded, going_on, make_plan
from switchlora.switching.transaction import Adapters, Outcome, Rebuild, Replaced, operate


@dataclass(frozen=True)
class SwitchReport(Outcome):
    """What the switch did."""

    ranks: Mapping[str, int]
    """applied rank per target; 0 is frozen without an adapter"""
    left_full: Sequence[str]
    """targets that stay as they are, since their rank would save nothing"""
    captured_energy: Mapping[str, float]
    """share of the recent update's energy in the adapter's row space; NaN where nothing moved"""
    waiting: Sequence[str] = ()
    """targets that train on as they are, for a later stage"""

    def after(self, earlier: "SwitchReport") -> "SwitchReport":
        """This stage and the ``earlier`` ones as one switch."""
        return replace(
            self,
            ranks={**earlier.ranks, **self.ranks},
            left_full=[*earlier.left_full, *self.left_full],
            captured_energy={**earlier.captured_energy, **self.captured_energy},
            drift=max(earlier.drift, self.drift),
            parameters=earlier.parameters,
            trainable_before=earlier.trainable_before,
            seconds=earlier.seconds + self.seconds,
        )


@dataclass(frozen=True)
class Growth(Outcome):
    """What raised the ranks of adapters."""

    ranks: Mapping[str, int]
    """new rank per adapted target"""


def switch(
    learner: Learner,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    history: Sequence[Measurement],
    probe: Tensor,
    rebuild: Rebuild,
    chosen: Sequence[str] | None = None,
    inputs: Tensor | None = None,
) -> tuple[Learner, SwitchReport]:
    """Put adapters on the ``chosen`` targets (None: all); the learner is ``rebuild(model)`` then.

    All or nothing, on all ranks: when anything raises on any of them, modules and flags are put
    back, the optimizer has not been touched, and SwitchFailed says why. The primary rank chooses
    ranks and factors. The global RNG is left where it was. ``probe`` (N, ...) are the inputs on
    which the drift of the logits is measured, the same on all ranks. A sharded model is gathered
    and stays as it is. With a joint phase the weights train on beside their factors. ``inputs``, a
    share of a batch, are what a least gain is measured on.
    """
    flags = training_flags(learner.model)

    def change(model: nn.Module, replaced: Replaced) -> dict[str, object]:
        precision = learner.recipe.precision
        plan = from_primary(
            lambda: make_plan(model, policy, monitor, history, chosen, inputs, precision)
        )
        with together():
            _inject(model, policy, monitor.known, plan.factors, replaced)
            assert applied_ranks(model, monitor.targets, plan.factors) == plan.ranks
            if policy.joint_epochs:
                _train_as(model, flags, policy)
            else:
                _train_adapters(model, policy, monitor.known, plan.ranks, bool(plan.waiting))
        return {
            "ranks": plan.ranks,
            "left_full": plan.left_full,
            "captured_energy": plan.captured_energy,
            "waiting": plan.waiting,
        }

    limit = policy.max_drift if policy.keeps_residual else math.inf
    inherit = {"reset": None, "surviving": _surviving, "factors": _with_factors}[policy.moments]
    return operate(learner, policy, probe, rebuild, change, inherit, SwitchReport, limit)


def settle(
    learner: Learner,
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    ranks: Mapping[str, int],
    probe: Tensor,
    rebuild: Rebuild,
) -> tuple[Learner, Outcome]:
    """End the joint phase: freeze the weights of the targets, or drop those that only guided."""

    def change(model: nn.Module, replaced: Replaced) -> dict[str, object]:
        with together():
            for name, module in adapted_modules(model).items():
                if isinstance(module, GuidedLinear):
                    replaced[name] = module
                    model.set_submodule(name, settled(module))
            _train_adapters(model, policy, targets, ranks, waits=False)
        return {}

    inherit = None if policy.moments == "reset" else _surviving
    return operate(learner, policy, probe, rebuild, change, inherit, Outcome, policy.max_drift)


def restart(
    learner: Learner,
    policy: SwitchPolicy,
    monitor: UpdateMonitor,
    history: Sequence[Measurement],
    probe: Tensor,
    rebuild: Rebuild,
    num_updates: int,
) -> tuple[Learner, Outcome]:
    """Merge the adapters and start new ones of the same ranks (ReLoRA, arXiv 2307.05695).

    The monitor's references are the weights at the last merge. Moments of the factors are pruned
    as ``policy.restart`` says, all others survive.
    """
    how = policy.restart
    assert how is not None
    flags = training_flags(learner.model)

    def change(model: nn.Module, replaced: Replaced) -> dict[str, object]:
        torch.manual_seed(num_updates)  # inside of operate's fork: other directions each time
        ranks = applied_ranks(model, monitor.targets, monitor.targets)
        fresh = replace(policy, init=how.init or policy.init, rank=lambda _: ranks, freeze=())
        plan = from_primary(lambda: make_plan(model, fresh, monitor, history))
        with together():
            _inject(model, policy, monitor.targets, plan.factors, replaced)
            _train_as(model, flags, policy)
        return {}

    def inherit(moments: Moments, _: Adapters) -> Moments:
        factors = {n: deepcopy(dict(state)) for n, state in moments.items() if is_factor(n)}
        prune_moments(factors, how.prune, how.pruned, seed=num_updates)
        return {**moments, **factors}

    return operate(learner, policy, probe, rebuild, change, inherit, Outcome, policy.max_drift)


def grow(
    learner: Learner,
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    gradients: Callable[[], Mapping[str, Tensor]],
    growth: int,
    probe: Tensor,
    rebuild: Rebuild,
) -> tuple[Learner, Growth]:
    """Multiply the adapters' ranks by ``growth``, as long as that saves parameters.

    The new rows of A are the leading right singular vectors of the loss's gradient by the
    effective weight, ``gradients()`` (out, in) on the primary rank, of what lies outside A's row
    space, with the norm sqrt(1/3) of LoRA's start; the new columns of B are zero. The function
    does not move. Factors begin with fresh moments. SwitchFailed where no rank can grow.
    """
    flags = training_flags(learner.model)

    def change(model: nn.Module, replaced: Replaced) -> dict[str, object]:
        wider = from_primary(lambda: _wider(model, policy, targets, gradients(), growth))
        with together():
            _inject(model, policy, targets, wider, replaced)
            _train_as(model, flags, policy)
        return {"ranks": {name: len(A) for name, (A, _) in wider.items()}}

    inherit = _without_factors
    return operate(learner, policy, probe, rebuild, change, inherit, Growth, policy.max_drift)


def take_back(
    learner: Learner,
    policy: SwitchPolicy,
    trained: Iterable[str],
    probe: Tensor,
    rebuild: Rebuild,
) -> tuple[Learner, Outcome]:
    """Merge all adapters and train the ``trained`` parameters of the full phase again.

    What trained on keeps its moments; merged weights begin with fresh ones, since those of the
    factors do not determine them.
    """
    names = set(trained)

    def change(model: nn.Module, replaced: Replaced) -> dict[str, object]:
        with together():
            replaced.update(merge(model))
            train_only(model, names)
        return {}

    inherit = None if policy.moments == "reset" else _without_factors
    return operate(learner, policy, probe, rebuild, change, inherit, Outcome, policy.max_drift)


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
    model: nn.Module,
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    ranks: Mapping[str, int],
    waits: bool,
) -> None:
    """Train the factors, what the policy keeps, and the targets that stay as they are."""
    full = [n for n, t in targets.items() if n not in ranks and t.trains_in_full(model)]
    train_only(model, going_on(model, policy, targets, full, waits), policy.train_factors)


def _train_as(model: nn.Module, flags: Mapping[str, bool], policy: SwitchPolicy) -> None:
    """Train what trained before, whatever has its name now, and the factors beside it."""
    kept = [name for name, trains in flags.items() if trains and not is_factor(name)]
    train_only(model, kept, policy.train_factors)


def _wider(
    model: nn.Module,
    policy: SwitchPolicy,
    targets: Mapping[str, Target],
    gradients: Mapping[str, Tensor],
    growth: int,
) -> dict[str, Factors]:
    factors, grown, adapted = {}, [], adapted_modules(model)
    for name, gradient in gradients.items():
        if targets[name].is_dense(model):
            continue
        A, B, _, scaling = adapted[targets[name].module].adapters()[targets[name].part]
        A, B = A.detach(), B.detach()
        rank = max(len(A), min(growth * len(A), largest_saving_rank(gradient.shape)))
        if rank > len(A):
            basis = torch.linalg.qr(A.mT).Q
            outside = gradient - (gradient @ basis) @ basis.mT
            new = truncated_svd(outside, rank - len(A)).Vh / 3**0.5
            old = B * (scaling / policy.scaling(rank))
            A, B = torch.cat([A, new]), torch.cat([old, B.new_zeros(len(B), len(new))], dim=1)
            grown.append(name)
        factors[name] = Factors(as_loaded(A), as_loaded(B))
    if not grown:
        raise ValueError("no rank can grow without becoming as costly as its weight")
    return factors


def _surviving(moments: Moments, adapters: Adapters) -> Moments:
    return moments


def _with_factors(moments: Moments, adapters: Adapters) -> Moments:
    return {**moments, **factor_moments(adapters, moments)}


def _without_factors(moments: Moments, adapters: Adapters) -> Moments:
    return {name: state for name, state in moments.items() if not is_factor(name)}
