"""``LowRankSwitchCallback``: the switch in the ``Trainer`` of Hugging Face's transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from switchlora.adapters import adapted_modules, merged_state_dict
from switchlora.loop import LowRankSwitch
from switchlora.process import distributed

SWITCH = "low_rank_switch.pt"
OPTIMIZER_NAME, SCHEDULER_NAME = "optimizer.pt", "scheduler.pt"


class LowRankSwitchCallback(TrainerCallback):
    """Measures, decides and switches while a ``Trainer`` trains; ``switch`` has what it found.

    ``options`` are those of ``LowRankSwitch``. Measurements are entries of
    ``trainer.state.log_history``. A checkpoint holds merged weights after the switch, which
    ``from_pretrained`` reads, and the switch's own state. Training goes on from a checkpoint that
    was written before the switch; ``resume_from_checkpoint`` says from which, where it is not in
    the trainer's output folder.

    ValueError for several processes, and for a checkpoint that was written after the switch.
    """

    def __init__(self, resume_from_checkpoint: Path | str | None = None, **options: Any) -> None:
        self.options = options
        self.checkpoint = resume_from_checkpoint
        self.switch: LowRankSwitch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begin to measure; go on from the checkpoint that the trainer goes on from."""
        if args.world_size > 1 or distributed.world_size() > 1:
            raise ValueError(
                "LowRankSwitchCallback works in one process: for several Trainer keeps a wrapper, "
                "which a switch would have to make anew; use a loop of your own, or switchlora"
            )
        model, optimizer = given["model"], given["optimizer"]
        self.switch = LowRankSwitch(model, optimizer, given["lr_scheduler"], **self.options)
        if state.global_step:
            self._go_on(Path(self.checkpoint or _checkpoint(args, state)))

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

        The optimizer's state then goes: it is that of factors, which the weights no longer have.
        """
        assert self.switch is not None
        folder = _checkpoint(args, state)
        torch.save(self.switch.state_dict(), folder / SWITCH)
        if self.switch.switched:
            save_merged(given["model"], folder)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
                (folder / name).unlink(missing_ok=True)

    def _go_on(self, folder: Path) -> None:
        assert self.switch is not None
        if not (folder / SWITCH).is_file():
            raise ValueError(
                f"{folder / SWITCH} is missing: name the checkpoint that the trainer goes on "
                "from, LowRankSwitchCallback(resume_from_checkpoint=...)"
            )
        kept = torch.load(folder / SWITCH, weights_only=True)
        if kept["switched_at"] is not None:
            raise ValueError(
                f"{folder} was written after the switch, at update {kept['switched_at']}: its "
                "weights are merged, and Trainer cannot load the optimizer of an adapter; go on "
                "from a checkpoint before the switch, or train the adapter with PEFT"
            )
        self.switch.load_state_dict(kept)


def save_merged(model: nn.Module, folder: Path | str) -> None:
    """Write ``model`` with its adapters merged, as ``from_pretrained`` reads it.

    It does nothing for a model without adapters. Call it after ``trainer.save_model`` too.
    """
    if adapted_modules(model):
        for file in Path(folder).glob("model*.safetensors*"):
            file.unlink()
        model.save_pretrained(folder, state_dict=merged_state_dict(model))  # type: ignore[operator]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
