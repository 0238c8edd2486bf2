"""Refuse what a loop gave by mistake, at once, in the names of its arguments."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn

from switchlora.adapters import made_class
from switchlora.criteria import SwitchCriterion, UpdateNorm
from switchlora.errors import check_range
from switchlora.initializers import AdapterInit
from switchlora.names import near
from switchlora.policy import Guard, InRank, Refresh, Restart, Stages, SwitchPolicy
from switchlora.ranks import Budget, Fixed, RankPolicy

GIVEN = ("criterion", "rank", "init", "targets")
"""fields of a policy for which ``LowRankSwitch`` has arguments of its own"""
ARGUMENTS = (
    (r"\bswitch\.targets\b", "target_modules"),
    (r"\bswitch\.rank\.rank\b", "rank"),
    (r"\bswitch/rank=fixed\b", "a number as rank"),
    (r"\b(?:switch[./]|monitor\.)(?=[a-z])", ""),
)
"""keys of a configuration, and what stands for them in a loop"""
NEED_A_RUN = ("remove_weight_decay", "least_gain")
"""options of a policy that need the decay of each update, or inputs to measure the speed on"""
LATER = {"stages": Stages, "restart": Restart, "growth": InRank, "guard": Guard}
"""options of a policy for what comes after the first adapters, by what they are"""
SCHEDULED = ("switchlora", "guided")
"""kinds of adapters that change in each update"""
DEFAULT_RANKS = Budget()


@contextmanager
def named_as_arguments() -> Iterator[None]:
    """Let a ValueError name arguments in place of keys of a configuration."""
    try:
        yield
    except ValueError as error:
        raise ValueError(as_arguments(str(error))) from error


def as_arguments(message: str) -> str:
    """Return a message with arguments in place of keys.

    >>> as_arguments("switch.rank.share=0.1 is too small: switch.rank.r_min=1 needs more")
    'rank.share=0.1 is too small: rank.r_min=1 needs more'
    """
    for key, argument in ARGUMENTS:
        message = re.sub(key, argument, message)
    return message


def check_whole(name: str, value: Any, low: int) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: give a whole number of at least {low}")
    check_range(name, value, low)


def check_function(name: str, value: Any, wanted: str) -> None:
    """Raise ValueError unless ``value`` can be called, and is no class."""
    if not callable(value) or isinstance(value, type):
        raise ValueError(f"{name} is {value!r}: give {wanted}")


def check_parts(model: Any, optimizer: Any) -> None:
    """Raise ValueError unless these are a model and an optimizer that takes several groups."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give an nn.Module")
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}: give an optimizer of torch's"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS takes one group of parameters, and factors need their own")


def policy_of(
    criterion: SwitchCriterion | None,
    rank: int | float | RankPolicy,
    init: AdapterInit,
    options: Mapping[str, Any],
) -> SwitchPolicy:
    """Return the policy that the arguments describe. ValueError for what is none."""
    known = [each.name for each in fields(SwitchPolicy) if each.name not in GIVEN]
    for name in options:
        if name not in known:
            raise ValueError(f"LowRankSwitch has no argument {name}; {near(name, known)}")
    criterion = criterion or UpdateNorm()
    check_function("criterion", criterion, "an object such as UpdateNorm(0.7, patience=3)")
    check_function("init", init, "a function of switchlora.initializers")
    return SwitchPolicy(criterion=criterion, rank=rank_policy(rank), init=init, **options)


def rank_policy(rank: int | float | RankPolicy) -> RankPolicy:
    """Return a policy for a rank, for a share of all parameters, or the policy that it is."""
    if isinstance(rank, float):
        return Budget(share=rank)
    if isinstance(rank, bool) or not isinstance(rank, int):
        wanted = "a number of at least 1, a share of all parameters such as 0.2, or a policy such"
        check_function("rank", rank, f"{wanted} as Energy(0.9)")
        return cast(RankPolicy, rank)
    check_range("rank", rank, 1)
    return Fixed(rank)


def check_optional(**functions: Callable[..., Any] | None) -> None:
    """Raise ValueError for an argument that is neither None nor a function."""
    for name, value in functions.items():
        if value is not None:
            check_function(name, value, "a function, or leave it out")


def check_goes_with_a_loop(policy: SwitchPolicy, updates_per_epoch: int | None) -> None:
    """Raise ValueError for what a loop cannot follow, and for epochs of unknown length."""
    made = made_class(policy.adapter)
    refused = {name: getattr(policy, name) for name in NEED_A_RUN}
    refused["restart=Refresh"] = isinstance(policy.restart, Refresh)
    refused[f"an adapter of the kind {made.kind}"] = made.begins_anew or made.kind in SCHEDULED
    for name, asked in refused.items():
        if asked:
            raise ValueError(
                "LowRankSwitch puts adapters on trained weights, and knows neither the loss nor "
                f"the recipe of a loop, so it does not go with {name}: leave it out, or train "
                "with the command switchlora"
            )
    for name, kind in LATER.items():
        value = getattr(policy, name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}: give a {kind.__name__} of switchlora.policy")
    check_optional(**{"restart.init": getattr(policy.restart, "init", None)})
    check_optional(**{"guard.criterion": getattr(policy.guard, "criterion", None)})
    for name in ("joint_epochs", "restart"):
        if getattr(policy, name) and updates_per_epoch is None:
            raise ValueError(f"{name} counts epochs: give updates_per_epoch")
