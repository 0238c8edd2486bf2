"""Apply one change to the trained tensors, or undo all of it, in the same process."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from switchlora.adapters import (
    AdaptedLinear,
    Adapter,
    adapted_modules,
    count_parameters,
    plain_parameters,
    restore,
    training_flags,
)
from switchlora.errors import RanksDisagree, SwitchFailed
from switchlora.learner import Moments, dense_moments, load_moments, moments_of
from switchlora.models import draws_undone, eval_mode, modes_of, same_draws, set_modes
from switchlora.monitor import UpdateMonitor
from switchlora.policy import RESIDUAL_DTYPES, SwitchPolicy
from switchlora.process import (
    agreed_checksum,
    exact_products,
    from_primary,
    full,
    lost_rank,
    together,
)
from switchlora.switching.rounding import Exact, give_to_factors, put_back, round_residuals

Replaced = dict[str, nn.Linear]
Adapters = Mapping[str, Mapping[str, Adapter]]
Inherit = Callable[[Moments, Adapters], Moments]
T = TypeVar("T")


class Trainer(Protocol):
    """What trains a model: a ``Learner``, or a loop of one's own."""

    model: nn.Module
    optimizer: Optimizer

    @property
    def precision(self) -> str:
        """The precision of its products: fp32, bf16 or fp16."""

    def plain(self) -> nn.Module:
        """Return the plain model: the live one, or a copy on the CPU if the model is sharded."""

    def put_back(self) -> None:
        """Set the model up again as it was, after a change that was undone."""


L = TypeVar("L", bound=Trainer)


def outputs(model: nn.Module, probe: Tensor) -> Tensor:
    """Return what ``model`` makes of the inputs ``probe`` (N, ...)."""
    return model(probe.to(next(model.parameters()).device))


@dataclass(frozen=True)
class Scene(Generic[L]):
    """The training that a change works on.

    ``learner`` trains the model. ``rebuild(model)`` makes the learner that follows it. ``probe``
    are inputs on which the drift of the logits is measured. They must be the same on all ranks.
    ``forward`` returns the logits of a model on them.
    """

    learner: L
    policy: SwitchPolicy
    monitor: UpdateMonitor
    probe: Any
    rebuild: Callable[[nn.Module], L]
    forward: Callable[[nn.Module, Any], Tensor] = outputs


@dataclass(frozen=True)
class Outcome:
    """The facts that every change of the trained tensors reports."""

    drift: float
    """largest absolute change of a logit on the probe, in float32"""
    rounding_drift: float | None
    """the same, from rounding the residual weights to fewer bytes, with what the factors took of
    the loss; None without rounding"""
    checksum: str
    """checksum of all trained tensors, the same on all ranks"""
    moments_carried: int
    parameters: int
    """number of parameters of the model before the change, without adapters"""
    trainable_before: int
    trainable_after: int
    seconds: float


def operate(
    scene: Scene[L],
    change: Callable[[nn.Module, Replaced], T],
    inherit: Inherit,
    limit: float,
) -> tuple[L, Outcome, T]:
    """Apply ``change`` to the plain model and rebuild the learner, or leave all as it was.

    - ``change(model, replaced)`` stores each module that it replaces in ``replaced``, under its
      name. Its result is returned as the last value.
    - ``inherit`` makes the moments that the new optimizer starts with.
    - ``limit`` is the largest accepted drift of a logit on the probe.

    When anything fails on any rank, modules and flags are put back on all ranks and SwitchFailed
    is raised. A lost rank, ranks that disagree and an interrupt are raised as they are.
    """
    begin = time.perf_counter()
    learner = scene.learner
    learner.optimizer.zero_grad(set_to_none=True)
    moments = _whole(learner)
    model = learner.plain()
    flags = training_flags(model)
    modes = modes_of(model)
    trainable = count_parameters(model, trainable=True)
    parameters = plain_parameters(model)
    replaced: Replaced = {}
    exact: dict[str, Exact] = {}
    with exact_products(), draws_undone(model):
        try:
            with together():
                before = _logits(model, scene)
            found = change(model, replaced)
            with together():
                after = _logits(model, scene)
                drift = _checked_drift(before, after, limit)
            rounding = _round_residuals(model, scene, after, exact)
            trainable_after = count_parameters(model, trainable=True)
            checksum = agreed_checksum(trained_tensors(model))
            adapters = _snapshot(model)
            moments |= dense_moments(_fresh_dense_rows(model, replaced), moments)
            new = scene.rebuild(model)
            with together():
                carried = _carry(inherit(moments, adapters), learner, new)
        except BaseException as error:
            _undo(model, replaced, exact, flags, modes)
            learner.put_back()
            ends_the_run = isinstance(error, RanksDisagree) or lost_rank(error) is not None
            if isinstance(error, Exception) and not ends_the_run:
                raise SwitchFailed(f"{type(error).__name__}: {error}") from error
            raise
    outcome = Outcome(
        drift=drift,
        rounding_drift=rounding,
        checksum=checksum,
        moments_carried=carried,
        parameters=parameters,
        trainable_before=trainable,
        trainable_after=trainable_after,
        seconds=time.perf_counter() - begin,
    )
    return new, outcome, found


def _undo(
    model: nn.Module,
    replaced: Replaced,
    exact: Mapping[str, Exact],
    flags: Mapping[str, bool],
    modes: Mapping[nn.Module, bool],
) -> None:
    """Put back the replaced modules, the rounded weights, the flags of what trains and modes."""
    put_back(model, exact)
    restore(model, replaced)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    set_modes(modes)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that train, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _whole(learner: Trainer) -> dict[str, dict[str, object]]:
    """Return the moments by name.

    Sharded ones are gathered one at a time on the device, and moved to the CPU.
    """
    moments = {}
    for name, state in moments_of(learner.model, learner.optimizer).items():
        moments[name] = {key: _gathered(value) for key, value in state.items()}
    return moments


def _gathered(value: object) -> object:
    return full(value).cpu() if isinstance(value, DTensor) else value


def _snapshot(model: nn.Module) -> Adapters:
    """Return the adapters by module, detached from the parameters.

    Rebuilding the learner may shard the model, which moves the parameters themselves.
    """
    found: dict[str, dict[str, Adapter]] = {}
    for name, module in adapted_modules(model).items():
        found[name] = {}
        for part, adapter in module.adapters().items():
            detached = adapter._replace(A=adapter.A.detach(), B=adapter.B.detach())
            found[name][part] = detached
    return found


def _fresh_dense_rows(model: nn.Module, replaced: Replaced) -> dict[str, dict[str, slice]]:
    """Return, by module, the rows of dense slices that belonged to a plain weight until now."""
    fresh: dict[str, dict[str, slice]] = {}
    for name, module in adapted_modules(model).items():
        if name not in replaced or isinstance(replaced[name], AdaptedLinear):
            continue
        adapters = module.adapters()
        fresh[name] = {part: adapters[part].rows for part in module.dense_rows()}
    return fresh


def _round_residuals(
    model: nn.Module,
    scene: Scene[L],
    logits: Tensor,
    exact: dict[str, Exact],
) -> float | None:
    """Round the frozen residual weights and return the drift of the logits that this causes.

    The factors take what they can hold of the loss. ``exact`` keeps all as it was. None when the
    policy rounds nothing, or when nothing is new to round. ValueError for too large a drift.
    """
    policy = scene.policy
    if policy.residual_dtype is None:
        return None
    with together():
        own = round_residuals(model, RESIDUAL_DTYPES[policy.residual_dtype], exact)
    shares = from_primary(lambda: own)
    with together():
        give_to_factors(model, shares)
        drift = float((logits - _logits(model, scene)).abs().max())
        if exact and not drift <= policy.max_rounding_drift:
            raise ValueError(
                f"rounding residual weights to {policy.residual_dtype} moved the logits by "
                f"{drift:.2g}, more than switch.max_rounding_drift={policy.max_rounding_drift:g}: "
                "choose a finer switch.residual_dtype, or allow more"
            )
    return drift if exact else None


def _carry(moments: Moments, old: Trainer, new: Trainer) -> int:
    if type(old.optimizer) is not type(new.optimizer):
        return 0
    return load_moments(new.model, new.optimizer, moments)


@torch.no_grad()
def _logits(model: nn.Module, scene: Scene[L]) -> Tensor:
    """Return the logits in float32; what the model draws is the same each time."""
    with eval_mode(model), same_draws(model):
        return scene.forward(model, scene.probe).float()


def _checked_drift(before: Tensor, after: Tensor, limit: float) -> float:
    drift = float((before - after).abs().max())
    if not drift <= limit:
        raise ValueError(
            f"the logits moved by {drift:.2g}, more than switch.max_drift={limit:g}: the model "
            "does not compute with the adapters"
        )
    return drift
