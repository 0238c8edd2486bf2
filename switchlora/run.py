"""Everything one run works with, built from its configuration and checked before it starts."""

from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from switchlora.criteria import Verdict, never
from switchlora.data import Data
from switchlora.ema import WeightEMA
from switchlora.engine import evaluate
from switchlora.errors import NothingMeasured
from switchlora.learner import Learner, Recipe, build_learner
from switchlora.monitor import UpdateMonitor
from switchlora.runlog import RunLog
from switchlora.state import Phase, TrainState
from switchlora.surgery import check_targets_are_called, count_parameters
from switchlora.switch import SwitchPolicy, SwitchReport, choose_ranks
from switchlora.throughput import Stopwatch

PROBE_IMAGES = 16

build = partial(instantiate, _convert_="all")


@dataclass
class Run:
    """Everything one run works with. Only ``learner``, ``monitor`` and the records change."""

    data: Data
    model: nn.Module
    policy: SwitchPolicy
    recipes: dict[Phase, Recipe]
    learner: Learner
    monitor: UpdateMonitor | None
    state: TrainState
    stopwatch: Stopwatch
    log: RunLog
    ema: WeightEMA | None
    batch_size: int
    epochs: int
    total_updates: int
    """updates of all epochs, which the schedule is drawn over"""
    last_update: int
    """where max_updates ends the run"""
    max_skipped: int
    log_every: int
    figures: bool
    phases: dict[Phase, dict[str, Any]] = field(default_factory=dict)
    """figures of each phase that has ended"""
    verdict: Verdict | None = None
    switch_report: SwitchReport | None = None
    last_eval: dict[str, float] | None = None

    @property
    def probe(self) -> Tensor:
        """A few validation images, on which the drift of the switch is measured."""
        return probe_images(self.data, self.device)

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

    def phase_summary(self) -> dict[str, Any]:
        """Throughput, memory and trained parameters of the present phase."""
        return self.stopwatch.summary(self.batch_size, len(self.data.train)) | {
            "trainable_parameters": count_parameters(self.model, trainable=True),
            "val_top1": None if self.last_eval is None else self.last_eval["top1"],
        }

    @property
    def recipe(self) -> Recipe:
        """The recipe of the present phase."""
        return self.recipes[self.state.phase]


def prepare(config: DictConfig, folder: Path) -> Run:
    """Build data, model, policy, recipes and the first learner; check what can be checked."""
    for key, least in {"epochs": 1, "seed": 0, "max_skipped": 0, "log.every": 1}.items():
        check_whole(config, key, least)
    if config.max_updates is not None:
        check_whole(config, "max_updates", 1)
    random_seed(config.seed)
    if config.system.threads:
        torch.set_num_threads(config.system.threads)
    device = _device(config.system.device)
    system = config.system
    data = build(
        config.data, seed=config.seed, workers=system.workers, pin_memory=system.pin_memory
    )
    total_updates = config.epochs * len(data.train)
    last_update = min(total_updates, config.max_updates or total_updates)
    window = _window(config.monitor.window, len(data.train), total_updates)
    model = build(config.model).to(device)
    policy = build(config.switch)
    recipes = {Phase.FULL: build(config.full), Phase.ADAPTER: build(config.adapter)}
    targets = policy.find_targets(model)
    check_targets_are_called(model, targets.values(), probe_images(data, device))
    _device(config.monitor.device)
    monitor = UpdateMonitor(model, targets, **{**config.monitor, "window": window})
    _check_switch(model, policy, monitor)
    learner = _first_learner(model, recipes[Phase.FULL], total_updates)
    ema = WeightEMA(model, config.ema) if config.ema else None
    log = RunLog(
        folder,
        as_plain(config),
        total_updates=last_update,
        wandb=_wandb_options(config),
        progress=config.log.progress,
    )
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    return Run(
        data=data,
        model=model,
        policy=policy,
        recipes=recipes,
        learner=learner,
        monitor=monitor,
        state=TrainState(),
        stopwatch=Stopwatch(device),
        log=log,
        ema=ema,
        batch_size=config.data.batch_size,
        epochs=config.epochs,
        total_updates=total_updates,
        last_update=last_update,
        max_skipped=config.max_skipped,
        log_every=config.log.every,
        figures=config.log.figures,
    )


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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device '{name}' cannot be used: {reason}") from error


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


def _check_switch(model: nn.Module, policy: SwitchPolicy, monitor: UpdateMonitor) -> None:
    if policy.criterion is never:
        return
    with nullcontext() if policy.decide([]).fires else suppress(NothingMeasured):
        choose_ranks(model, policy, monitor, [])
        name, update = next(iter(monitor.updates().items()))
        policy.init(monitor.targets[name].weight(model), update, 1)


def _first_learner(model: nn.Module, recipe: Recipe, total_updates: int) -> Learner:
    try:
        return build_learner(model, recipe, total_updates)
    except TypeError as error:
        raise ValueError(f"full.optimizer or full.scheduler: {error}") from error


def _wandb_options(config: DictConfig) -> dict[str, Any] | None:
    options = as_plain(config.log.wandb)
    return None if options["mode"] == "disabled" else options
