"""Everything one run works with, built from its configuration and checked before it starts."""

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from switchlora import distributed
from switchlora.checkpoint import (
    SaveSchedule,
    learner_state,
    load_tensors,
    random_states,
    set_random_states,
)
from switchlora.criteria import never
from switchlora.data import Data
from switchlora.ema import WeightEMA
from switchlora.engine import evaluate
from switchlora.errors import NothingMeasured, check_choice
from switchlora.interrupt import Interruption
from switchlora.layers import FACTORS, adapted_linear
from switchlora.learner import PARALLEL, Learner, Recipe, build_learner, check_goes_with_fsdp
from switchlora.lowrank import skipped_flops
from switchlora.models import load_weights
from switchlora.monitor import LayerStats, Measurement, UpdateMonitor
from switchlora.operation import trained_tensors
from switchlora.plan import check_criterion, check_factors_alone, check_start, choose_ranks
from switchlora.policy import SwitchPolicy
from switchlora.resume import AUTO, Found, find
from switchlora.runlog import CONFIG, SUMMARY, RunLog
from switchlora.sharding import is_sharded
from switchlora.state import Phase, TrainState
from switchlora.surgery import (
    Target,
    adapted_modules,
    adapter_layout,
    check_targets_are_called,
    count_parameters,
    freeze_unused,
    inject_empty,
    matching,
    merged_state_dict,
)
from switchlora.throughput import Stopwatch
from switchlora.trunk import Trunk, give_back, trunk_key

PROBE_IMAGES = 16

build = partial(instantiate, _convert_="all")


@dataclass
class Run:
    """Everything one run works with. Only ``learner``, ``monitor`` and the state change."""

    config: dict[str, Any]
    data: Data
    policy: SwitchPolicy
    recipes: dict[Phase, Recipe]
    learner: Learner
    monitor: UpdateMonitor
    state: TrainState
    stopwatch: Stopwatch
    saves: SaveSchedule
    log: RunLog
    ema: WeightEMA | None
    total_updates: int
    """updates of all epochs, which the schedule is drawn over"""
    last_update: int
    """where max_updates ends the run"""
    window: int
    """updates of a window of the monitor"""
    interruption: Interruption = field(default_factory=Interruption)
    trunk: Trunk | None = None
    """the full phase that it shares with runs that switch at another time"""
    starts_elsewhere: bool = False
    """whether this run goes on from a checkpoint that is not its own"""

    @property
    def model(self) -> nn.Module:
        """The model as it trains: plain, or sharded over the ranks."""
        return self.learner.model

    @property
    def batch_size(self) -> int:
        """Images of one update over all ranks."""
        return self.config["data"]["batch_size"]

    @property
    def share(self) -> int:
        """How many of a batch's inputs one rank gets."""
        return -(-self.batch_size // distributed.world_size())

    @property
    def epoch(self) -> float:
        """Epochs done, a fraction in the middle of one."""
        return self.state.epoch + self.state.position / len(self.data.train)

    @property
    def over(self) -> bool:
        """Whether nothing is left to train and to evaluate."""
        state = self.state
        cut = state.num_updates >= self.last_update and state.position == 0
        return cut or state.epoch >= self.config["epochs"]

    @property
    def probe(self) -> Tensor:
        """A few validation images, the same on all ranks, to measure the switch's drift on."""
        images = distributed.from_primary(lambda: probe_images(self.data, torch.device("cpu")))
        return images.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def evaluate(self, loader: DataLoader) -> dict[str, float]:
        """Metrics of the model over ``loader``, and under ``ema_`` names those of its average."""
        metrics = evaluate(self.model, loader, self.recipe.precision)
        if self.ema is not None:
            averaged = evaluate(self.ema.model, loader, self.recipe.precision)
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
        return metrics

    @property
    def flops_per_update(self) -> int | None:
        """Of the learner's first update, over all ranks; None with torch.compile."""
        counted = distributed.gather(self.learner.flops)
        return None if None in counted else sum(flops for flops in counted if flops is not None)

    def phase_summary(self) -> dict[str, Any]:
        """Throughput, memory and trained parameters of the present phase."""
        last = self.state.last_eval
        return self.stopwatch.summary(self.batch_size, len(self.data.train)) | {
            "trainable_parameters": count_parameters(self.model, trainable=True),
            "val_top1": None if last is None else last["top1"],
        }

    @property
    def recipe(self) -> Recipe:
        """The recipe of the present phase."""
        return recipe_of(self.state.phase, self.recipes, self.policy, self.state)

    @property
    def adapted_targets(self) -> dict[str, Target]:
        """The targets whose modules have adapters now."""
        adapted = adapted_modules(self.model)
        return {n: t for n, t in self.monitor.known.items() if t.module in adapted}

    @property
    def sample(self) -> Tensor:
        """Inputs from the validation split, as many as a micro-batch has where it has so many."""
        inputs, _ = next(iter(self.data.val))
        return inputs[: -(-self.share // self.recipe.accumulation)].to(self.device)

    def count_flops(self) -> None:
        """Add those of the update that was just made, with what guided layers left out."""
        known, total = self.state.flops[self.state.phase], self.state.train_flops
        if known is None or total is None:
            self.state.train_flops = None
        else:
            micro_batches = self.recipe.accumulation * distributed.world_size()
            again = 4 / 3 if self.recipe.activation_checkpointing == "blocks" else 1
            guided = self.state.phase is Phase.JOINT
            skipped = round(skipped_flops(self.model) * micro_batches * again) if guided else 0
            self.state.train_flops = total + known - skipped

    def build_learner(self, model: nn.Module, phase: Phase) -> Learner:
        """A fresh learner of ``phase`` for the plain ``model``; the loss scale goes on."""
        return build_learner(
            model,
            recipe_of(phase, self.recipes, self.policy, self.state),
            self.total_updates,
            start=self.state.num_updates,
            parallel=self.config["system"]["parallel"],
            scaler=self.learner.scaler,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors that, with those of the learner, make the run go on exactly.

        All ranks call it.
        """
        return {
            "config": self.config,
            "train": self.state.state_dict(),
            "adapters": adapter_layout(self.model),
            "start": self.learner.start,
            "monitor": self.monitor.state_dict(),
            "ema": self.ema and self.ema.state_dict(),
            "stopwatch": self.stopwatch.state_dict(),
            "log": self.log.position(),
            "random": distributed.gather(random_states()),
            **learner_state(self.learner),
        }

    def load(self, found: Found) -> None:
        """Become the run that ``found`` was saved by; the model has its adapters already."""
        saved = found.state
        self.starts_elsewhere = found.foreign
        lines = [*found.lines, *load_tensors(found.path, saved, self.learner, found.branches)]
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"] or merged_state_dict(self.model))
        self.stopwatch.load_state_dict(saved["stopwatch"])
        self.saves.done(self.state.num_updates)
        _set_random_states(saved["random"], self.config["seed"] + self.state.num_updates)
        for line in lines:
            self.log.line(line)
        self.log.line(
            f"resumed from {found.path}: {self.state.phase} phase, update {self.state.num_updates}"
        )
        if distributed.world_size() > 1 and not is_sharded(self.model):
            same = distributed.agreed_checksum(trained_tensors(self.model))
            self.log.line(distributed.agreement_line(same))


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
    policy = build(config.switch)
    recipes = build_recipes(config)
    targets = policy.find_targets(model)
    check_targets_are_called(model, targets.values(), probe_images(data, _device_of(model)))
    _device(config.monitor.device)
    monitor = UpdateMonitor(model, targets, **{**config.monitor, "window": window})
    _check_switch(model, policy, monitor, config.system.parallel)
    _check_adapter_recipe(recipes[Phase.ADAPTER], model, policy, len(data.train))
    if sharded:
        for recipe in recipes.values():
            check_goes_with_fsdp(recipe)
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
    log = RunLog(
        folder,
        plain,
        total_updates=last_update,
        wandb=_wandb_options(config),
        progress=config.log.progress,
        position=found.state["log"] if found else None,
        source=found.source if found else None,
    )
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
        log=log,
        ema=ema,
        total_updates=total_updates,
        last_update=last_update,
        window=window,
        interruption=interruption,
        trunk=trunk,
    )
    if distributed.is_primary():
        OmegaConf.save(config, folder / CONFIG, resolve=True)
        (folder / SUMMARY).unlink(missing_ok=True)  # of a start that stopped
    if loaded:
        log.line(f"starts from {loaded}")
    if unused:
        log.line(f"frozen, since no gradient reaches them: {', '.join(unused)}")
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


def recipe_of(
    phase: Phase, recipes: Mapping[Phase, Recipe], policy: SwitchPolicy, state: TrainState
) -> Recipe:
    """The recipe of a phase; with a ramp for a full phase that comes after an adapter's."""
    recipe = recipes[phase]
    if phase is Phase.FULL and state.taken_back and policy.guard is not None:
        return replace(recipe, rewarmup_updates=policy.guard.rewarmup_updates)
    return recipe


def as_plain(config: DictConfig) -> dict[str, Any]:
    """A config as plain dicts and lists, interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def probe_images(data: Data, device: torch.device) -> Tensor:
    """The first images of the validation split on ``device``."""
    images, _ = next(iter(data.val))
    return images[:PROBE_IMAGES].to(device)


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


def _check_adapter_recipe(
    recipe: Recipe, model: nn.Module, policy: SwitchPolicy, updates_per_epoch: int
) -> None:
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
    trained = set(found.state["trained"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
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


def _set_random_states(states: list[dict[str, Any]], seed: int) -> None:
    """This rank's generators as they were; those of a rank that was not there start anew."""
    if distributed.rank() < len(states):
        set_random_states(states[distributed.rank()])
    else:
        random_seed(seed, distributed.rank())


def _wandb_options(config: DictConfig) -> dict[str, Any] | None:
    options = as_plain(config.log.wandb)
    return None if options["mode"] == "disabled" else options
