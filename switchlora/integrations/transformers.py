"""``LowRankSwitchCallback``: the switch in the ``Trainer`` of Hugging Face's transformers."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from switchlora.adapters import (
    adapted_modules,
    adapted_state_dict,
    adapter_layout,
    inject_empty,
    merge,
    merged_state_dict,
)
from switchlora.criteria import reads_loss
from switchlora.loop import LowRankSwitch
from switchlora.process import distributed
from switchlora.storage import save_merged as save_merged_file

WEIGHTS = "model.safetensors"
SWITCH = "low_rank_switch.pt"
ADAPTED = "adapted"
"""key of the file ``SWITCH`` that holds the tensors of the linears with adapters, unmerged"""
OURS = {"optimizer.pt": "low_rank_optimizer.pt", "scheduler.pt": "low_rank_scheduler.pt"}
"""by the name that Trainer gives a file, and would load into the plain model's optimizer, the one
that it has after the switch"""


class LowRankSwitchCallback(TrainerCallback):
    """Measures, decides and switches while a ``Trainer`` trains; ``switch`` has what it found.

    ``options`` are those of ``LowRankSwitch``. Measurements are entries of
    ``trainer.state.log_history``. A checkpoint holds merged weights after the switch, which
    ``from_pretrained`` reads, and beside them what training goes on with: the switch's own state,
    the adapters, the optimizer and the scheduler. ``resume_from_checkpoint`` says from which
    checkpoint, where it is not in the trainer's output folder.

    ValueError for several processes, for a model that has adapters already, for a criterion that
    reads the loss, which a trainer does not tell of an update, and for a checkpoint that is not
    the one that the trainer loaded. A guard that reads the loss never acts.
    """

    def __init__(self, resume_from_checkpoint: Path | str | None = None, **options: Any) -> None:
        self.options = options
        self.checkpoint = resume_from_checkpoint
        self.switch: LowRankSwitch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begin to measure; go on from the checkpoint that the trainer goes on from.

        By now the trainer has loaded the merged weights, and no optimizer of an adapter.
        """
        if args.world_size > 1 or distributed.world_size() > 1:
            raise ValueError(
                "LowRankSwitchCallback works in one process: for several Trainer keeps a wrapper, "
                "which a switch would have to make anew; use a loop of your own, or switchlora"
            )
        model, optimizer = given["model"], given["optimizer"]
        if adapted_modules(model):
            raise ValueError(
                "the model has adapters already, from a training before: give a new Trainer the "
                "model of from_pretrained, and train(resume_from_checkpoint=...) to go on"
            )
        self.switch = LowRankSwitch(model, optimizer, given["lr_scheduler"], **self.options)
        if reads_loss(self.switch.policy.criterion):
            raise ValueError(
                "the criterion reads the loss, which a Trainer does not tell of each update: take "
                "one that reads how far weights move, such as UpdateNorm()"
            )
        if state.global_step:
            place = Path(self.checkpoint or _checkpoint(args, state))
            self._go_on(place, state, given["lr_scheduler"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Count an update, and note what was measured."""
        switch = self.switch
        assert switch is not None
        known = len(switch.history)
        switch.step()
        if len(switch.history) > known:
            state.log_history.append({"step": state.global_step, **switch.log_dict()})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Write the switch's state into the checkpoint, and merged weights after the switch.

        The files of optimizer and scheduler then get names of ours: they belong to the adapters.
        """
        assert self.switch is not None
        folder, model = _checkpoint(args, state), given["model"]
        kept = {**self.switch.state_dict(), ADAPTED: adapted_state_dict(model)}
        torch.save(kept, folder / SWITCH)
        if self.switch.regrouped:
            save_merged(model, folder)
            for theirs, ours in OURS.items():
                if (folder / theirs).is_file():
                    (folder / theirs).replace(folder / ours)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Give the model the best weights again, where the trainer loads them at the end.

        It has loaded them merged, beside the factors that the model has now.
        """
        model, best = given["model"], state.best_model_checkpoint
        if not (args.load_best_model_at_end and best and adapted_modules(model)):
            return
        kept = _read(Path(best))
        if kept["layout"] != adapter_layout(model):
            merge(model)
            inject_empty(model, kept["layout"])
        _load_weights(model, Path(best), kept)

    def _go_on(self, folder: Path, state: TrainerState, scheduler: Any) -> None:
        assert self.switch is not None
        kept = _read(folder)
        if kept["num_updates"] != state.global_step:
            raise ValueError(
                f"{folder} is of update {kept['num_updates']}, but the trainer goes on from "
                f"update {state.global_step}: name its checkpoint, "
                "LowRankSwitchCallback(resume_from_checkpoint=...)"
            )
        self.switch.load_state_dict(kept)
        _load_weights(self.switch.model, folder, kept)
        for part, name in zip((self.switch.optimizer, scheduler), OURS.values(), strict=True):
            if (folder / name).is_file():  # neither before the switch nor with save_only_model
                part.load_state_dict(_load(folder / name))


def save_merged(model: nn.Module, folder: Path | str) -> None:
    """Write ``model`` with its adapters merged, as ``from_pretrained`` reads it.

    It does nothing for a model without adapters. Call it after ``trainer.save_model`` too.
    """
    if not adapted_modules(model):
        return
    for file in Path(folder).glob("model*.safetensors*"):
        file.unlink()
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, state_dict=merged_state_dict(model))
    else:
        save_merged_file(model, Path(folder) / WEIGHTS)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _read(folder: Path) -> dict[str, Any]:
    """Return the switch's state in a checkpoint; ValueError if training cannot go on from it."""
    if not (folder / SWITCH).is_file():
        raise ValueError(
            f"{folder / SWITCH} is missing: name the checkpoint that the trainer goes on "
            "from, LowRankSwitchCallback(resume_from_checkpoint=...)"
        )
    kept = _load(folder / SWITCH)
    if kept["layout"] and not kept.get(ADAPTED):
        raise ValueError(
            f"{folder} was written after the switch, at update {kept['switch_update']}, by a "
            "version that kept the merged weights alone: go on from a checkpoint before the switch"
        )
    return kept


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged, or no file of torch: go on from another checkpoint"
        ) from error


def _load_weights(model: nn.Module, folder: Path, kept: Mapping[str, Any]) -> None:
    """Load the weights of a checkpoint, and what was ``kept`` of its adapters.

    The trainer's own loading misses weights that have other names in files of transformers.
    """
    if isinstance(model, PreTrainedModel):
        merged = type(model).from_pretrained(folder).state_dict()
    else:
        merged = load_file(folder / WEIGHTS)
    model.load_state_dict(merged, strict=False)
    model.load_state_dict(kept.get(ADAPTED) or {}, strict=False)
