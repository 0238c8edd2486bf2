"""SwitchLoRA's schedule: single rows of A and columns of B make way for waiting ones."""

import math
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switchlora.adapters import SwitchedLoRALinear
from switchlora.errors import check_range, check_share
from switchlora.learner.learner import Learner
from switchlora.learner.moments import POWERS


@dataclass(frozen=True)
class SwitchLoRA:
    """Switch rows of A and columns of B before steps (Zhou et al., arXiv 2406.06564).

    At first each is switched once in ``interval`` updates. The frequency falls as an exponential,
    to 0.3 of that after the share ``ratio`` of the run. The counterpart of a switched vector, of
    the same number in the other factor, loses its moments and stands still for ``frozen`` updates.
    Its step counter begins anew, as in the authors' optimizer (asfsdsf/SwitchLoRA).
    """

    interval: int = 40
    ratio: float = 0.1
    frozen: int = 5

    def __post_init__(self) -> None:
        check_range("refactoring.frozen", self.frozen, 0)
        check_range("refactoring.interval", self.interval, max(1, 2 * self.frozen))
        check_share("refactoring.ratio", self.ratio)

    def __call__(self, learner: Learner) -> None:
        """Give the optimizer of ``learner`` hooks that act before and after each step."""
        layers = [m for m in learner.model.modules() if isinstance(m, SwitchedLoRALinear)]
        its = weakref.ref(learner)  # a cycle would keep the moments of learners that are replaced
        before: dict[Tensor, Tensor] = {}

        def before_step(optimizer: Optimizer, *_: object) -> None:
            since, total = cast(Learner, its()).since, cast(Learner, its()).total_updates
            for layer in layers:
                rank = len(layer.lora_A)
                switches = range(
                    self.switched(rank, since, total), self.switched(rank, since + 1, total)
                )
                switch(layer, switches, since, optimizer)
                freeze(layer, since, self.frozen)
                for factor in (layer.lora_A, layer.lora_B):
                    before[factor] = factor.detach().clone()

        def after_step(optimizer: Optimizer, *_: object) -> None:
            since = cast(Learner, its()).since
            for layer in layers:
                count_anew(layer, since, optimizer, before)

        learner.optimizer.register_step_pre_hook(before_step)
        learner.optimizer.register_step_post_hook(after_step)

    def switched(self, rank: int, updates: int, total: int) -> int:
        """Return how many rows of A are switched before so many of ``total`` updates are made.

        Update t adds rank / interval x^t, with x^(ratio total) = 0.3; the sum is rounded down.
        """
        x = 0.3 ** (1 / max(1.0, self.ratio * total))
        return int(rank / self.interval * x * (1 - x**updates) / (1 - x))


def switch(
    layer: SwitchedLoRALinear, numbers: range, num_updates: int, optimizer: Optimizer
) -> None:
    """Make the switches of these numbers; the moments of the counterparts become zero."""
    if not len(layer.lora_pool_A):
        return
    for number in numbers:
        row = layer.switch_A(number, num_updates)
        for moment in _moments(optimizer, layer.lora_B):
            moment[:, row] = 0
        column = layer.switch_B(number, num_updates)
        for moment in _moments(optimizer, layer.lora_A):
            moment[column] = 0


def freeze(layer: SwitchedLoRALinear, num_updates: int, frozen: int) -> None:
    """Zero the gradients of what was reset less than ``frozen`` updates ago."""
    free_A, free_B = num_updates - layer.lora_pool_resets >= frozen
    for factor, free in ((layer.lora_A, free_A[:, None]), (layer.lora_B, free_B)):
        if factor.grad is not None:
            factor.grad.mul_(free)


@torch.no_grad()
def count_anew(
    layer: SwitchedLoRALinear,
    num_updates: int,
    optimizer: Optimizer,
    before: dict[Tensor, Tensor],
) -> None:
    """Give the last step of what was reset the length of a step with Adam's counter begun anew.

    Adam divides its moments by 1 - beta^t. For what was reset k updates ago that should be
    1 - beta^k. A step is then longer by (1 - beta1^t) / (1 - beta1^k), and shorter by the root of
    the same ratio of beta2. ``before`` holds the factors before the step.
    """
    ages_A, ages_B = num_updates + 1 - layer.lora_pool_resets
    for factor, ages in ((layer.lora_A, ages_A[:, None]), (layer.lora_B, ages_B)):
        state = optimizer.state.get(factor, {})
        if "exp_avg_sq" in state:
            t = torch.as_tensor(state["step"], device=ages.device).float()
            beta1, beta2 = _group_of(optimizer, factor)["betas"]
            length = correction(beta2, ages, t).sqrt() / correction(beta1, ages, t)
            factor.copy_(torch.lerp(before[factor], factor, length.to(factor)))


def correction(beta: float, ages: Tensor, t: Tensor) -> Tensor:
    """Return (1 - beta^k) / (1 - beta^t) for k = min(ages, t)."""
    rate = math.log(beta)
    k = torch.minimum(ages.float(), t)
    return torch.expm1(rate * k) / torch.expm1(rate * t)


def _group_of(optimizer: Optimizer, factor: nn.Parameter) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is factor for p in g["params"]))


def _moments(optimizer: Optimizer, factor: nn.Parameter) -> list[Tensor]:
    state = optimizer.state.get(factor, {})
    return [state[key] for key in POWERS if state.get(key) is not None]
