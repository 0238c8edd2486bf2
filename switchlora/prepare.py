"""A run built from its configuration, checked before it starts, resumed where it left off."""

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from timm.utils import random_seed
from torch import nn

from switchlora import distributed
from switchlora.checkpoint import SaveSchedule
from switchlora.criteria import never
from switchlora.data import Data
from switchlora.ema import WeightEMA
from switchlora.errors import NothingMeasured, check_choice
from switchlora.interrupt import Interruption
from switchlora.layers import FACTORS, adapted_linear
from switchlora.learner import PARALLEL, Learner, Recipe, build_learner, check_goes_with_fsdp
from switchlora.models import load_weights
from switchlora.monitor import LayerStats, Measurement, UpdateMonitor
from switchlora.plan import check_criterion, check_factors_alone, check_start, choose_ranks
from switchlora.policy import SwitchPolicy
from switchlora.provenance import machine_line
from switchlora.resume import AUTO, Found, find
from switchlora.run import Run, probe_images, recipe_of
from switchlora.runlog import CONFIG, SUMMARY, RunLog
from switchlora.state import Phase, TrainState
from switchlora.surgery import freeze_unused, inject_empty, train_only
from switchlora.targets import check_targets_are_called, matching
from switchlora.throughput import Stopwatch
from switchlora.trunk import Trunk, give_back, trunk_key

build = partial(instantiate, _convert_="all")


def prepare(config: DictConfig, folder: Path, interruption: Interruption | None = None) -> Run:
    """Build data, model, policy, recipes and learner; check what can be checked; resume."""
    plain, interruption = as_plain(config), interruption or Interruption()
    _check_config(config)
    random_seed(config.seed)
    if config.system.threads:
        torch.set_num_threads(config.system.threads)
    device = _device(config.system.device)
    data = _build_data(config)
    total_updates = config.epochs * len(data.train)
    last_update = min(total_updates, config.max_updates or total_updates)
    window = _window(config.monitor.window, len(data.train), total_updates)
    sharded = config.system.parallel == "fsdp"
    model = build(config.model).to("cpu" if sharded else device)
    found = find(config.resume, folder, plain, model)
    begins = found is None and config.init_checkpoint is not None
    loaded = load_weights(model, config.init_checkpoint) if begins else None
    policy, recipes = build(config.switch), build_recipes(config)
    targets = policy.find_targets(model)
    check_targets_are_called(model, targets.values(), probe_images(data, _device_of(model)))
    _device(config.monitor.device)
    monitor = UpdateMonitor(model, targets, **{**config.monitor, "window": window})
    _check_switch(model, policy, monitor, config.system.parallel)
    _check_recipes(recipes, model, policy, len(data.train), sharded)
    saves = SaveSchedule(**config.checkpoint)
    ema = WeightEMA(model, config.ema) if config.ema else None
    trunk = _trunk(config, plain, data, device, found)
    if trunk is not None:
        found = trunk.enter(policy, model, found, folder, interruption)
    state = _restore_parts(found, model, monitor)
    replicated = distributed.world_size() > 1 and not sharded
    unused = freeze_unused(model, probe_images(data, device)) if replicated else []
    if not state.full_parameters:
        state.full_parameters = [n for n, p in model.named_parameters() if p.requires_grad]
    state.full_parameters = [name for name in state.full_parameters if name not in unused]
    recipe = recipe_of(state.phase, recipes, policy, state)
    learner = _first_learner(model, recipe, total_updates, found, config.system.parallel)
    run = Run(
        config=plain,
        data=data,
        policy=policy,
        recipes=recipes,
        learner=learner,
        monitor=monitor,
        state=state,
        stopwatch=Stopwatch(device),
        saves=saves,
        log=_open_log(config, plain, folder, last_update, found),
        ema=ema,
        total_updates=total_updates,
        last_update=last_update,
        window=window,
        interruption=interruption,
        trunk=trunk,
    )
    run.log.line(machine_line(device))
    if loaded:
        run.log.line(f"starts from {loaded}")
    if unused:
        run.log.line(f"frozen, since no gradient reaches them: {', '.join(unused)}")
    if found:
        run.load(found)
        give_back(found)
    else:
        random_seed(config.seed, distributed.rank())  # whatever was drawn on the way
    return run


def build_recipes(config: DictConfig) -> dict[Phase, Recipe]:
    """One for each phase: all but the full phase follow the adapter's."""
    full, adapter = build(config.full), build(config.adapter)
    return {
        Phase.FULL: full,
        Phase.JOINT: replace(adapter, rewarmup_updates=0, unreduced=()),
        Phase.STAGED: adapter,
        Phase.ADAPTER: adapter,
    }


def as_plain(config: DictConfig) -> dict[str, Any]:
    """A config as plain dicts and lists, interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def check_whole(config: DictConfig, key: str, least: int) -> None:
    """ValueError unless ``key`` holds a whole number of at least ``least``."""
    value = OmegaConf.select(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key} is {value!r}: give a whole number of at least {least}")


def _check_config(config: DictConfig) -> None:
    for key, least in {"epochs": 1, "seed": 0, "max_skipped": 0, "log.every": 1}.items():
        check_whole(config, key, least)
    if config.max_updates is not None:
        check_whole(config, "max_updates", 1)
    check_choice("system.parallel", config.system.parallel, PARALLEL)
    if config.system.parallel == "fsdp":
        if not dist.is_initialized():
            raise ValueError("system.parallel=fsdp shards over processes: start it with torchrun")
        if config.ema:
            raise ValueError("ema does not go with system.parallel=fsdp: its copy is not sharded")


def _build_data(config: DictConfig) -> Data:
    return build(
        config.data,
        seed=config.seed,
        workers=config.system.workers,
        pin_memory=config.system.pin_memory,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.zeros((), device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device '{name}' cannot be used: {reason}") from error


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _window(window: int | str, updates_per_epoch: int, total_updates: int) -> int:
    updates = updates_per_epoch if window == "epoch" else window
    if not isinstance(updates, int) or updates < 1:
        raise ValueError(f"monitor.window is {window!r}: give a number of updates or 'epoch'")
    if updates > total_updates:
        raise ValueError(
            f"monitor.window of {updates} updates is longer than the run, which has "
            f"{total_updates}: shorten it or raise epochs"
        )
    return updates


def _check_switch(
    model: nn.Module, policy: SwitchPolicy, monitor: UpdateMonitor, parallel: str
) -> None:
    if policy.criterion is never:
        return
    if parallel == "fsdp":
        _refuse_what_shards_cannot(policy)
    bases = 1.0 if monitor.bases else None
    still = LayerStats(1.0, 0.0, 1.0, 0.0, math.nan, basis_stability=bases)
    once = [Measurement(0, 0.0, math.nan, dict.fromkeys(monitor.targets, still))]
    policy.criterion(once)
    if policy.guard is not None and policy.guard.criterion is not None:
        policy.guard.criterion(once)
    check_criterion(policy)
    check_factors_alone(model, policy, monitor)
    with nullcontext() if policy.decide([]).fires else suppress(NothingMeasured):
        choose_ranks(model, policy, monitor, [])
        name, update = next(iter(monitor.updates().items()))
        check_start(policy, name, policy.init(monitor.targets[name].weight(model), update, 1))


def _check_recipes(
    recipes: Mapping[Phase, Recipe],
    model: nn.Module,
    policy: SwitchPolicy,
    updates_per_epoch: int,
    sharded: bool,
) -> None:
    if sharded:
        for each in recipes.values():
            check_goes_with_fsdp(each)
    recipe = recipes[Phase.ADAPTER]
    names = [*(name for name, _ in model.named_parameters()), "lora_A", "lora_B"]
    matching(recipe.unreduced, names, "adapter.unreduced", "parameter", re.search)
    if recipe.refactoring is None:
        return
    if set(policy.train_factors) != set(FACTORS):
        raise ValueError("adapter.refactoring needs both factors: set switch.train_factors=[A, B]")
    waits = getattr(recipe.refactoring, "warmup_updates", 0)
    if policy.restart is not None and waits >= policy.restart.every_epochs * updates_per_epoch:
        raise ValueError(
            f"adapter.refactoring.warmup_updates={waits} is no shorter than a cycle of "
            "switch.restart, so that refactoring would never begin: shorten it"
        )


def _refuse_what_shards_cannot(policy: SwitchPolicy) -> None:
    found = {
        "joint_epochs": policy.joint_epochs,
        "stages": policy.stages,
        "restart": policy.restart,
        "guard": policy.guard is not None and policy.guard.act != "warn",
        "adapter": policy.adapter is not adapted_linear,
    }
    for name, asked in found.items():
        if asked:
            raise ValueError(
                f"switch.{name} does not go with system.parallel=fsdp: use DDP, or leave it out"
            )


def _trunk(
    config: DictConfig,
    plain: dict[str, Any],
    data: Data,
    device: torch.device,
    found: Found | None,
) -> Trunk | None:
    """The trunk of a run that has one: none after the switch, nor where a run branched off."""
    options = {**plain["trunk"]}
    place = options.pop("dir")
    if place in (None, AUTO):
        return None
    if found is not None:
        past = found.state["train"]
        if found.branches or past["branched_from"] or past["transitions"]:
            return None
    key = distributed.from_primary(lambda: trunk_key(plain, device, data.digest()))
    return Trunk(Path(place), key, **options)


def _restore_parts(found: Found | None, model: nn.Module, monitor: UpdateMonitor) -> TrainState:
    """The state of the run; ``model`` gets its adapters and flags, ``monitor`` its window."""
    state = TrainState()
    if found is None:
        return state
    state.load_state_dict(found.state["train"])
    if found.branches:
        state.branched_from = str(found.path)
    inject_empty(model, found.state["adapters"])
    train_only(model, set(found.state["trained"]), factors=())  # factors are among the names
    monitor.load_state_dict(found.state["monitor"])
    return state


def _first_learner(
    model: nn.Module,
    recipe: Recipe,
    total_updates: int,
    found: Found | None,
    parallel: str,
) -> Learner:
    start = found.state["start"] if found else 0
    try:
        return build_learner(model, recipe, total_updates, start, parallel)
    except TypeError as error:
        raise ValueError(f"full.optimizer or full.scheduler: {error}") from error


def _open_log(
    config: DictConfig,
    plain: dict[str, Any],
    folder: Path,
    last_update: int,
    found: Found | None,
) -> RunLog:
    """The log of a run whose folder has its config, and no summary of a start that stopped."""
    log = RunLog(
        folder,
        plain,
        total_updates=last_update,
        wandb=_wandb_options(config),
        progress=config.log.progress,
        position=found.state["log"] if found else None,
        source=found.source if found else None,
    )
    if distributed.is_primary():
        OmegaConf.save(config, folder / CONFIG, resolve=True)
        (folder / SUMMARY).unlink(missing_ok=True)
    return log


def _wandb_options(config: DictConfig) -> dict[str, Any] | None:
    options = as_plain(config.log.wandb)
    return None if options["mode"] == "disabled" else options
