"""Optimizers that step matrices, factors and all other parameters each in a way of its own."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from switchlora.adapters import Adapter, is_factor

MATRICES, FACTORS, OTHERS = "matrices", "factors", "others"


class InParts(Optimizer):
    """Update each parameter group as the part says that its key 'part' names.

    - 'matrices': weights of linears, without the classifier's.
    - 'factors': those of adapters.
    - 'others', or no key.

    ``torch.optim.AdamW`` steps the parts ``by_adamw``. A subclass steps the rest in
    ``step_the_rest``, or by an optimizer in ``own``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        betas: Sequence[float],
        eps: float,
        by_adamw: Sequence[str] = (OTHERS,),
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "part": OTHERS}
        super().__init__(params, defaults)
        first, second = betas
        self.betas = (first, second)
        self.eps = eps
        self.adapters: list[Adapter] = []
        self.own: dict[str, Optimizer] = {}
        for part in by_adamw:
            if groups := self.groups(part):
                self.own[part] = AdamW(groups, lr, self.betas, eps, weight_decay)

    def pair(self, adapters: Sequence[Adapter]) -> None:
        """Say which factors belong together. ValueError unless all that train are among them."""
        self.adapters = list(adapters)
        paired = {factor for A, B, _, _ in adapters for factor in (A, B)}
        if not paired.issuperset(self.factor_groups()):
            name = type(self).__name__
            raise ValueError(f"{name} has a factor to train whose adapter it was not given")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, optimizer in self.own.items():
            optimizer.param_groups = self.groups(part)
            optimizer.state = self.state
            optimizer.step()
        self.step_the_rest()
        return loss

    def step_the_rest(self) -> None:
        """Update the parts that no optimizer in ``own`` updates."""
        raise NotImplementedError

    def groups(self, part: str) -> list[dict[str, Any]]:
        """Return the parameter groups of a part."""
        return [group for group in self.param_groups if group["part"] == part]

    def factor_groups(self) -> dict[Tensor, dict[str, Any]]:
        """Return the group of each factor that trains."""
        return {factor: group for group in self.groups(FACTORS) for factor in group["params"]}


def in_parts(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``groups`` of the parameters of ``model``, each split by the parts of ``InParts``."""
    matrices = _matrices(model)
    factors = {p for name, p in model.named_parameters() if is_factor(name, ("A", "B"))}
    found = []
    for group in groups:
        by_part: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            part = OTHERS
            if parameter in factors:
                part = FACTORS
            elif parameter in matrices:
                part = MATRICES
            by_part.setdefault(part, []).append(parameter)
        found += [{**group, "params": params, "part": part} for part, params in by_part.items()]
    return found


def _matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of the linears of ``model`` without its classifier's."""
    get_classifier = getattr(model, "get_classifier", lambda: getattr(model, "head", None))
    classifier = get_classifier()
    inside: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not classifier:
            inside.update(p for p in module.parameters() if p.ndim == 2)
    return inside


def as_part_of_factors(optimizer: Optimizer) -> dict[str, str]:
    """Return what marks a group of factors for ``optimizer``; nothing for one without parts."""
    return {"part": FACTORS} if isinstance(optimizer, InParts) else {}
