"""``LowRankSwitchCallback``: the switch in the ``Trainer`` of Lightning.

It works with ``lightning.pytorch`` and with ``pytorch_lightning``.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from switchlora.adapters import (
    adapted_modules,
    adapted_state_dict,
    is_factor,
    merge,
    merged_state_dict,
)
from switchlora.loop import LowRankSwitch

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:
    try:
        Callback = import_module("pytorch_lightning.callbacks").Callback  # type: ignore[misc]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "LowRankSwitchCallback for Lightning needs it: pip install lightning"
        ) from error

Checkpoint = dict[str, Any]


class LowRankSwitchCallback(Callback):
    """Measures, decides and switches while a ``Trainer`` fits; ``switch`` has what it found.

    ``options`` are those of ``LowRankSwitch``. Measurements go to the trainer's loggers. The state
    dict of a checkpoint holds merged weights after the switch, which ``load_from_checkpoint``
    reads without this package. ``fit(ckpt_path=...)`` goes on from before and after the switch.

    Several processes work with ``strategy='ddp'``, whose wrapper is made anew after the switch.

    ValueError for manual optimization, several optimizers, other strategies for several processes,
    a model that has adapters when ``fit`` begins, and a checkpoint that was written without this
    callback.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.switch: LowRankSwitch | None = None
        self._kept: Mapping[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let a model with adapters take the weights of any checkpoint."""
        if stage == "fit":
            self._kept = None
            _refuse_adapters(pl_module)
        self._unadapt = pl_module.register_load_state_dict_pre_hook(_merge_before)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hook of ``setup`` away."""
        self._unadapt.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the switch, with the weights of the adapters beside it."""
        if self.switch is None:
            return {}
        weights = adapted_state_dict(self.switch.model)
        return {"switch": self.switch.state_dict(), "weights": weights}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Remember the state of a checkpoint until the optimizer is there."""
        self._kept = state_dict

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to measure; go on from the checkpoint that the trainer goes on from."""
        _refuse_what_cannot_work(trainer, pl_module)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        (optimizer,) = trainer.optimizers
        self.switch = LowRankSwitch(pl_module, optimizer, schedulers, **self.options)
        if self._kept is not None:
            self._go_on(self.switch, self._kept)
            if self.switch.regrouped:
                _follow(trainer, pl_module)
        elif trainer.ckpt_path:
            raise ValueError(
                f"{trainer.ckpt_path} was written without LowRankSwitchCallback: load its weights "
                "into the model, and call fit without ckpt_path"
            )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimizer's updates, and log what was measured."""
        switch = self.switch
        assert switch is not None
        known = len(switch.history)
        if switch.step(_loss(trainer, outputs)):
            _follow(trainer, pl_module)
        if len(switch.history) > known:
            # pl_module.log would drop what log_every_n_steps misses
            for logger in trainer.loggers:
                logger.log_metrics(switch.log_dict(), step=trainer.global_step)

    def _go_on(self, switch: LowRankSwitch, kept: Mapping[str, Any]) -> None:
        switch.load_state_dict(kept["switch"])
        switch.model.load_state_dict(kept["weights"], strict=False)


def _loss(trainer: Any, outputs: Any) -> Tensor | float:
    """Return the loss of a batch, of which Lightning tells a share when it accumulates gradients.

    There is none where ``training_step`` returned None.
    """
    if not outputs:
        return math.nan
    return outputs["loss"] * trainer.accumulate_grad_batches


def _follow(trainer: Any, pl_module: Any) -> None:
    """Exchange gradients of what trains now, and let each checkpoint hold merged weights."""
    strategy = trainer.strategy
    if _is_ddp(strategy):
        strategy.model = pl_module
        strategy.configure_ddp()
    given = pl_module.on_save_checkpoint
    if getattr(given, "func", None) is not _save_merged:  # of an earlier change
        pl_module.on_save_checkpoint = partial(_save_merged, pl_module, given)


def _is_ddp(strategy: Any) -> bool:
    return isinstance(strategy.model, DistributedDataParallel)


def _save_merged(
    pl_module: Any, given: Callable[[Checkpoint], None], checkpoint: Checkpoint
) -> None:
    checkpoint["state_dict"] = merged_state_dict(pl_module)
    given(checkpoint)


def _merge_before(module: nn.Module, state_dict: Mapping[str, Any], *_: Any) -> None:
    """Make ``module`` plain before it loads weights of a plain model."""
    if adapted_modules(module) and not any(map(is_factor, state_dict)):
        merge(module)


def _refuse_adapters(pl_module: nn.Module) -> None:
    if adapted_modules(pl_module):
        raise ValueError(
            "the model that fit got has adapters already: give a new one, and fit(ckpt_path=...) "
            "to go on"
        )


def _refuse_what_cannot_work(trainer: Any, pl_module: Any) -> None:
    """Raise ValueError for ways to train in which a switch would not be right."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            "LowRankSwitchCallback needs automatic optimization: with manual optimization call "
            "LowRankSwitch in training_step"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"LowRankSwitchCallback needs one optimizer, not {len(trainer.optimizers)}: with "
            "several call LowRankSwitch in training_step, once for each"
        )
    if trainer.world_size > 1 and not _is_ddp(trainer.strategy):
        raise ValueError(
            f"LowRankSwitchCallback does not go with {type(trainer.strategy).__name__}: use "
            "Trainer(strategy='ddp'), or the command switchlora"
        )
