"""A recipe: the optimizer, schedule and precision of one phase."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from switchlora.adapters import FACTORS, is_factor
from switchlora.errors import check_choice, check_range

if TYPE_CHECKING:
    from switchlora.learner.learner import Learner


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How the trained tensors of one phase are optimised.

    - ``optimizer`` takes parameter groups.
    - ``scheduler`` takes an optimizer and ``t_initial``, the number of updates of the whole run.
      It returns a timm scheduler that counts updates.
    - ``refactoring`` is called with each new learner and may add hooks to the learner's optimizer.

    Factors get ``factor_lr_scale`` times the learning rate. They have their own weight decay
    ``factor_weight_decay``, which pulls the effective weight toward the residual weight.
    """

    optimizer: Callable[[list[dict[str, Any]]], Optimizer]
    scheduler: Callable[..., Scheduler]
    weight_decay: float = 0.05
    decoupled_weight_decay: bool = True
    """whether the optimizer multiplies weights by 1 - lr * weight_decay, as AdamW does"""
    factor_weight_decay: float = 0.0
    factor_lr_scale: float = 1.0
    factor_B_lr_scale: float = 1.0
    """multiplies ``factor_lr_scale`` for lora_B alone (LoRA+; Hayou et al., arXiv 2402.12354)"""
    frobenius_decay: float = 0.0
    """lambda of the penalty lambda/2 ||s B A||_F^2, used instead of ``factor_weight_decay``"""
    refactoring: "Callable[[Learner], None] | None" = None
    rewarmup_updates: int = 0
    """length of a linear ramp of the learning rate; the ramp starts when this recipe takes over"""
    clip_grad: float | None = 1.0
    accumulation: int = 1
    """micro-batches per update; the batch and the number of updates stay the same"""
    lr_scale: float = 1.0
    """multiplies all learning rates of this recipe; other recipes of the run may use the same
    schedule without it"""
    precision: str = "fp32"
    compile: Mapping[str, Any] | None = None
    """arguments of torch.compile; None leaves the model eager"""
    activation_checkpointing: str | None = None
    """what the backward pass computes again instead of keeping it:
    - 'blocks': whole blocks
    - 'gelu': the inputs of adapted linears that come straight from a gelu; not with ``compile``
    - None: nothing"""
    before_ddp: Callable[[nn.Module], None] | None = None
    """is called with the model before DDP wraps it"""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, tuple(PRECISIONS))
        check_range("accumulation", self.accumulation, 1)
        for name in ("lr_scale", "factor_lr_scale", "factor_B_lr_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        check_range("rewarmup_updates", self.rewarmup_updates, 0)
        check_range("frobenius_decay", self.frobenius_decay, 0)
        if self.frobenius_decay and self.factor_weight_decay:
            raise ValueError(
                "frobenius_decay replaces weight decay on the factors: set factor_weight_decay=0"
            )
        if self.activation_checkpointing is not None:
            name, choices = "activation_checkpointing", ("blocks", "gelu")
            check_choice(name, self.activation_checkpointing, choices)
        if self.activation_checkpointing == "gelu" and self.compile is not None:
            raise ValueError(
                "activation_checkpointing=gelu does not go with compile: leave one out"
            )


def autocast(device_type: str, precision: str) -> AbstractContextManager:
    """Return the context of a precision: autocast for bf16 and fp16, an empty context for fp32."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def check_goes_with_fsdp(recipe: Recipe) -> None:
    """Raise ValueError for a recipe that needs whole factors, or DDP."""
    for name in ("refactoring", "frobenius_decay", "before_ddp"):
        if getattr(recipe, name):
            raise ValueError(f"{name} does not go with system.parallel=fsdp: use ddp")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimizer's groups of the trained parameters.

    Weights are split by timm's rule into a group with and a group without decay. Factors have
    groups of their own.
    """
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad and is_factor(n)}
    ids = {id(p) for p in factors.values()}
    skip = set(getattr(model, "no_weight_decay", set)())
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=skip)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
        group["lr_scale"] = 1.0
    for which, scale in _factor_lr_scales(recipe).items():
        chosen = [p for n, p in factors.items() if is_factor(n, which)]
        decay = recipe.factor_weight_decay
        groups.append({"params": chosen, "weight_decay": decay, "lr_scale": scale})
    return [group for group in groups if group["params"]]


def _factor_lr_scales(recipe: Recipe) -> dict[tuple[str, ...], float]:
    scale = recipe.factor_lr_scale
    if recipe.factor_B_lr_scale == 1:
        return {FACTORS: scale}
    return {("A",): scale, ("B",): scale * recipe.factor_B_lr_scale}
