"""Recipe, Learner, build_learner(): what is rebuilt when the set of trained tensors changes."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from switchlora.errors import check_choice, check_range
from switchlora.layers import is_factor
from switchlora.surgery import adapted_modules

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq",)


@dataclass(frozen=True)
class Recipe:
    """How the trained tensors of one phase are optimised.

    ``optimizer`` takes parameter groups, ``scheduler`` an optimizer and ``t_initial``, the updates
    of the whole run: a timm scheduler that counts updates. Factors get ``factor_lr_scale`` times
    the learning rate and their own weight decay, which pulls toward the residual weight.
    """

    optimizer: Callable[[list[dict[str, Any]]], Optimizer]
    scheduler: Callable[..., Scheduler]
    weight_decay: float = 0.05
    decoupled_weight_decay: bool = True
    """whether the optimizer multiplies weights by 1 - lr * weight_decay, as AdamW does"""
    factor_weight_decay: float = 0.0
    factor_lr_scale: float = 1.0
    rewarmup_updates: int = 0
    """linear ramp of the learning rate after this recipe takes over in the middle of a run"""
    clip_grad: float | None = 1.0
    accumulation: int = 1
    """micro-batches per update; the batch and the number of updates stay the same"""
    precision: str = "fp32"
    compile: Mapping[str, Any] | None = None
    """arguments of torch.compile; None leaves the model eager"""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, tuple(PRECISIONS))
        check_range("accumulation", self.accumulation, 1)


@dataclass(frozen=True)
class Update:
    """Outcome of one optimizer update; not ``applied`` when loss or gradient was not finite."""

    loss: float
    grad_norm: float
    lr: float
    applied: bool


@dataclass
class Learner:
    """A plain model with the disposable things around it. Build it with ``build_learner``."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    """the model or its compiled form"""
    optimizer: Optimizer
    scheduler: Scheduler
    recipe: Recipe
    start: int
    """update at which this learner took over"""

    def update(
        self, images: Tensor, targets: Tensor, loss_fn: nn.Module, num_updates: int
    ) -> Update:
        """One optimizer update on a batch: (B, C, H, W) images, class indices or soft targets.

        The batch is split into ``accumulation`` micro-batches. Gradients stay in place
        afterwards, clipped, for the monitor to read.
        """
        lr = self.set_lr(num_updates)
        self.optimizer.zero_grad(set_to_none=True)
        device = next(self.model.parameters()).device
        loss = torch.zeros((), device=device)
        for part, label in zip(
            images.chunk(self.recipe.accumulation),
            targets.chunk(self.recipe.accumulation),
            strict=True,
        ):
            with autocast(device.type, self.recipe.precision):
                output = self.forward(part.to(device, non_blocking=True))
                share = loss_fn(output, label.to(device, non_blocking=True))
            share = share * (len(part) / len(images))
            share.backward()
            loss += share.detach()
        return self._step(loss, lr)

    def set_lr(self, num_updates: int) -> float:
        """Set and return the plan's learning rate, a function of the update counter alone."""
        self.scheduler.step_update(num_updates)
        since = num_updates - self.start + 1
        ramp = (
            min(1.0, since / self.recipe.rewarmup_updates) if self.recipe.rewarmup_updates else 1
        )
        for group in self.optimizer.param_groups:
            group["lr"] *= ramp
        return self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["lr_scale"]

    def decay(self, lr: float) -> float:
        """lr * weight decay of one update where the decay is decoupled from the gradient."""
        return lr * self.recipe.weight_decay if self.recipe.decoupled_weight_decay else 0.0

    def _step(self, loss: Tensor, lr: float) -> Update:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(p.grad for p in parameters if p.grad is not None)
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        finite = abs(loss_value) < float("inf") and norm_value < float("inf")
        if finite:
            if self.recipe.clip_grad is not None:
                clip_grads_with_norm_(parameters, self.recipe.clip_grad, norm)
            self.optimizer.step()
        return Update(loss_value, norm_value, lr, finite)


def autocast(device_type: str, precision: str) -> AbstractContextManager:
    """The context of a precision: nothing for fp32, autocast for bf16."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def build_learner(model: nn.Module, recipe: Recipe, total_updates: int, start: int = 0) -> Learner:
    """Fresh optimizer, schedule and compiled form for what trains in ``model`` now."""
    optimizer = recipe.optimizer(parameter_groups(model, recipe))
    scheduler = recipe.scheduler(optimizer, t_initial=total_updates)
    if recipe.compile is None:
        forward: Callable = model
    else:
        torch.compiler.reset()
        forward = torch.compile(model, **recipe.compile)
    return Learner(model, forward, optimizer, scheduler, recipe, start)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups of the trained parameters: decay and no decay (timm's rule), factors apart."""
    factors = [p for n, p in model.named_parameters() if p.requires_grad and is_factor(n)]
    ids = {id(p) for p in factors}
    skip = set(getattr(model, "no_weight_decay", set)())
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=skip)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
        group["lr_scale"] = 1.0
    groups.append(
        {
            "params": factors,
            "weight_decay": recipe.factor_weight_decay,
            "lr_scale": recipe.factor_lr_scale,
        }
    )
    return [group for group in groups if group["params"]]


def carry_moments(old: Optimizer, new: Optimizer) -> int:
    """Hand the state of surviving tensors from ``old`` to ``new``; return how many were carried.

    Between optimizers of different classes nothing is carried.
    """
    if type(old) is not type(new):
        return 0
    survivors = [p for group in new.param_groups for p in group["params"] if p in old.state]
    for parameter in survivors:
        new.state[parameter] = old.state[parameter]
    return len(survivors)


@torch.no_grad()
def carry_factor_moments(
    model: nn.Module, old: Optimizer, new: Optimizer, weights: Mapping[str, Tensor]
) -> int:
    """Project the moments of the replaced ``weights`` (by module name) into the factors' basis.

    Gradients obey g_A = s B^T g_W and g_B = s g_W A^T, so first moments map exactly: m_A = s B^T
    m_W, m_B = s m_W A^T. For second moments the entries of g_W are taken as uncorrelated: v_A =
    s^2 (B*B)^T v_W, v_B = s^2 v_W (A*A)^T. Factors whose images would be zero (B = 0) keep a fresh
    state.
    """
    if type(old) is not type(new):
        return 0
    carried = 0
    for name, module in adapted_modules(model).items():
        state = old.state.get(weights[name], {})
        for A, B, rows, s in module.adapters().values():
            if state and A.any() and B.any():
                new.state[A] = {k: _project_A(k, v, B, rows, s) for k, v in state.items()}
                new.state[B] = {k: _project_B(k, v, A, rows, s) for k, v in state.items()}
                carried += 2
    return carried


def _project_A(key: str, value: Any, B: Tensor, rows: slice, s: float) -> Any:
    if key in SECOND_MOMENTS:
        return s**2 * B.square().mT @ value[rows]
    return s * B.mT @ value[rows] if key in FIRST_MOMENTS else _copied(key, value)


def _project_B(key: str, value: Any, A: Tensor, rows: slice, s: float) -> Any:
    if key in SECOND_MOMENTS:
        return s**2 * value[rows] @ A.square().mT
    return s * value[rows] @ A.mT if key in FIRST_MOMENTS else _copied(key, value)


def _copied(key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(
            f"moments=factors does not know how '{key}' of this optimizer transforms; "
            "use switch.moments=surviving"
        )
    return value.clone() if isinstance(value, Tensor) else value
