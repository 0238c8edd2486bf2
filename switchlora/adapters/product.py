"""The product X (W_res + s B A)^T + b: its two forms, its gradients, and what it keeps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ARGUMENTS = 6
"""number of arguments of ``AdaptedProduct.forward`` before the factors A, B, A, B, ..."""


class Adapter(NamedTuple):
    """scaling * B A on some rows of a weight: A (r, in), B (len(rows), r)."""

    A: Tensor
    B: Tensor
    rows: slice
    scaling: float


def cheaper_form(
    tokens: int,
    in_features: int,
    out_features: int,
    trains_A: bool = True,
    slices: int = 1,
) -> str:
    """Return the form that costs less for ``tokens`` inputs: 'merged' or 'split'.

    - 'merged' forms W_res + s B A, which takes r in out multiply-adds once.
    - 'split' adds the low-rank path to the product with W_res. That takes T r (n in + out)
      multiply-adds for T tokens and n row slices. If A is frozen it takes T r out more, for a
      product that the gradient of a trained A needs in both forms.

    r cancels out, so only shapes decide. Bytes read and written compare in the same way.

    >>> cheaper_form(tokens=64, in_features=384, out_features=384)
    'split'
    >>> cheaper_form(tokens=4 * 197, in_features=384, out_features=384)
    'merged'
    """
    columns = out_features if trains_A else 2 * out_features
    split = tokens * (slices * in_features + columns)
    merged = in_features * out_features
    return "merged" if split >= merged else "split"


def effective_weight(weight: Tensor, adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor:
    """Return W_res + s B A (out, in) in ``dtype``.

    The sum is made in at least float32 and rounded once. The exception is a W_res that already has
    a lower precision ``dtype``: there the kernel of that precision adds rounded factors, as under
    autocast.
    """
    exact = dtype
    if weight.dtype != dtype:
        exact = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(exact, copy=True)
    for A, B, rows, scaling in adapters:
        total[rows].addmm_(B.to(exact), A.to(exact), alpha=scaling)
    return total.to(dtype)


def adapted_forward(
    inputs: Tensor,
    operand: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    form: str,
) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs (..., out) of X (..., in), and X A^T (T, r) of each adapter.

    X A^T is kept for B's gradient. ``operand`` (out, in) depends on ``form``:

    - 'merged': the effective weight.
    - 'split': W_res. s (X A^T) B^T is then added in place.
    """
    outputs = F.linear(inputs, operand, bias)
    flat = inputs.reshape(-1, inputs.shape[-1])
    projected = [flat @ adapter.A.mT for adapter in adapters]
    if form == "split":
        out_features = outputs.shape[-1]
        columns = outputs.view(-1, out_features)
        for adapter, low in zip(adapters, projected, strict=True):
            place = columns[:, adapter.rows]
            place.addmm_(low, adapter.B.mT, alpha=adapter.scaling)
    return outputs, projected


def adapted_backward(
    grad: Tensor,
    operand: Tensor | None,
    inputs: Tensor | None,
    projected: Sequence[Tensor],
    adapters: Sequence[Adapter],
    form: str,
) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
    """Return the gradients of X, of the bias and of the factors.

    They come from the gradient G (T, out) of the outputs, without a dense (out, in) product: g_X =
    G (W_res + s B A), g_A = s (G B)^T X, g_B = s G^T (X A^T). Without ``operand`` there is no g_X,
    and without ``inputs`` no g_A. The bias's gradient is the column sums of G. The product for g_B
    yields it too, because X A^T gets a column of ones.
    """
    grad_input = None if operand is None else grad @ operand
    ones = grad.new_ones(len(grad), 1)
    grad_bias: list[Tensor] = []
    grad_factors: list[Tensor | None] = []
    for adapter, low in zip(adapters, projected, strict=True):
        A, B, rows, scaling = adapter
        part = grad[:, rows]
        grad_A = None
        if inputs is not None or form == "split":
            back = part @ B
            if form == "split" and grad_input is not None:
                grad_input.addmm_(back, A, alpha=scaling)
            if inputs is not None:
                grad_A = scaling * (back.mT @ inputs)
        with_ones = torch.cat([low, ones], dim=1)
        both = with_ones.mT @ part  # G stays the wide, untransposed operand
        grad_B = scaling * both[:-1].mT
        grad_factors += [grad_A, grad_B]
        grad_bias.append(both[-1])
    return grad_input, torch.cat(grad_bias), grad_factors


def joint_forward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
) -> Tensor:
    """Return X (W + s B A)^T + b (..., out) by autograd, for the joint phase, where W trains too.

    The sum is made outside of autocast, so that W + s B A is rounded once. ``adapters`` cover all
    rows in order.
    """
    sizes = [len(adapter.B) for adapter in adapters]
    effective = []
    with torch.autocast(inputs.device.type, enabled=False):
        for part, adapter in zip(weight.split(sizes), adapters, strict=True):
            A, B, _, scaling = adapter
            effective.append(torch.addmm(part, B, A, alpha=scaling))
    whole = effective[0] if len(effective) == 1 else torch.cat(effective)
    return F.linear(inputs, whole, bias)


def plain_forward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    dropout: float = 0.0,
) -> Tensor:
    """Return X W_res^T + b + s drop(X) A^T B^T (..., out) by autograd; W_res may train.

    With dropout, one mask zeroes a share of the adapters' inputs, for all row slices alike (arXiv
    2106.09685).
    """
    seen = F.dropout(inputs, dropout) if dropout else inputs
    added = []
    for A, B, _, scaling in adapters:
        low = F.linear(seen, A)
        added.append(scaling * F.linear(low, B))
    dtype = compute_dtype(inputs.device.type, [adapters[0].A])
    outputs = F.linear(inputs, weight.to(dtype), bias)
    return outputs + torch.cat(added, dim=-1)


Layout = Sequence[tuple[slice, float]]
"""rows and scaling of each adapter"""


class Product(NamedTuple):
    """How to compute a product with adapters, besides its tensors."""

    form: str
    layout: Layout
    gelu: str | None = None
    """approximation of the gelu that made the inputs; None if the inputs themselves are kept"""


class AdaptedProduct(torch.autograd.Function):
    """X (W_res + s B A)^T + b with gradients for X, b and the factors only.

    - Merged form: the effective weight is used in one full-size product each way.
    - Split form: the low-rank path is added in place to the outputs, and to the gradient of X.

    The backward pass needs the (T, r) projections, which are always kept. X is kept only if A
    trains. Nothing is kept twice: the output of a gelu can be computed again from ``source``, the
    input that gelu keeps for itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Tensor | None,
        source: Tensor | None,
        how: Product,
        *factors: Tensor,
    ) -> Tensor:
        """Map inputs (..., in) to outputs (..., out).

        ``factors`` are A, B of each adapter of ``how``. ``kept`` is the operand of
        ``adapted_forward`` if it was made before. It is then kept for the backward pass; without
        it the backward pass makes the operand a second time.
        """
        device = input.device.type
        dtype = compute_dtype(device, factors)
        with torch.autocast(device, enabled=False):
            operand = kept
            if operand is None:
                adapters = _adapters(how.layout, factors)
                operand = operand_of(weight, adapters, how.form, dtype)
            input = input.to(dtype)
            if bias is not None:
                bias = bias.to(dtype)
            rounded = _adapters(how.layout, _rounded(factors, dtype))
            outputs, projected = adapted_forward(input, operand, bias, rounded, how.form)
        ctx.how = how
        ctx.dtype = dtype
        ctx.shape = input.shape
        for_A = None
        if any(ctx.needs_input_grad[ARGUMENTS::2]):
            for_A = input if source is None else source
        for_operand = weight if kept is None else None
        ctx.save_for_backward(for_A, kept, for_operand, *factors, *projected)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients in the order of ``forward``'s arguments; None for the frozen weight."""
        (grad,) = grads
        grad = grad.reshape(-1, grad.shape[-1])
        inputs, operand, weight, *rest = ctx.saved_tensors
        form, layout, gelu = ctx.how
        num_factors = 2 * len(layout)
        factors = rest[:num_factors]
        projected = rest[num_factors:]
        with torch.autocast(grad.device.type, enabled=False):
            if inputs is not None and gelu is not None:
                inputs = F.gelu(inputs, approximate=gelu)
            if inputs is not None:
                inputs = inputs.to(ctx.dtype).reshape(len(grad), -1)
            if not ctx.needs_input_grad[0]:
                operand = None
            elif operand is None:
                operand = operand_of(weight, _adapters(layout, factors), form, ctx.dtype)
            rounded = _adapters(layout, _rounded(factors, ctx.dtype))
            grad_input, grad_bias, grad_factors = adapted_backward(
                grad, operand, inputs, projected, rounded, form
            )
        if grad_input is not None:
            grad_input = grad_input.view(ctx.shape)
        for_bias = grad_bias if ctx.needs_input_grad[2] else None
        return grad_input, None, for_bias, None, None, None, *grad_factors


def gelu_input(outputs: Tensor) -> tuple[Tensor | None, str | None]:
    """Return Z and gelu's approximation if ``outputs`` = gelu(Z) comes directly from a gelu.

    Return (None, None) for any other tensor, and in compiled code.
    """
    if torch.compiler.is_compiling():
        return None, None
    node = outputs.grad_fn
    if node is None or node.name() != "GeluBackward0":
        return None, None
    return node._saved_self.detach(), node._saved_approximate  # type: ignore[attr-defined]


def compute_dtype(device: str, factors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of the products: autocast's if it is on, else the factors'."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return factors[0].dtype


def operand_of(
    weight: Tensor,
    adapters: Sequence[Adapter],
    form: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the matrix (out, in) that ``adapted_forward`` multiplies by.

    It is the effective weight in the merged form, W_res in the split form.
    """
    if form == "merged":
        return effective_weight(weight, adapters, dtype)
    return weight.to(dtype)


def _rounded(factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [factor.to(dtype) for factor in factors]


def _adapters(layout: Layout, factors: Sequence[Tensor]) -> list[Adapter]:
    all_A = factors[::2]
    all_B = factors[1::2]
    adapters = []
    for (rows, scaling), A, B in zip(layout, all_A, all_B, strict=True):
        adapters.append(Adapter(A, B, rows, scaling))
    return adapters
