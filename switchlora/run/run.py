"""Run: the objects that one run works with, and the values derived from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from switchlora.adapters import count_parameters, skipped_flops
from switchlora.data import Data
from switchlora.learner import (
    Learner,
    Pending,
    Recipe,
    Stopwatch,
    WeightEMA,
    build_learner,
    evaluate,
)
from switchlora.monitor import UpdateMonitor
from switchlora.policy import SwitchPolicy
from switchlora.process import Interruption, Question, distributed
from switchlora.run.leakage import DataFacts
from switchlora.run.state import Ledger, Phase, TrainState
from switchlora.storage import (
    Background,
    RunLog,
    SaveSchedule,
)
from switchlora.sweep import Trunk
from switchlora.switching import Controller, Scene

PROBE_IMAGES = 16
Segment = tuple[Phase, int, dict[str, Any]]


@dataclass
class Run:
    """Everything one run works with.

    A switch replaces ``learner``. Training changes ``state``, ``monitor``, ``stopwatch`` and
    ``ema`` in place. The configuration, data, policy and recipes stay as they are.
    """

    config: dict[str, Any]
    data: Data
    policy: SwitchPolicy
    recipes: dict[Phase, Recipe]
    learner: Learner
    monitor: UpdateMonitor
    state: TrainState
    ledger: Ledger
    stopwatch: Stopwatch
    saves: SaveSchedule
    log: RunLog
    ema: WeightEMA | None
    total_updates: int
    """updates of the run's ``length``; the learning rate schedule spans them"""
    last_update: int
    """updates after which the run ends: ``total_updates`` or a smaller ``max_updates``"""
    window: int
    """updates in one window of the monitor"""
    probe: Tensor
    """a few validation images, the same on all ranks; a change of the model must not change the
    logits on them"""
    writer: Background = field(default_factory=Background)
    """writes checkpoints while a GPU trains"""
    interruption: Interruption = field(default_factory=Interruption)
    question: Question = field(default_factory=Question)
    """whether a rank wants to save or to leave"""
    trunk: Trunk | None = None
    """the full phase shared with runs that differ only in their switch; None without one"""
    data_facts: DataFacts | None = None
    """hashes of the splits, and what they share"""
    skipped: set[str] = field(default_factory=set)
    """the images that no rank could read, as far as they have been told"""
    starts_elsewhere: bool = False
    """whether this run started from another run's checkpoint"""
    pending: Pending | None = None
    """the update that was launched and whose outcome is not yet read"""
    control: Controller = field(init=False)
    """says when the model changes, and makes the change"""

    def __post_init__(self) -> None:
        parts = (self.policy, self.monitor, self.state, self.window)
        self.control = Controller(*parts, len(self.data.train))

    @property
    def model(self) -> nn.Module:
        """The model that trains: the plain module, or the module sharded over the ranks."""
        return self.learner.model

    @property
    def batch_size(self) -> int:
        """Number of images in one update, summed over all ranks."""
        return self.config["data"]["batch_size"]

    @property
    def share(self) -> int:
        """Number of inputs of one update on one rank, rounded up."""
        return math.ceil(self.batch_size / distributed.world_size())

    @property
    def epoch(self) -> float:
        """Epochs done so far; fractional in the middle of an epoch."""
        return self.state.epoch + self.state.position / len(self.data.train)

    @property
    def over(self) -> bool:
        """Whether all training and evaluation is done."""
        state = self.state
        cut = state.num_updates >= self.last_update and state.position == 0
        return cut or state.epoch >= self.config["epochs"]

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    def evaluate(self, loader: DataLoader) -> dict[str, float]:
        """Return the metrics of the model over ``loader``.

        With a weight average (EMA), its metrics are added under names that begin with ``ema_``.
        """
        metrics = evaluate(self.model, loader, self.recipe.precision)
        if self.ema is not None:
            averaged = evaluate(self.ema.model, loader, self.recipe.precision)
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
        return metrics

    def sum_flops(self) -> int | None:
        """Return the FLOPs of the learner's first update, summed over all ranks.

        None when they are unknown. All ranks must call it.
        """
        counted = distributed.gather(self.learner.flops)
        if None in counted:
            return None
        return sum(flops for flops in counted if flops is not None)

    def segment(self) -> Segment:
        """Return the present phase, its last update, and figures of the training since it began.

        They are throughput, memory, trained parameters and the last val top1.
        """
        last = self.ledger.last_eval
        figures = self.stopwatch.summary(self.batch_size, len(self.data.train)) | {
            "trainable_parameters": count_parameters(self.model, trainable=True),
            "val_top1": None if last is None else last["top1"],
        }
        return self.state.phase, self.state.num_updates, figures

    @property
    def recipe(self) -> Recipe:
        """The recipe (optimizer and schedule) of the present phase."""
        return self.recipe_of(self.state.phase, start=self.learner.start)

    def recipe_of(
        self, phase: Phase, taken_back: int | None = None, start: int | None = None
    ) -> Recipe:
        """Return the recipe of a learner of ``phase`` that takes over at ``start`` (None: now).

        A full phase to which the guard has returned ramps its learning rate over the guard's
        ``rewarmup_updates``. ``taken_back`` is the number of such returns (None: those so far).
        """
        returns = self.state.taken_back if taken_back is None else taken_back
        since = self.state.num_updates if start is None else start
        follows = follows_switch(self.state, since)
        return recipe_of(phase, self.recipes, self.policy, returns, follows)

    @property
    def micro_batch(self) -> int:
        """Number of inputs of one micro-batch on one rank, rounded up."""
        return math.ceil(self.share / self.recipe.accumulation)

    def read_inputs(self) -> Tensor:
        """Read validation inputs, as many as one micro-batch of training has.

        There are fewer when the first validation batch is smaller than that.
        """
        inputs, _ = next(iter(self.data.val))
        return inputs[: self.micro_batch].to(self.device)

    def all_skipped(self) -> set[str]:
        """Return the names of the images that have turned out to be unreadable, on any rank.

        All ranks must call it.
        """
        if not self.config["data"].get("skip_unreadable"):
            return self.skipped
        return self.skipped.union(*distributed.gather(self.data.skipped()))

    def count_flops(self) -> None:
        """Add the FLOPs of the update that was just made to ``ledger.train_flops``.

        What guided layers skipped in the joint phase is subtracted. The total becomes None when
        the FLOPs of an update are unknown.
        """
        ledger = self.ledger
        known, total = ledger.flops[self.state.phase], ledger.train_flops
        if known is None or total is None:
            ledger.train_flops = None
        else:
            ledger.train_flops = total + known - self._skipped_flops()

    def _skipped_flops(self) -> int:
        """Return the FLOPs of an update that guided layers leave out in the joint phase."""
        if self.state.phase is not Phase.JOINT:
            return 0
        again = 4 / 3 if self.recipe.activation_checkpointing == "blocks" else 1
        return round(skipped_flops(self.model) * distributed.world_size() * again)

    def scene(self, recipe: Recipe) -> Scene[Learner]:
        """Return what a change of the trained tensors works on; ``recipe`` trains after it."""
        rebuild = partial(self.build_learner, recipe=recipe)
        return Scene(self.learner, self.policy, self.monitor, self.probe, rebuild)

    def build_learner(self, model: nn.Module, recipe: Recipe) -> Learner:
        """Build a fresh learner for the plain ``model``.

        Its fp16 loss scale continues from the present learner's.
        """
        return build_learner(
            model,
            recipe,
            self.total_updates,
            start=self.state.num_updates,
            parallel=self.config["system"]["parallel"],
            scaler=self.learner.scaler,
            device=self.device,
            compress=self.config["system"]["compress"],
        )


def follows_switch(state: TrainState, start: int) -> bool:
    """Return whether a learner that takes over at ``start`` is a later one than the switch's."""
    return state.last_stage is not None and start > state.last_stage


def recipe_of(
    phase: Phase,
    recipes: Mapping[Phase, Recipe],
    policy: SwitchPolicy,
    taken_back: int,
    restarted: bool,
) -> Recipe:
    """Return the recipe of ``phase`` after ``taken_back`` returns to full training.

    ``restarted`` says whether the learner follows the one that the switch built.
    """
    recipe, again = recipes[phase], None
    if phase is Phase.FULL and taken_back and policy.guard is not None:
        again = policy.guard.rewarmup_updates
    if phase is Phase.ADAPTER and restarted and policy.restart is not None:
        again = policy.restart.rewarmup_updates
    return recipe if again is None else replace(recipe, rewarmup_updates=again)


def probe_images(data: Data) -> Tensor:
    """Return the first ``PROBE_IMAGES`` images of the validation split, on the CPU."""
    images, _ = next(iter(data.val))
    return images[:PROBE_IMAGES].clone().cpu()  # a view would keep the whole batch
