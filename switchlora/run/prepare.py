"""Build a run from its configuration, check it before it starts, and resume it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.utils import random_seed
from torch import nn

from switchlora.adapters import check_targets_are_called, freeze_unused
from switchlora.config import as_plain, build
from switchlora.data import Data
from switchlora.learner import Learner, Recipe, Stopwatch, WeightEMA, build_learner
from switchlora.models import load_weights
from switchlora.monitor import UpdateMonitor
from switchlora.process import Interruption, distributed, known_keys
from switchlora.run.checks import check_config, check_recipes, rehearse_switch
from switchlora.run.run import Run, probe_images, recipe_of
from switchlora.run.snapshot import restore, restore_parts
from switchlora.run.state import Phase
from switchlora.storage import (
    AUTO,
    CONFIG,
    SUMMARY,
    Found,
    RunLog,
    SaveSchedule,
    find,
    machine_line,
)
from switchlora.sweep import Trunk, give_back, trunk_key


def prepare(config: DictConfig, folder: Path, interruption: Interruption | None = None) -> Run:
    """Build a run from ``config``, check its settings, and resume from a checkpoint if any.

    Raise ValueError for settings that cannot work.
    """
    plain, interruption = as_plain(config), interruption or Interruption()
    check_config(config)
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
    rehearse_switch(model, policy, monitor, config.system.parallel)
    check_recipes(recipes, model, policy, len(data.train), sharded)
    saves = SaveSchedule(**config.checkpoint)
    ema = WeightEMA(model, config.ema) if config.ema else None
    trunk = _trunk(config, plain, data, device, found)
    if trunk is not None:
        found = trunk.enter(policy, model, found, folder, interruption)
    state = restore_parts(found, model, monitor)
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
    if config.monitor.window not in (window, "epoch"):
        run.log.line(
            f"monitor.window: {window} updates, a tenth of the run, which has fewer than "
            f"{config.monitor.window}"
        )
    if loaded:
        run.log.line(f"starts from {loaded}")
    if unused:
        run.log.line(f"frozen, since no gradient reaches them: {', '.join(unused)}")
    if found:
        restore(run, found)
        give_back(found)
    else:
        random_seed(config.seed, distributed.rank())  # whatever was drawn on the way
    return run


def build_recipes(config: DictConfig) -> dict[Phase, Recipe]:
    """Build one recipe for each phase.

    The full phase has ``config.full``. All other phases use ``config.adapter``. The joint phase
    has no ramp of the learning rate, and averages all gradients.
    """
    full, adapter = build(config.full), build(config.adapter)
    return {
        Phase.FULL: full,
        Phase.JOINT: replace(adapter, rewarmup_updates=0, unreduced=()),
        Phase.STAGED: adapter,
        Phase.ADAPTER: adapter,
    }


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
        if updates == known_keys()["monitor.window"].value:  # the default, which nobody gave
            return max(1, total_updates // 10)
        raise ValueError(
            f"monitor.window of {updates} updates is longer than the run, which has "
            f"{total_updates}: shorten it or raise epochs"
        )
    return updates


def _trunk(
    config: DictConfig,
    plain: dict[str, Any],
    data: Data,
    device: torch.device,
    found: Found | None,
) -> Trunk | None:
    """Return the run's trunk, or None.

    There is none in these cases:
    - ``trunk.dir`` is unset, or 'auto' outside a multirun,
    - the run has already changed its trained tensors,
    - the run branched off from another run.
    """
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
    """Return the log of the run in ``folder``.

    The primary rank also writes the run's config there. It removes the summary of an earlier start
    that stopped.
    """
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
