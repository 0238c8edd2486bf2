"""Compare settings with the length of the run: what comes too late, or takes too long."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from switchlora.criteria import AllOf, AnyOf, AtEpoch, SwitchCriterion, at_start, never
from switchlora.policy import SwitchPolicy


class Length(NamedTuple):
    """How long a run is, in updates."""

    updates: int
    per_epoch: int
    window: int


def doubts(config: Mapping[str, Any], policy: SwitchPolicy, length: Length) -> list[str]:
    """Return a line for each setting of ``config`` that the run is too short for.

    Such a run is possible, and may be meant: a try of a few updates.
    """
    lines = [*warmup_doubts(config, policy, length)]
    if policy.criterion is not never:
        lines += [*switch_doubts(policy, length), *adapter_doubts(config, policy, length)]
    return lines


def warmup_doubts(
    config: Mapping[str, Any], policy: SwitchPolicy, length: Length
) -> Iterator[str]:
    """Yield a line if the learning rate rises to the end, or while the criterion judges."""
    schedule = config["full"]["scheduler"]
    warmup = schedule.get("warmup_t", 0)
    if schedule.get("t_in_epochs") is not False:
        return
    first = first_firing(policy, length)
    if warmup >= length.updates:
        yield (
            f"full.scheduler.warmup_t={warmup} is no shorter than the run, which has "
            f"{length.updates} updates: the learning rate never reaches full.optimizer.lr"
        )
    elif policy.criterion is not never and 0 < first < warmup:
        yield (
            f"full.scheduler.warmup_t={warmup} goes on past update {first}, at which the switch "
            "may come: the criterion would judge while the learning rate rises; give "
            f"switch.earliest={warmup}"
        )


def switch_doubts(policy: SwitchPolicy, length: Length) -> Iterator[str]:
    """Yield a line if the switch can never come."""
    criterion, end = policy.criterion, length.updates
    needed = first_update(criterion, length)
    if policy.earliest >= end:
        yield f"switch.earliest={policy.earliest} is not before the end: {_never(length)}"
    elif needed >= end and isinstance(criterion, AtEpoch):
        yield f"switch.criterion.epoch={criterion.epoch:g} is not before the end: {_never(length)}"
    elif needed >= end:
        yield (
            f"switch.criterion needs {needed // length.window} windows of {length.window} updates "
            f"(monitor.window): {_never(length)}; {_remedy(criterion, length)}"
        )
    elif policy.latest is not None and policy.latest < first_firing(policy, length):
        yield (
            f"switch.latest={policy.latest} comes before the first measurement that can fire, "
            f"after {first_firing(policy, length)} updates: the run never switches"
        )


def adapter_doubts(
    config: Mapping[str, Any], policy: SwitchPolicy, length: Length
) -> Iterator[str]:
    """Yield a line for each thing after the switch that the run is too short for."""
    end = length.updates
    ramp = config["adapter"]["rewarmup_updates"]
    if ramp is not None and ramp >= end:
        yield f"adapter.rewarmup_updates={ramp} is no shorter than the run of {end} updates"
    if policy.joint_epochs * length.per_epoch >= end:
        yield (
            f"switch.joint_epochs={policy.joint_epochs:g} is no shorter than the run: the joint "
            "phase never ends"
        )
    restart = policy.restart
    if restart is not None and restart.every_epochs * length.per_epoch >= end:
        yield (
            f"switch.restart.every_epochs={restart.every_epochs:g} is no shorter than the run: "
            "the adapter never restarts"
        )


def first_firing(policy: SwitchPolicy, length: Length) -> int:
    """Return the updates after which the policy may switch first, at the end of a window."""
    windows = math.ceil(policy.earliest / length.window)
    return max(windows * length.window, first_update(policy.criterion, length))


def first_update(criterion: SwitchCriterion, length: Length) -> int:
    """Return the updates after which ``criterion`` may fire first; 0 for the start.

    Of a criterion that is not known here it is the end of the first window.
    """
    if criterion is at_start:
        return 0
    if isinstance(criterion, AllOf):
        return max(first_update(each, length) for each in criterion.criteria)
    if isinstance(criterion, AnyOf):
        return min(first_update(each, length) for each in criterion.criteria)
    if isinstance(criterion, AtEpoch):
        windows = math.ceil(criterion.epoch * length.per_epoch / length.window)
    else:
        windows = windows_needed(criterion)
    return max(windows, 1) * length.window


def windows_needed(criterion: SwitchCriterion) -> int:
    """Return how many windows ``criterion`` reads before it can fire."""
    if hasattr(criterion, "patience"):
        return criterion.patience + 1
    return getattr(criterion, "windows", getattr(criterion, "delay", 1))


def _never(length: Length) -> str:
    epochs = length.updates / length.per_epoch
    return f"the run has {length.updates} updates ({epochs:g} epochs) and never switches"


def _remedy(criterion: SwitchCriterion, length: Length) -> str:
    """Return the length of window or run with which ``criterion`` can fire before the end."""
    needed = first_update(criterion, length)
    longer = f"more than {needed} updates ({needed / length.per_epoch:g} epochs)"
    window = (length.updates - 1) * length.window // needed
    if window < 1 or first_update(criterion, length._replace(window=window)) >= length.updates:
        return f"make {longer}"
    return f"give monitor.window={window} or less, or make {longer}"
