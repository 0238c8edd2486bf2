"""Linear layers with low-rank adapters on a frozen residual weight."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(NamedTuple):
    """scaling * B A on some rows of a weight: A (r, in), B (len(rows), r)."""

    A: Tensor
    B: Tensor
    rows: slice
    scaling: float


class LoRALinear(nn.Linear):
    """y = W_res x + b + s B A x with W_res frozen (Hu et al., arXiv 2106.09685).

    ``weight`` and ``bias`` stay where ``nn.Linear`` has them, so the names in state dicts,
    optimizers and curves survive the switch. ``lora_A`` is (r, in), ``lora_B`` (out, r).
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, adapter: Adapter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        self.scaling = adapter.scaling
        self.lora_A, self.lora_B = nn.Parameter(adapter.A), nn.Parameter(adapter.B)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        base = F.linear(input, self.weight, self.bias)
        return base + self.scaling * F.linear(F.linear(input, self.lora_A), self.lora_B)

    def adapters(self) -> dict[str, Adapter]:
        """The adapter under the name '', which stands for all rows."""
        rows = slice(0, self.out_features)
        return {"": Adapter(self.lora_A, self.lora_B, rows, self.scaling)}

    def extra_repr(self) -> str:
        """Shapes and ranks."""
        ranks = {name: len(adapter.A) for name, adapter in self.adapters().items()}
        return f"{super().extra_repr()}, ranks={ranks}"


class SlicedLoRALinear(LoRALinear):
    """A fused linear, such as qkv, with one adapter for each of its row slices.

    The slices cover all rows in order; a slice of rank 0 is frozen without an adapter.
    ``lora_A.q`` is (r_q, in), ``lora_B.q`` (rows of q, r_q), and so on: the cost is that of the
    separate low-rank products, never of a block-diagonal B.
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, adapters: Mapping[str, Adapter]
    ) -> None:
        nn.Linear.__init__(self, weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        self.scalings = {name: adapter.scaling for name, adapter in adapters.items()}
        # OrderedDict: ParameterDict sorts the keys of a plain one, and the rows are in order
        self.lora_A = nn.ParameterDict(
            OrderedDict((name, nn.Parameter(a.A)) for name, a in adapters.items())
        )
        self.lora_B = nn.ParameterDict(
            OrderedDict((name, nn.Parameter(a.B)) for name, a in adapters.items())
        )

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        base = F.linear(input, self.weight, self.bias)
        inner = F.linear(input, torch.cat(list(self.lora_A.values())))
        parts = inner.split([len(A) for A in self.lora_A.values()], dim=-1)
        adapted = [
            scaling * F.linear(part, B)
            for part, B, scaling in zip(
                parts, self.lora_B.values(), self.scalings.values(), strict=True
            )
        ]
        return base + torch.cat(adapted, dim=-1)

    def adapters(self) -> dict[str, Adapter]:
        """The adapter of each row slice by its name."""
        found, start = {}, 0
        for name, B in self.lora_B.items():
            rows = slice(start, start := start + len(B))
            found[name] = Adapter(self.lora_A[name], B, rows, self.scalings[name])
        return found


def adapted_linear(linear: nn.Linear, adapters: Mapping[str, Adapter]) -> LoRALinear:
    """``linear`` with ``adapters`` on it: the same function, the bias shared, W left alone.

    W_res = W - s B A is a new tensor, so that undoing the switch is putting ``linear`` back.
    """
    weight = add_adapters(linear.weight.detach(), adapters, sign=-1)
    if set(adapters) == {""}:
        return LoRALinear(weight, linear.bias, adapters[""]).train(linear.training)
    return SlicedLoRALinear(weight, linear.bias, adapters).train(linear.training)


@torch.no_grad()
def add_adapters(weight: Tensor, adapters: Mapping[str, Adapter], sign: int = 1) -> Tensor:
    """W + sign * s B A on the rows of each adapter: summed in float64, rounded once."""
    total = weight.to(torch.float64, copy=True)
    for adapter in adapters.values():
        product = adapter.B.double() @ adapter.A.double()
        total[adapter.rows].add_(product, alpha=sign * adapter.scaling)
    return total.to(weight.dtype)


def is_factor(parameter_name: str) -> bool:
    """Whether a parameter name belongs to an adapter's factors."""
    return "lora_A" in parameter_name or "lora_B" in parameter_name


def scaling_one(rank: int) -> float:
    """s = 1: the factors alone carry the adapter's magnitude."""
    return 1.0


def alpha_over_rank(rank: int, alpha: float) -> float:
    """s = alpha / r (Hu et al., arXiv 2106.09685)."""
    return alpha / max(rank, 1)


def rank_stabilised(rank: int, alpha: float) -> float:
    """s = alpha / sqrt(r) (rsLoRA; Kalajdzievski, arXiv 2312.03732)."""
    return alpha / max(rank, 1) ** 0.5
