"""Refuse settings that cannot work together, before the first update."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from switchlora.adapters import FACTORS, adapted_linear, made_class
from switchlora.criteria import NO_SHARE, AtEpoch, PredictedCost, at_start, joined, never
from switchlora.errors import ODD, NothingMeasured
from switchlora.learner import (
    LoRARite,
    Muon,
    Recipe,
    Refactoring,
    SwitchLoRA,
    check_compiles,
    check_goes_with_fsdp,
    set_checkpointing,
)
from switchlora.models import eval_mode
from switchlora.monitor import UpdateMonitor
from switchlora.policy import Restart, SwitchPolicy
from switchlora.process import check_values
from switchlora.run.state import Phase
from switchlora.storage import wandb_mode
from switchlora.switching import WHOLE, rehearse


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a number out of its range, or for settings that exclude each other."""
    check_values(config)
    wandb_mode(config["log"]["wandb"]["mode"])
    system = config["system"]
    if system["compress"] and system["parallel"] == "fsdp":
        raise ValueError(
            "system.compress goes with system.parallel=ddp: shards have their own sums"
        )
    if system["parallel"] == "fsdp":
        if not dist.is_initialized():
            raise ValueError("system.parallel=fsdp shards over processes: start it with torchrun")
        if config["ema"]:
            raise ValueError("ema does not go with system.parallel=fsdp: its copy is not sharded")


@torch.no_grad()
def check_outputs(model: nn.Module, inputs: Tensor, num_classes: int) -> None:
    """Raise ValueError if the model has fewer logits than there are classes.

    A GPU would end the process at the first such label. ``inputs`` (B, ...) give a shape alone.
    """
    try:
        with eval_mode(model):
            logits = model(torch.zeros_like(inputs[:1]))
    except RuntimeError:  # check_targets_are_called says why
        return
    if logits.shape[-1] < num_classes:
        raise ValueError(
            f"the model gives {logits.shape[-1]} logits, but labels of the data run from 0 to "
            f"{num_classes - 1}: raise model.num_classes (of text: model.vocabulary)"
        )


def rehearse_switch(
    model: nn.Module, policy: SwitchPolicy, monitor: UpdateMonitor, parallel: str
) -> None:
    """Raise ValueError for a policy that cannot work, before the first update."""
    if policy.criterion is never:
        return
    if parallel == "fsdp":
        _refuse_what_shards_cannot(policy)
    check_criterion(policy)
    try:
        rehearse(model, policy, monitor)
    except NothingMeasured:
        if policy.decide([]).fires:  # the switch is at the start, without a measurement
            raise


def check_options(phase: Phase, recipe: Recipe, model: nn.Module, total_updates: int) -> None:
    """Build what the recipe of ``phase`` asks for, before the phase needs it.

    Raise ValueError that names the key whose options the optimizer, the schedule, the compiler or
    the model refuses.
    """
    optimizer = _built(f"{phase}.optimizer", lambda: recipe.bare_optimizer)
    schedule = partial(recipe.scheduler, optimizer, t_initial=total_updates)
    scheduler = _built(f"{phase}.scheduler", schedule)
    _built(f"{phase}.scheduler", partial(scheduler.step_update, total_updates - 1))
    check_compiles(f"{phase}.compile", recipe.compile, next(model.parameters()).device)
    checkpointed = recipe.activation_checkpointing
    set_checkpointing(model, checkpointed, f"{phase}.activation_checkpointing")
    set_checkpointing(model, None)


def _built(key: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except ODD as error:
        raise ValueError(f"{key}: {error}") from error


def check_recipes(
    recipes: Mapping[Phase, Recipe],
    policy: SwitchPolicy,
    updates_per_epoch: int,
    sharded: bool,
) -> None:
    """Raise ValueError for recipes that do not work with the policy or with sharding."""
    if sharded:
        for each in recipes.values():
            check_goes_with_fsdp(each)
    recipe = recipes[Phase.ADAPTER]
    if recipe.refactoring is None:
        return
    if set(policy.trained_factors) != set(FACTORS):
        raise ValueError("adapter.refactoring needs both factors: set switch.train_factors=[A, B]")
    waits = getattr(recipe.refactoring, "warmup_updates", 0)
    if policy.restart is not None and waits >= policy.restart.every_epochs * updates_per_epoch:
        raise ValueError(
            f"adapter.refactoring.warmup_updates={waits} is no shorter than a cycle of "
            "switch.restart, so that refactoring would never begin: shorten it"
        )


@torch.no_grad()
def check_refactored_start(
    recipe: Recipe, policy: SwitchPolicy, model: nn.Module, monitor: UpdateMonitor
) -> None:
    """Raise ValueError when refactoring would begin at once beside B = 0.

    The starts of the switch and of restarts are tried on one target and an invented update. A
    refactoring of one zero factor has no answer; one update later the other factor would shrink to
    the size of that update.
    """
    refactoring = recipe.refactoring
    begins_at_once = isinstance(refactoring, Refactoring) and refactoring.at_once
    if policy.criterion is never or not begins_at_once:
        return
    restart = policy.restart
    starts = {"switch/init": policy.init}
    if isinstance(restart, Restart) and restart.init is not None:
        starts["switch.restart.init"] = restart.init
    weight = next(iter(monitor.targets.values())).weight(model)
    for key, init in starts.items():
        _, B = init(weight, torch.randn_like(weight), 1)
        if not B.any():
            raise ValueError(
                f"adapter.refactoring.warmup_updates=0 does not go with this {key}, at which "
                "B = 0: use re_init or balanced, or adapter.refactoring.warmup_updates=100"
            )


def check_kind(policy: SwitchPolicy, recipe: Recipe, ema: float | None) -> None:
    """Raise ValueError for settings that the kind of adapter has no use for.

    ``recipe`` is that of the adapter phase. An adapter that begins anew takes no trained weight
    over. One that no weight can stand for has no product s B A and no weight to average.
    """
    made, optimizer = made_class(policy.adapter), recipe.optimizer_class
    if policy.criterion is never:
        return
    if made.begins_anew and policy.criterion is not at_start:
        raise ValueError(
            f"switch/adapter={made.kind} begins as a new layer and would throw away what the "
            "weight has learned: use switch/criterion=at_start"
        )
    if (made.kind == "switchlora") != isinstance(recipe.refactoring, SwitchLoRA):
        raise ValueError(
            "switch/adapter=switchlora holds the vectors that adapter/refactoring=switchlora "
            "switches: give both or neither"
        )
    if made.kind == "switchlora" and issubclass(optimizer, LoRARite):
        raise ValueError(
            "switch/adapter=switchlora resets the moments of single rows, which LoRA-RITE does "
            "not have: use recipe@adapter=adamw"
        )
    refused = {
        "ema": ema,
        "adapter.refactoring": recipe.refactoring,
        "adapter.frobenius_decay": recipe.frobenius_decay,
        "recipe@adapter=muon": issubclass(optimizer, Muon),
        "recipe@adapter=lora_rite": issubclass(optimizer, LoRARite),
    }
    for name, asked in refused.items():
        if asked and not made.has_weight:
            raise ValueError(
                f"{name} works on weights s B A, which switch/adapter={made.kind} does not have: "
                "leave it out"
            )


def _refuse_what_shards_cannot(policy: SwitchPolicy) -> None:
    found = {
        "joint_epochs": policy.joint_epochs,
        "stages": policy.stages,
        "restart": policy.restart,
        "growth": policy.growth,
        "guard": policy.guard is not None and policy.guard.acts,
        "adapter": policy.adapter is not adapted_linear,
        f"residual_dtype={policy.residual_dtype}": policy.quantises,
    }
    for name, asked in found.items():
        if asked:
            raise ValueError(
                f"switch.{name} does not go with system.parallel=fsdp: use DDP, or leave it out"
            )


def check_criterion(policy: SwitchPolicy) -> None:
    """Raise ValueError for a criterion that ranks, stages or a guard cannot work with."""
    predicting = [each for each in joined(policy.criterion) if isinstance(each, PredictedCost)]
    if any(each.share is None for each in predicting):
        raise ValueError(NO_SHARE)
    plain = (never, at_start)
    if policy.stages and (policy.criterion in plain or isinstance(policy.criterion, WHOLE)):
        raise ValueError(
            "switch.stages needs a criterion with a margin for each target, such as update_norm"
        )
    if policy.guard is None:
        return
    if policy.criterion is at_start:
        raise ValueError(
            "switch.guard compares with a full phase, which switch/criterion=at_start does not "
            "have"
        )
    again = policy.guard.criterion or policy.criterion
    if policy.guard.act == "full" and isinstance(again, AtEpoch):
        raise ValueError(
            "switch.guard takes back what switch/criterion=at_epoch would switch again at "
            "once: give switch.guard.criterion one of its own, as switch/guard=full does"
        )
