"""SLTrain: a low-rank product plus entries at fixed random places, in the place of a weight."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from switchlora.adapters.factorized import LowRankLinear, only_adapter
from switchlora.adapters.linear import add_adapters, seed_of
from switchlora.adapters.product import Adapter, compute_dtype
from switchlora.errors import check_share


class SparseLowRankLinear(LowRankLinear):
    """y = (s B A + S) x + b: SLTrain (Han et al., arXiv 2406.02214; andyjm3/SLTrain).

    S has a ``share`` of the entries of a weight, at places that are drawn once. Their values
    ``lora_S`` train and begin uniform in +-1 / sqrt(in), as those of a linear do. So a layer has
    r (in + out) + share in out parameters. ``lora_S_index`` holds the places in the flat matrix.
    """

    kind = "sltrain"
    begins_anew = True
    lora_S_index: Tensor

    def __init__(self, bias: nn.Parameter | None, adapter: Adapter, share: float) -> None:
        super().__init__(bias, adapter)
        check_share("switch.adapter.share", share)
        self.share = share
        A = adapter.A
        index, values = drawn_entries(A, self.out_features, share)
        self.register_buffer("lora_S_index", index.to(A.device))
        self.lora_S = nn.Parameter(values.to(A))

    def forward(self, input: Tensor) -> Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        dropped = F.dropout(input, self.dropout, self.training)
        A = self.scaling * self.lora_A
        return SparseLowRankProduct.apply(
            dropped, A, self.lora_B, self.lora_S, self.lora_S_index, self.bias
        )

    def residual(self) -> Tensor:
        """Return S as a matrix (out, in), to which s B A is added."""
        flat = self.lora_S.new_zeros(self.out_features * self.in_features)
        return flat.index_add(0, self.lora_S_index, self.lora_S).view(self.out_features, -1)

    def merged(self) -> Tensor:
        """Return s B A + S (out, in): summed in float64, rounded once to the factors' dtype."""
        return add_adapters(self.residual().detach(), self.adapters())

    def settings(self) -> dict[str, Any]:
        """Return the kind and the attributes, with the share of the entries."""
        settings = super().settings()
        settings["made_with"] = {"share": self.share}
        return settings


class SparseLowRankProduct(torch.autograd.Function):
    """X (B A + S)^T + b, for which both passes form the weight; none is kept between them.

    With the gradient g_W = G^T X of the weight: g_B = g_W A^T, g_A = B^T g_W, and g_S are the
    entries of g_W at the places of S.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        A: Tensor,
        B: Tensor,
        values: Tensor,
        index: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Map inputs (..., in) to outputs (..., out); ``index`` are the places of ``values``."""
        device = input.device.type
        dtype = compute_dtype(device, [A])
        with torch.autocast(device, enabled=False):
            input = input.to(dtype)
            weight = _formed(A, B, values, index).to(dtype)
            outputs = F.linear(input, weight, None if bias is None else bias.to(dtype))
        ctx.save_for_backward(input, A, B, values, index)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in the order of ``forward``'s arguments."""
        input, A, B, values, index = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        needs_input, needs_A, _, _, _, needs_bias = ctx.needs_input_grad
        grad_input, grad_A, grad_bias = None, None, None
        with torch.autocast(input.device.type, enabled=False):
            if needs_input:
                weight = _formed(A, B, values, index).to(input.dtype)
                grad_input = (grad @ weight).view(input.shape)
            of_weight = (grad.mT @ input.flatten(0, -2)).to(A.dtype)
            if needs_A:
                grad_A = B.mT @ of_weight
            if needs_bias:
                grad_bias = grad.sum(0)
            grad_B = of_weight @ A.mT
            grad_values = of_weight.flatten().gather(0, index)
        return grad_input, grad_A, grad_B, grad_values, None, grad_bias


def drawn_entries(A: Tensor, out_features: int, share: float) -> tuple[Tensor, Tensor]:
    """Return the places of S, sorted, and the values at which it begins, on the CPU.

    A, which is (r, in) and random itself, seeds the draw. So all ranks draw the same.
    """
    in_features = A.shape[1]
    size = out_features * in_features
    generator = torch.Generator().manual_seed(seed_of(A))
    index, _ = torch.randperm(size, generator=generator)[: int(share * size)].sort()
    uniform = 2 * torch.rand(len(index), generator=generator) - 1
    return index, uniform / in_features**0.5


def sltrain_linear(
    linear: nn.Linear,
    adapters: Mapping[str, Adapter],
    share: float = 0.03,
) -> SparseLowRankLinear:
    """Return s B A + S in the place of ``linear``, whose bias is shared.

    ValueError if ``adapters`` are of row slices.
    """
    module = SparseLowRankLinear(linear.bias, only_adapter(adapters), share)
    return module.train(linear.training)


sltrain_linear.makes = SparseLowRankLinear  # type: ignore[attr-defined]


def _formed(A: Tensor, B: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """Return B A + S (out, in)."""
    weight = B @ A
    weight.view(-1).index_add_(0, index, values)
    return weight
