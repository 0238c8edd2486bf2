"""Try criterion, ranks and starts once before the first update, to see whether they work."""

import math
from contextlib import suppress

import torch
from torch import nn

from switchlora.adapters import made_class
from switchlora.criteria import Verdict
from switchlora.errors import NothingMeasured
from switchlora.models import draws_undone
from switchlora.monitor import LayerStats, Measurement, UpdateMonitor
from switchlora.policy import SwitchPolicy
from switchlora.switching.plan import check_start, choose_ranks


def rehearse(
    model: nn.Module, policy: SwitchPolicy, monitor: UpdateMonitor, epoch: float = 0.0
) -> None:
    """Call the criterion, the rank choice and the initializer once, on an invented measurement.

    ValueError when they cannot work, alone or together. NothingMeasured when ranks or start need
    a real one; what is tried without one draws no random number of the run. ``epoch`` is nan in a
    loop that does not count epochs.
    """
    once = [_invented_measurement(monitor, epoch)]
    _check_verdict("criterion", policy.criterion(once))
    if policy.guard is not None and policy.guard.criterion is not None:
        _check_verdict("guard.criterion", policy.guard.criterion(once))
    check_factors_alone(model, policy, monitor)
    try:
        choose_ranks(model, policy, monitor, [])
    except NothingMeasured:
        with draws_undone(model), suppress(NothingMeasured):
            _try_start(model, policy, monitor)
        raise
    _try_start(model, policy, monitor)


def _invented_measurement(monitor: UpdateMonitor, epoch: float) -> Measurement:
    bases = 1.0 if monitor.bases else None
    still = LayerStats(1.0, 0.0, 1.0, 0.0, math.nan, basis_stability=bases)
    return Measurement(0, epoch, math.nan, dict.fromkeys(monitor.targets, still))


def _try_start(model: nn.Module, policy: SwitchPolicy, monitor: UpdateMonitor) -> None:
    """Check the start of one target; where it needs an update, of one that is like the weight."""
    name, update = next(iter(monitor.updates().items()))
    weight = monitor.targets[name].weight(model)
    try:
        check_start(policy, name, policy.init(weight, update, 1))
    except NothingMeasured:
        with draws_undone(model):
            check_start(policy, name, policy.init(weight, weight, 1))
        raise


def _check_verdict(part: str, found: object) -> None:
    if not isinstance(found, Verdict):
        raise ValueError(
            f"switch.{part} returned {found!r}: return a Verdict(fires, margins, reason)"
        )


@torch.no_grad()
def check_factors_alone(model: nn.Module, policy: SwitchPolicy, monitor: UpdateMonitor) -> None:
    """Raise ValueError when factors replace a weight but do not start as that weight.

    Adapters that keep a residual weight are not checked. For the others, ||s B A - W|| must be at
    most 1 % of ||W||, tried at full rank on one target.
    """
    if policy.keeps_residual or made_class(policy.adapter).begins_anew:
        return
    weight = next(iter(monitor.targets.values())).weight(model)
    rank = min(weight.shape)
    s = policy.scaling(rank)
    A, B = policy.init(weight / s, torch.randn_like(weight), rank)
    if torch.linalg.vector_norm(s * B @ A - weight) > 0.01 * torch.linalg.vector_norm(weight):
        raise ValueError(
            "switch/adapter=factorized and guided keep no residual weight, so that factors must "
            "begin as the weight: use switch/init=weight_svd with gain 1"
        )
