"""Exponential moving average of the effective weights, continuous through the switch."""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from switchlora.adapters import AdaptedLinear, adapted_modules
from switchlora.learner.awaited import Awaited

Tensors = dict[str, Tensor]


class WeightEMA:
    """E <- d E + (1 - d) W_eff after each update, with W_eff = W_res + s B A in the adapter phase.

    ``model`` holds the average and is always a plain model. The average of products is not the
    product of averaged factors. So the effective weight is averaged, at the cost of one low-rank
    product per target and update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema is {decay}: give a decay in (0, 1), such as 0.999")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._seen: tuple[list[str], Awaited] | None = None
        self._averages: Tensors = {}

    @torch.no_grad()
    def look(self, model: nn.Module) -> None:
        """Begin to find out whether the tensors of ``model`` are finite.

        ``update`` reads the answer. On CUDA it has arrived by then if other work lies between.
        """
        names, tensors = [], []
        for name, tensor in _named(model).items():
            if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
                names.append(name)
                tensors.append(tensor)
        largest = torch._foreach_norm(tensors, math.inf)
        self._seen = names, Awaited(torch.stack(largest).isfinite())

    @torch.no_grad()
    def update(self, model: nn.Module) -> str | None:
        """Move the average toward the effective weights of ``model``.

        An average never gets rid of a NaN. So if a tensor of ``model`` is not finite, the average
        stays as it is, and the name of that tensor is returned.
        """
        lost = self._lost(model)
        if lost is not None:
            return lost
        present = _named(model)
        with_residual = {}
        for name, module in adapted_modules(model).items():
            if module.kind == AdaptedLinear.kind:
                present[f"{name}.weight"] = module.residual()
                with_residual[name] = module
            else:
                present[f"{name}.weight"] = module.merged()
        self._average(present)
        for name, module in with_residual.items():
            self._add_adapters(f"{name}.weight", module)
        return None

    def _lost(self, model: nn.Module) -> str | None:
        """Return the name of the first tensor that ``look`` found not to be finite, if any."""
        if self._seen is None:
            self.look(model)
        assert self._seen is not None
        (names, awaited), self._seen = self._seen, None
        flags = awaited.read()
        return next((name for name, finite in zip(names, flags, strict=True) if not finite), None)

    def _average(self, present: Tensors) -> None:
        if not self._averages:
            self._averages = self.model.state_dict()
        averages, ends = [], []
        for name, average in self._averages.items():
            if average.is_floating_point():
                averages.append(average)
                ends.append(present[name].to(average))
            else:
                average.copy_(present[name])
        torch._foreach_lerp_(averages, ends, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the averaged weights of a ``state_dict``."""
        self.model.load_state_dict(state)

    def _add_adapters(self, name: str, module: AdaptedLinear) -> None:
        average = self.model.get_parameter(name)
        for A, B, rows, s in module.adapters().values():
            part = average[rows]
            part.addmm_(B.to(part), A.to(part), alpha=(1 - self.decay) * s)


def _named(model: nn.Module) -> Tensors:
    """Return what ``model.state_dict()`` holds, and buffers that are not saved; it is cheaper."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    return {name: tensor.detach() for name, tensor in named}
