"""Run: the objects that one run works with, and the values derived from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from switchlora.adapters import (
    Target,
    adapted_modules,
    count_parameters,
    skipped_flops,
)
from switchlora.data import Data
from switchlora.learner import (
    Learner,
    Recipe,
    Stopwatch,
    WeightEMA,
    build_learner,
    evaluate,
)
from switchlora.monitor import UpdateMonitor
from switchlora.policy import SwitchPolicy
from switchlora.process import Interruption, distributed
from switchlora.run.state import Phase, TrainState
from switchlora.storage import (
    RunLog,
    SaveSchedule,
)
from switchlora.sweep import Trunk

PROBE_IMAGES = 16


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
    stopwatch: Stopwatch
    saves: SaveSchedule
    log: RunLog
    ema: WeightEMA | None
    total_updates: int
    """updates in all epochs; the learning rate schedule spans them"""
    last_update: int
    """updates after which the run ends: ``total_updates`` or a smaller ``max_updates``"""
    window: int
    """updates in one window of the monitor"""
    interruption: Interruption = field(default_factory=Interruption)
    trunk: Trunk | None = None
    """the full phase shared with runs that differ only in their switch; None without one"""
    starts_elsewhere: bool = False
    """whether this run started from another run's checkpoint"""

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
        return -(-self.batch_size // distributed.world_size())

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
    def probe(self) -> Tensor:
        """A few validation images, the same on all ranks.

        A switch compares the model's logits on them before and after.
        """
        images = distributed.from_primary(lambda: probe_images(self.data, torch.device("cpu")))
        return images.to(self.device)

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

    @property
    def flops_per_update(self) -> int | None:
        """FLOPs of the learner's first update, summed over all ranks; None with torch.compile."""
        counted = distributed.gather(self.learner.flops)
        return None if None in counted else sum(flops for flops in counted if flops is not None)

    def phase_summary(self) -> dict[str, Any]:
        """Return the present phase's throughput, memory, trained parameters and last val top1."""
        last = self.state.last_eval
        return self.stopwatch.summary(self.batch_size, len(self.data.train)) | {
            "trainable_parameters": count_parameters(self.model, trainable=True),
            "val_top1": None if last is None else last["top1"],
        }

    @property
    def recipe(self) -> Recipe:
        """The recipe (optimizer and schedule) of the present phase."""
        return recipe_of(self.state.phase, self.recipes, self.policy, self.state)

    @property
    def adapted_targets(self) -> dict[str, Target]:
        """The targets whose modules have an adapter now, by name."""
        adapted = adapted_modules(self.model)
        return {n: t for n, t in self.monitor.known.items() if t.module in adapted}

    @property
    def sample(self) -> Tensor:
        """Validation inputs, as many as one micro-batch of training has.

        There are fewer when the first validation batch is smaller than that.
        """
        inputs, _ = next(iter(self.data.val))
        return inputs[: -(-self.share // self.recipe.accumulation)].to(self.device)

    def count_flops(self) -> None:
        """Add the FLOPs of the update that was just made to ``state.train_flops``.

        What guided layers skipped in the joint phase is subtracted. The total becomes None when
        the FLOPs of an update are unknown.
        """
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
        """Build a fresh learner of ``phase`` for the plain ``model``.

        Its fp16 loss scale continues from the present learner's.
        """
        return build_learner(
            model,
            recipe_of(phase, self.recipes, self.policy, self.state),
            self.total_updates,
            start=self.state.num_updates,
            parallel=self.config["system"]["parallel"],
            scaler=self.learner.scaler,
        )


def recipe_of(
    phase: Phase, recipes: Mapping[Phase, Recipe], policy: SwitchPolicy, state: TrainState
) -> Recipe:
    """Return the recipe of ``phase``.

    When the guard has returned the run to full training, that full phase ramps its learning rate
    over the guard's ``rewarmup_updates``.
    """
    recipe = recipes[phase]
    if phase is Phase.FULL and state.taken_back and policy.guard is not None:
        return replace(recipe, rewarmup_updates=policy.guard.rewarmup_updates)
    return recipe


def probe_images(data: Data, device: torch.device) -> Tensor:
    """Return the first ``PROBE_IMAGES`` images of the validation split on ``device``."""
    images, _ = next(iter(data.val))
    return images[:PROBE_IMAGES].to(device)
