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
    """The facts that a switch reports."""

    ranks: Mapping[str, int]
    """applied rank per target; a target of rank 0 is frozen without an adapter"""
    left_full: Sequence[str]
    """targets that stay as they are: factors would save no parameters, or too little time"""
    captured_energy: Mapping[str, float]
    """share of the recent update's energy in the adapter's row space; NaN where nothing moved"""
    waiting: Sequence[str] = ()
    """targets that train on as they are until a later stage"""

    def after(self, earlier: "SwitchReport") -> "SwitchReport":
        """Return one report of this stage and the ``earlier`` ones."""
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
    """The facts that a growth of the ranks reports."""

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
    """Put adapters on the ``chosen`` targets (None: all) and return the new learner and a report.

    The new learner is ``rebuild(model)``. The switch succeeds on all ranks or on none. When
    anything raises on any rank, modules and flags are put back, the optimizer has not been
    touched, and SwitchFailed says why. The primary rank chooses ranks and factors. The global RNG
    is left where it was. A sharded model is gathered and stays as it is. With a joint phase the
    weights train on beside their factors.

    - ``probe`` (N, ...): inputs on which the drift of the logits is measured. They must be the
      same on all ranks.
    - ``inputs``: a share of a batch, on which ``policy.least_gain`` is measured.
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
    """End the joint phase: freeze the weights of the targets, or drop them from guided adapters.

    A guided adapter needs its dense weight in the joint phase only.
    """

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

    The references of the monitor are the weights at the last merge. Moments of the factors are
    pruned as ``policy.restart`` says. All other moments survive.
    """
    how = policy.restart
    assert how is not None
    flags = training_flags(learner.model)

    def change(model: nn.Module, replaced: Replaced) -> dict[str, object]:
        torch.manual_seed(num_updates)  # forked by operate; each restart draws other directions
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
    """Multiply the ranks of the adapters by ``growth``, as far as factors save parameters.

    ``gradients()`` returns the gradient of the loss by the effective weight (out, in) of each
    adapted target. It is called on the primary rank. The part of the gradient outside the row
    space of A gives the new rows of A: its leading right singular vectors, with the norm sqrt(1/3)
    of LoRA's start. The new columns of B are zero, so the function of the network does not change.
    Factors begin with fresh moments. SwitchFailed when no rank can grow.
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

    Parameters that trained on keep their moments. Merged weights begin with fresh moments, since
    the moments of the factors do not determine them.
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
    """Train the factors, the parameters that the policy keeps, and the targets that stay full."""
    full = [n for n, t in targets.items() if n not in ranks and t.trains_in_full(model)]
    train_only(model, going_on(model, policy, targets, full, waits), policy.train_factors)


def _train_as(model: nn.Module, flags: Mapping[str, bool], policy: SwitchPolicy) -> None:
    """Train the parameters whose names trained before (``flags``), and the factors."""
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
