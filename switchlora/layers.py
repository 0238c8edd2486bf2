"""Linear layers with low-rank adapters on a frozen residual weight."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(NamedTuple):
    """scaling * B A on some rows of a weight: A (r, in), B (len(rows), r)."""

    A: Tensor
    B: Tensor
    rows: slice
    scaling: float


def effective_weight(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W_res + s B A (out, in), summed in at least float32."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for A, B, rows, scaling in adapters:
        total[rows].addmm_(B, A, alpha=scaling)
    return total


def factor_gradients(inputs: Tensor, grad: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Gradients of A and B from the inputs X (T, in) and the outputs' gradient G (T, out).

    g_A = s (G B)^T X and g_B = s G^T (X A^T), on the adapter's rows: no dense (out, in) product.
    """
    A, B, rows, scaling = adapter
    grad = grad[:, rows]
    grad_A = scaling * ((grad @ B).mT @ inputs)
    grad_B = scaling * ((inputs @ A.mT).mT @ grad).mT  # G stays the wide, untransposed operand
    return grad_A, grad_B


class AdaptedProduct(torch.autograd.Function):
    """X (W_res + s B A)^T + b with gradients for X, b and the factors only.

    The effective weight is formed once forward and once backward, which costs r / T of the product
    with T tokens: one full-size product each way, where frozen and low-rank paths apart would also
    read and write the outputs twice. Under autocast the sum is made in the weight's dtype and
    rounded once, as a plain linear's weight is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: Sequence[tuple[slice, float]],
        *factors: Tensor,
    ) -> Tensor:
        """(..., in) -> (..., out); ``factors`` are A, B of each adapter in ``layout``."""
        device = input.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        input = input.to(dtype)
        ctx.save_for_backward(input, weight, *factors)
        ctx.layout = layout
        with torch.autocast(device, enabled=False):
            total = effective_weight(weight, _adapters(layout, factors)).to(dtype)
            return F.linear(input, total, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments of ``forward``; None for the frozen weight."""
        (grad,) = grads
        input, weight, *factors = ctx.saved_tensors
        adapters = _adapters(ctx.layout, factors)
        with torch.autocast(input.device.type, enabled=False):
            grad_input = None
            if ctx.needs_input_grad[0]:
                grad_input = grad @ effective_weight(weight, adapters).to(grad.dtype)
            flat, flat_grad = input.flatten(0, -2), grad.flatten(0, -2)
            grad_bias = flat_grad.sum(0) if ctx.needs_input_grad[2] else None
            found: list[Tensor | None] = []
            for A, B, rows, scaling in adapters:
                cast = Adapter(A.to(grad.dtype), B.to(grad.dtype), rows, scaling)
                found += factor_gradients(flat, flat_grad, cast)
        return grad_input, None, grad_bias, None, *found


def _adapters(layout: Sequence[tuple[slice, float]], factors: Sequence[Tensor]) -> list[Adapter]:
    pairs = zip(layout, factors[::2], factors[1::2], strict=True)
    return [Adapter(A, B, rows, scaling) for (rows, scaling), A, B in pairs]


class AdaptedLinear(nn.Linear):
    """y = W_res x + b + s B A x with W_res frozen (Hu et al., arXiv 2106.09685).

    ``weight`` and ``bias`` stay where ``nn.Linear`` has them, so the names in state dicts,
    optimizers and curves survive the switch. Subclasses say where the factors are.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]

    def adapters(self) -> dict[str, Adapter]:
        """The adapters by the name of their row slice, in the order of the rows."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        adapters = self.adapters().values()
        layout = [(adapter.rows, adapter.scaling) for adapter in adapters]
        factors = [factor for adapter in adapters for factor in (adapter.A, adapter.B)]
        return AdaptedProduct.apply(input, self.weight, self.bias, layout, *factors)

    def extra_repr(self) -> str:
        """Shapes and ranks."""
        ranks = {name: len(adapter.A) for name, adapter in self.adapters().items()}
        return f"{super().extra_repr()}, ranks={ranks}"


class LoRALinear(AdaptedLinear):
    """A linear with one adapter: ``lora_A`` (r, in) and ``lora_B`` (out, r)."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, adapter: Adapter) -> None:
        super().__init__(weight, bias)
        self.scaling = adapter.scaling
        self.lora_A, self.lora_B = nn.Parameter(adapter.A), nn.Parameter(adapter.B)

    def adapters(self) -> dict[str, Adapter]:
        """The adapter under the name '', which stands for all rows."""
        rows = slice(0, self.out_features)
        return {"": Adapter(self.lora_A, self.lora_B, rows, self.scaling)}


class SlicedLoRALinear(AdaptedLinear):
    """A fused linear, such as qkv, with one adapter for each of its row slices.

    The slices cover all rows in order; a slice of rank 0 is frozen without an adapter.
    ``lora_A.q`` is (r_q, in), ``lora_B.q`` (rows of q, r_q), and so on: the cost is that of the
    separate low-rank products, never of a block-diagonal B.
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, adapters: Mapping[str, Adapter]
    ) -> None:
        super().__init__(weight, bias)
        self.scalings = {name: adapter.scaling for name, adapter in adapters.items()}
        # OrderedDict: ParameterDict sorts the keys of a plain one, and the rows are in order
        self.lora_A = nn.ParameterDict(
            OrderedDict((name, nn.Parameter(a.A)) for name, a in adapters.items())
        )
        self.lora_B = nn.ParameterDict(
            OrderedDict((name, nn.Parameter(a.B)) for name, a in adapters.items())
        )

    def adapters(self) -> dict[str, Adapter]:
        """The adapter of each row slice by its name."""
        found, start = {}, 0
        for name, B in self.lora_B.items():
            rows = slice(start, start := start + len(B))
            found[name] = Adapter(self.lora_A[name], B, rows, self.scalings[name])
        return found


def adapted_linear(linear: nn.Linear, adapters: Mapping[str, Adapter]) -> AdaptedLinear:
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
