"""Build a run from its configuration, check it before it starts, and resume it."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from timm.utils import random_seed
from torch import Tensor, nn

from switchlora.adapters import (
    Target,
    check_adapters_work,
    coverage_line,
    freeze_unused,
    merge,
    set_rates,
)
from switchlora.config import as_plain, build, from_environment
from switchlora.cost import hardware_like
from switchlora.data import Data
from switchlora.errors import ODD
from switchlora.learner import (
    AUTO as CHOSEN_HERE,
    Learner,
    Recipe,
    Stopwatch,
    WeightEMA,
    build_learner,
    chosen_compiler,
    missing_compiler,
    precision_of,
)
from switchlora.models import RESIDUAL, load_weights
from switchlora.monitor import UpdateMonitor
from switchlora.policy import SwitchPolicy
from switchlora.process import Interruption, distributed, find_device, known_keys, set_backends
from switchlora.run.agreement import agree_on_data
from switchlora.run.checks import (
    check_config,
    check_kind,
    check_options,
    check_outputs,
    check_recipes,
    check_refactored_start,
    rehearse_switch,
)
from switchlora.run.leakage import WARN, DataFacts, keep_facts, look_at_data
from switchlora.run.lengths import Length, doubts
from switchlora.run.run import Run, follows_switch, probe_images, recipe_of
from switchlora.run.snapshot import check_state, restore, restore_parts
from switchlora.run.state import Phase
from switchlora.storage import (
    AUTO,
    CONFIG,
    PROJECT,
    SUMMARY,
    Found,
    RunLog,
    SaveSchedule,
    Sink,
    WandbLog,
    find,
    load_adapter,
    machine_line,
    wandb_options,
    write_whole,
)
from switchlora.sweep import Trunk, give_back, trunk_key

REFERENCES = 0.05
"""largest share of a GPU's memory that the monitor's copies of the weights take"""


@dataclass(frozen=True)
class Parts:
    """What a configuration describes, before it is known where the run starts."""

    config: DictConfig
    plain: dict[str, Any]
    device: torch.device
    data: Data
    model: nn.Module
    policy: SwitchPolicy
    recipes: dict[Phase, Recipe]
    total_updates: int
    sinks: dict[str, Sink]

    @property
    def sharded(self) -> bool:
        """Whether the ranks share one model."""
        return self.config.system.parallel == "fsdp"

    @cached_property
    def images(self) -> Tensor:
        """A few validation images, on the CPU; they are read once."""
        return probe_images(self.data)

    @property
    def window(self) -> int:
        """Updates in one window of the monitor."""
        window = self.config.monitor.window
        return _window(window, len(self.data.train), self.total_updates)


def prepare(config: DictConfig, folder: Path, interruption: Interruption | None = None) -> Run:
    """Build a run from ``config``, check its settings, and resume from a checkpoint if any.

    Raise ValueError for settings that cannot work.
    """
    interruption = interruption or Interruption()
    parts = build_parts(config)
    agree_on_data(parts.data)
    distributed.from_primary(parts.data.digest)  # of the data that the run begins with
    found = find(config.resume, folder, parts.plain, parts.model, parts.data.digest, check_state)
    goes_on = found.source if found is not None and not found.branches else None
    facts = look_at_data(parts.data, parts.plain["data"].get("leakage", WARN), goes_on)
    loaded = load_start(parts.model, config) if found is None else []
    monitor = build_monitor(parts)
    check(parts, monitor)
    ema = WeightEMA(parts.model, config.ema) if config.ema else None
    trunk = _trunk(parts, found)
    if trunk is not None:
        found = trunk.enter(parts.policy, parts.model, found, folder, interruption)
    run = begin(parts, monitor, ema, trunk, found, folder, interruption)
    tell_data(run, facts, again=goes_on is not None)
    for line in loaded:
        run.log.line(f"starts from {line}")
    return resume(run, found)


def tell_data(run: Run, facts: DataFacts, again: bool) -> None:
    """Say what the data are, unless the run says it ``again``, and keep it with the run."""
    run.data_facts = facts
    keep_facts(facts, run.log.folder)
    for line in () if again else facts.lines:
        run.log.line(line)


def load_start(model: nn.Module, config: DictConfig) -> list[str]:
    """Give ``model`` the weights that it starts from, in place; return a line on each of them."""
    lines = []
    if config.init_checkpoint is not None:
        lines.append(load_weights(model, config.init_checkpoint))
    if config.init_adapter is not None:
        lines.append(merge_adapter(model, Path(config.init_adapter), alone=not lines))
    return lines


def merge_adapter(model: nn.Module, folder: Path, alone: bool) -> str:
    """Merge the adapter of a folder into ``model``, in place; return a line on it.

    ValueError if the folder has a base model, and the start is not it ``alone``.
    """
    has_base = (folder / RESIDUAL).is_file()
    if has_base and not alone:
        raise ValueError(
            f"init_adapter={folder} has its own base model, {RESIDUAL}: leave init_checkpoint out"
        )
    try:
        load_adapter(model, folder)
    except ValueError as error:
        raise ValueError(f"init_adapter={folder}: {error}") from error
    merged = len(merge(model))
    where = " into their base" if has_base else ""
    return f"{folder}: adapters of {merged} linears, merged{where}"


def build_parts(config: DictConfig) -> Parts:
    """Build the data, the model, the policy and the recipes that ``config`` describes."""
    check_config(as_plain(config))
    config = with_choices(config)
    plain = as_plain(config)
    random_seed(config.seed)
    if config.system.threads:
        torch.set_num_threads(config.system.threads)
    device = find_device("system.device", config.system.device)
    set_backends(device, config.system.tf32, config.system.deterministic)
    set_rates_of(device, config.adapter.precision)
    sinks = {name: build(section) for name, section in (config.log.get("sinks") or {}).items()}
    data = _build_data(config)
    data.to(device)
    sharded = config.system.parallel == "fsdp"
    return Parts(
        config=config,
        plain=plain,
        device=device,
        data=data,
        model=build(config.model).to("cpu" if sharded else device),
        policy=build(config.switch),
        recipes=build_recipes(config),
        total_updates=max(1, round(config.length * config.epochs * len(data.train))),
        sinks=sinks,
    )


def set_rates_of(device: torch.device, precision: str) -> None:
    """Let products with adapters choose their form by the rates of the GPU, if it is known."""
    if device.type == "cuda":
        found = hardware_like(torch.cuda.get_device_name(device))
        priced = "fp32" if precision == "fp32" else "bf16"
        set_rates("cuda", None if found is None else found.rates(priced))


def build_monitor(parts: Parts) -> UpdateMonitor:
    """Build the monitor of the policy's targets; their weights are its first references."""
    options = parts.config.monitor
    targets = parts.policy.find_targets(parts.model)
    if options.device == "auto":
        device = place_of_references(parts.model, targets, parts.device)
    else:
        device = find_device("monitor.device", options.device)
    own = {**options, "window": parts.window, "device": device}
    return UpdateMonitor(parts.model, targets, **own)


def place_of_references(
    model: nn.Module, targets: Mapping[str, Target], device: torch.device
) -> torch.device:
    """Return the ``device`` that trains if it is a GPU with room for the monitor's copies.

    Otherwise return the CPU. There is room if they take no more than ``REFERENCES`` of its memory.
    """
    if device.type != "cuda":
        return torch.device("cpu")
    wanted = sum(target.weight(model).nbytes for target in targets.values())
    _, memory = torch.cuda.mem_get_info(device)
    return device if wanted <= REFERENCES * memory else torch.device("cpu")


def check(parts: Parts, monitor: UpdateMonitor) -> None:
    """Try what the run will do, without an update. Raise ValueError where that does not work."""
    model, policy = parts.model, parts.policy
    images = parts.images.to(_device_of(model))
    for phase in (Phase.FULL, Phase.ADAPTER):
        check_options(phase, parts.recipes[phase], model, parts.total_updates)
    check_outputs(model, images, parts.data.num_classes)
    check_adapters_work(model, monitor.targets.values(), images)
    check_kind(policy, parts.recipes[Phase.ADAPTER], parts.config.ema)
    rehearse_switch(model, policy, monitor, parts.config.system.parallel)
    check_recipes(parts.recipes, policy, len(parts.data.train), parts.sharded)
    check_refactored_start(parts.recipes[Phase.ADAPTER], policy, model, monitor)


def begin(
    parts: Parts,
    monitor: UpdateMonitor,
    ema: WeightEMA | None,
    trunk: Trunk | None,
    found: Found | None,
    folder: Path,
    interruption: Interruption,
) -> Run:
    """Return the run where ``found`` left it, with all but the tensors of the checkpoint."""
    config, model, policy = parts.config, parts.model, parts.policy
    state, ledger = restore_parts(found, model, monitor)
    unused = _freeze_unused(parts)
    if not state.full_parameters:
        state.full_parameters = [n for n, p in model.named_parameters() if p.requires_grad]
    state.full_parameters = [name for name in state.full_parameters if name not in unused]
    restarted = found is not None and follows_switch(state, found.state["start"])
    recipe = recipe_of(state.phase, parts.recipes, policy, state.taken_back, restarted)
    last_update = min(parts.total_updates, config.max_updates or parts.total_updates)
    run = Run(
        config=parts.plain,
        data=parts.data,
        policy=policy,
        recipes=parts.recipes,
        learner=_first_learner(parts, recipe, found),
        monitor=monitor,
        state=state,
        ledger=ledger,
        stopwatch=Stopwatch(parts.device),
        saves=SaveSchedule(**config.checkpoint),
        log=_open_log(parts, folder, last_update, found),
        ema=ema,
        total_updates=parts.total_updates,
        last_update=last_update,
        window=parts.window,
        probe=_probe(parts),
        interruption=interruption,
        trunk=trunk,
    )
    run.log.line(machine_line(parts.device))
    missing = missing_compiler() if parts.device.type == "cuda" and not recipe.compiles else None
    if missing is not None:
        run.log.line(f"blocks are not compiled, which makes a GPU slow: there is not {missing}")
    run.log.line(coverage_line(model, monitor.known.values()))
    if config.monitor.window not in (parts.window, "epoch"):
        run.log.line(
            f"monitor.window: {parts.window} updates, a tenth of the run, which has fewer than "
            f"{config.monitor.window}"
        )
    for key in from_environment(config):
        run.log.line(f"{key} comes from the environment: the run's files keep its value in clear")
    length = Length(last_update, len(parts.data.train), parts.window)
    for line in doubts(parts.plain, policy, length):
        run.log.line(f"warning: {line}")
    if unused:
        run.log.line(f"frozen, since no gradient reaches them: {', '.join(unused)}")
    return run


def resume(run: Run, found: Found | None) -> Run:
    """Load tensors and random states of ``found`` into the run; without it, seed the run."""
    if found is None:
        random_seed(run.config["seed"], distributed.rank())  # whatever was drawn on the way
    else:
        restore(run, found)
        give_back(found)
    return run


def with_choices(config: DictConfig) -> DictConfig:
    """Return ``config`` with this device's precision and compiler, where it says 'auto'.

    So a run's files say how it computed, and no run goes on in another precision unnoticed.
    """
    config = deepcopy(config)
    recipes = [config.full, config.adapter]
    if not any(CHOSEN_HERE in (recipe.precision, recipe.compile) for recipe in recipes):
        return config
    device = find_device("system.device", config.system.device)
    for recipe in recipes:
        recipe.precision = precision_of(recipe.precision, device)
        recomputed = recipe.activation_checkpointing
        recipe.compile = chosen_compiler(recipe.compile, device, recomputed, recipe.accumulation)
    return config


def build_recipes(config: DictConfig) -> dict[Phase, Recipe]:
    """Build one recipe for each phase.

    The full phase has ``config.full``. All other phases use ``config.adapter``. The joint phase
    has no ramp of the learning rate, and averages all gradients. While weights still train in
    full, a ramp must be asked for.
    """
    full, adapter = build(config.full), build(config.adapter)
    asked = adapter.rewarmup_updates or 0
    return {
        Phase.FULL: full,
        Phase.JOINT: replace(adapter, rewarmup_updates=0, before_ddp=None),
        Phase.STAGED: replace(adapter, rewarmup_updates=asked),
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


def _freeze_unused(parts: Parts) -> list[str]:
    """Freeze parameters that DDP would wait for in vain, and return their names."""
    if distributed.world_size() == 1 or parts.sharded:
        return []
    return freeze_unused(parts.model, parts.images.to(parts.device))


def _probe(parts: Parts) -> Tensor:
    """Return the probe images, the same on all ranks, on the device that trains."""
    images = distributed.from_primary(lambda: parts.images)
    return images.to(parts.device)


def _trunk(parts: Parts, found: Found | None) -> Trunk | None:
    """Return the run's trunk, or None.

    There is none in these cases:
    - ``trunk.dir`` is unset, or 'auto' outside a multirun,
    - the run has already changed its trained tensors,
    - the run branched off from another run.
    """
    options = {**parts.plain["trunk"]}
    place = options.pop("dir")
    if place in (None, AUTO):
        return None
    if found is not None:
        past = found.state["train"]
        if found.branches or past["branched_from"] or past["transitions"]:
            return None
    key = distributed.from_primary(
        lambda: trunk_key(parts.plain, parts.device, parts.data.digest())
    )
    return Trunk(Path(place), key, **options)


def _first_learner(parts: Parts, recipe: Recipe, found: Found | None) -> Learner:
    """Return the learner of the start; ``check_options`` has tried its schedule to the end."""
    start = found.state["start"] if found else 0
    system = parts.config.system
    how = {"parallel": system.parallel, "device": parts.device, "compress": system.compress}
    try:
        return build_learner(parts.model, recipe, parts.total_updates, start, **how)
    except ODD as error:
        raise ValueError(f"full.optimizer or full.scheduler: {error}") from error


def _open_log(parts: Parts, folder: Path, last_update: int, found: Found | None) -> RunLog:
    """Return the log of the run in ``folder``.

    The primary rank also writes the run's config there. It removes the summary of an earlier start
    that stopped.
    """
    config = parts.config
    log = RunLog(
        folder,
        parts.plain,
        total_updates=last_update,
        sinks={**_wandb(config, folder, found), **parts.sinks},
        words=telling_words(config),
        progress=config.log.progress,
        position=found.state["log"] if found else None,
        source=found.source if found else None,
    )
    if distributed.is_primary():
        write_whole(folder / CONFIG, OmegaConf.to_yaml(config, resolve=True))
        (folder / SUMMARY).unlink(missing_ok=True)
    return log


def _wandb(config: DictConfig, folder: Path, found: Found | None) -> dict[str, Sink]:
    """Return the run in W&B, by that name; nothing without one."""
    given = as_plain(config.log.wandb)
    words = telling_words(config)
    defaults = {
        "project": PROJECT,
        "name": "_".join(words),
        "tags": words[:-1],
        "job_type": "train",
    }
    options = wandb_options(given, defaults)
    if options["mode"] == "disabled":
        return {}
    known = found.state["log"]["wandb_id"] if found and found.source == folder else None
    return {"W&B": WandbLog(options, known)}


def telling_words(config: DictConfig) -> list[str]:
    """Return what tells a run from others: name, method or criterion, model, data, seed.

    Without Hydra the choices of the groups are not known, and are left out.
    """
    words = [] if config.name == "run" else [str(config.name)]
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    if config.method is not None:
        words.append(str(config.method))
    elif choices:
        words.append(choices["switch/criterion"])
    if choices:
        words += [choices["model"], choices["data"]]
    return [*words, f"seed{config.seed}"]
