"""Everything one run works with."""

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


def recipe_of(
    phase: Phase, recipes: Mapping[Phase, Recipe], policy: SwitchPolicy, state: TrainState
) -> Recipe:
    """The recipe of a phase; with a ramp for a full phase that comes after an adapter's."""
    recipe = recipes[phase]
    if phase is Phase.FULL and state.taken_back and policy.guard is not None:
        return replace(recipe, rewarmup_updates=policy.guard.rewarmup_updates)
    return recipe


def probe_images(data: Data, device: torch.device) -> Tensor:
    """The first images of the validation split on ``device``."""
    images, _ = next(iter(data.val))
    return images[:PROBE_IMAGES].to(device)
