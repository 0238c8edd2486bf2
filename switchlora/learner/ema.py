"""Exponential moving average of the effective weights, continuous through the switch."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from switchlora.adapters import AdaptedLinear, adapted_modules


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

    @torch.no_grad()
    def update(self, model: nn.Module) -> str | None:
        """Move the average toward the effective weights of ``model``.

        An average never gets rid of a NaN. So if a tensor of ``model`` is not finite, the average
        stays as it is, and the name of that tensor is returned.
        """
        present = model.state_dict()
        lost = _not_finite(present)
        if lost is not None:
            return lost
        with_residual = {}
        for name, module in adapted_modules(model).items():
            if module.kind == AdaptedLinear.kind:
                present[f"{name}.weight"] = module.residual()
                with_residual[name] = module
            else:
                present[f"{name}.weight"] = module.merged()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(present[name].to(average), 1 - self.decay)
            else:
                average.copy_(present[name])
        for name, module in with_residual.items():
            self._add_adapters(f"{name}.weight", module)
        return None

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


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with an entry that is not finite; None without one."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    flags = [tensors[name].isfinite().all() for name in names]
    if not flags or torch.stack(flags).all():
        return None
    return next(name for name, flag in zip(names, flags, strict=True) if not flag)
