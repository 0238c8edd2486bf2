"""What changes the trained tensors of a run, all or nothing, in the same process.

``switch`` puts adapters on targets, ``settle`` ends the joint phase, ``restart`` and ``grow``
replace adapters by new ones, ``take_back`` merges them and returns to full training. Each is a
change of the plain model inside ``operate``, which undoes it on all ranks when anything fails on
any.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchlora.distributed import agreed_checksum, from_primary, full, lost_rank, together
from switchlora.errors import SwitchFailed
from switchlora.initializers import Factors
from switchlora.layers import AdaptedLinear, Adapter, is_factor
from switchlora.learner import Learner, set_checkpointing
from switchlora.lowrank import GuidedLinear, settled
from switchlora.models import eval_mode
from switchlora.moments import (
    Moments,
    dense_moments,
    factor_moments,
    load_moments,
    moments_of,
    prune_moments,
)
from switchlora.monitor import Measurement, UpdateMonitor
from switchlora.plan import as_loaded, going_on, make_plan
from switchlora.policy import RESIDUAL_DTYPES, SwitchPolicy
from switchlora.ranks import largest_saving_rank
from switchlora.spectral import truncated_svd
from switchlora.surgery import (
    Target,
    adapted_modules,
    applied_ranks,
    count_parameters,
    inject,
    merge,
    plain_parameters,
    restore,
    round_residual,
    train_only,
    training_flags,
)

Rebuild = Callable[[nn.Module], Learner]
Replaced = dict[str, nn.Linear]
T = TypeVar("T", bound="Outcome")
Inherit = Callable[[Moments, Mapping[str, Mapping[str, Adapter]]], Moments]


@dataclass(frozen=True)
class Outcome:
    """What every change of the trained tensors tells."""

    drift: float
    """largest absolute change of a logit on the probe, in float32"""
    rounding_drift: float | None
    """the same from keeping the residual weights in fewer bytes"""
    checksum: str
    """of all trained tensors, the same on all ranks"""
    moments_carried: int
    parameters: int
    """of the model before, which adapters do not add to"""
    trainable_before: int
    trainable_after: int
    seconds: float


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
    inherit = {"reset": _nothing, "surviving": _surviving, "factors": _with_factors}
    return operate(
        learner, policy, probe, rebuild, change, inherit[policy.moments], SwitchReport, limit
    )


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

    inherit = _nothing if policy.moments == "reset" else _surviving
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

    def inherit(moments: Moments, _: Mapping[str, Mapping[str, Adapter]]) -> Moments:
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
) -> tuple[Learner, Outcome, dict[str, int]]:
    """Multiply the adapters' ranks by ``growth``, as long as that saves parameters.

    The new rows of A are the leading right singular vectors of the loss's gradient by the
    effective weight, ``gradients()`` (out, in) on the primary rank, of what lies outside A's row
    space, with the norm sqrt(1/3) of LoRA's start; the new columns of B are zero. The function
    does not move. Factors begin with fresh moments. Also returns the new ranks; SwitchFailed where
    none can grow.
    """
    flags = training_flags(learner.model)
    ranks: dict[str, int] = {}

    def change(model: nn.Module, replaced: Replaced) -> dict[str, object]:
        wider = from_primary(lambda: _wider(model, policy, targets, gradients(), growth))
        with together():
            _inject(model, policy, targets, wider, replaced)
            _train_as(model, flags, policy)
        ranks.update({name: len(A) for name, (A, _) in wider.items()})
        return {}

    new, outcome = operate(
        learner, policy, probe, rebuild, change, _without_factors, Outcome, policy.max_drift
    )
    return new, outcome, ranks


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
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
        return {}

    inherit = _nothing if policy.moments == "reset" else _without_factors
    return operate(learner, policy, probe, rebuild, change, inherit, Outcome, policy.max_drift)


def operate(
    learner: Learner,
    policy: SwitchPolicy,
    probe: Tensor,
    rebuild: Rebuild,
    change: Callable[[nn.Module, Replaced], dict[str, object]],
    inherit: Inherit,
    report: type[T],
    limit: float,
) -> tuple[Learner, T]:
    """Apply ``change`` to the plain model and rebuild the learner, or leave all as it was.

    ``change`` notes the modules that it replaces as it goes, and returns what ``report`` tells
    besides. ``inherit`` makes the moments that the new optimizer starts with; ``limit`` is the
    largest drift of a logit that is accepted.
    """
    begin = time.perf_counter()
    learner.optimizer.zero_grad(set_to_none=True)
    moments = {} if inherit is _nothing else _whole(learner)
    model = learner.plain()
    flags = training_flags(model)
    before = count_parameters(model, trainable=True)
    parameters = plain_parameters(model)
    replaced: Replaced = {}
    exact: dict[str, nn.Parameter] = {}
    with torch.random.fork_rng([probe.device] if probe.is_cuda else []):
        try:
            with together():
                logits = _logits(model, probe)
            found = change(model, replaced)
            with together():
                adapted = _logits(model, probe)
                drift = _checked_drift(logits, adapted, limit)
                rounding = _round_residuals(model, policy, adapted, probe, exact)
            after = count_parameters(model, trainable=True)
            checksum = agreed_checksum(trained_tensors(model))
            adapters = _snapshot(model)
            moments |= dense_moments(_fresh_dense_rows(model, replaced), moments)
            new = rebuild(model)
            with together():
                carried = _carry(inherit(moments, adapters), learner, new)
        except BaseException as error:
            for name, weight in exact.items():
                setattr(model.get_submodule(name), "weight", weight)  # noqa: B010
            restore(model, replaced)
            set_checkpointing(model, learner.recipe.activation_checkpointing)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[name])
            if isinstance(error, Exception) and lost_rank(error) is None:
                raise SwitchFailed(f"{type(error).__name__}: {error}") from error
            raise
    outcome = report(
        drift=drift,
        rounding_drift=rounding,
        checksum=checksum,
        moments_carried=carried,
        parameters=parameters,
        trainable_before=before,
        trainable_after=after,
        seconds=time.perf_counter() - begin,
        **found,  # type: ignore[arg-type]
    )
    return new, outcome


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that train, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


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


def _nothing(moments: Moments, adapters: Mapping[str, Mapping[str, Adapter]]) -> Moments:
    return {}


def _surviving(moments: Moments, adapters: Mapping[str, Mapping[str, Adapter]]) -> Moments:
    return moments


def _with_factors(moments: Moments, adapters: Mapping[str, Mapping[str, Adapter]]) -> Moments:
    return {**moments, **factor_moments(adapters, moments)}


def _without_factors(moments: Moments, adapters: Mapping[str, Mapping[str, Adapter]]) -> Moments:
    return {name: state for name, state in moments.items() if not is_factor(name)}


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


def _fresh_dense_rows(model: nn.Module, replaced: Replaced) -> dict[str, dict[str, slice]]:
    """Rows of the slices that were rows of a plain weight until now."""
    return {
        name: {part: module.adapters()[part].rows for part in module.dense_rows()}
        for name, module in adapted_modules(model).items()
        if name in replaced and not isinstance(replaced[name], AdaptedLinear)
    }


def _round_residuals(
    model: nn.Module,
    policy: SwitchPolicy,
    logits: Tensor,
    probe: Tensor,
    exact: dict[str, nn.Parameter],
) -> float | None:
    """Round what is frozen; ``exact`` keeps the weights as they were."""
    if policy.residual_dtype is None:
        return None
    for name, module in adapted_modules(model).items():
        if module.weight is not None and not module.weight.requires_grad:
            exact[name] = cast(nn.Parameter, module.weight)
            round_residual(module, RESIDUAL_DTYPES[policy.residual_dtype])
    return float((logits - _logits(model, probe)).abs().max())


def _carry(moments: Moments, old: Learner, new: Learner) -> int:
    if type(old.optimizer) is not type(new.optimizer):
        return 0
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
