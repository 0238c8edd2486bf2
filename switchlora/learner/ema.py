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
    def update(self, model: nn.Module) -> None:
        """Move the average toward the effective weights of ``model``."""
        new = 1 - self.decay
        present, adapted = model.state_dict(), adapted_modules(model)
        residual = {n: m for n, m in adapted.items() if m.kind == AdaptedLinear.kind}
        present |= {f"{n}.weight": adapted[n].merged() for n in adapted.keys() - residual.keys()}
        present |= {f"{n}.weight": m.residual() for n, m in residual.items()}
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(present[name].to(average), new)
            else:
                average.copy_(present[name])
        for name, module in residual.items():
            self._add_adapters(f"{name}.weight", module, new)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the averaged weights of a ``state_dict``."""
        self.model.load_state_dict(state)

    def _add_adapters(self, name: str, module: AdaptedLinear, new: float) -> None:
        average = self.model.get_parameter(name)
        for adapter in module.adapters().values():
            rows = average[adapter.rows]
            rows.addmm_(adapter.B.to(rows), adapter.A.to(rows), alpha=new * adapter.scaling)
