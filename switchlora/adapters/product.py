"""The product X (W_res + s B A)^T + b: its two forms, its gradients, and what it keeps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Adapter(NamedTuple):
    """scaling * B A on some rows of a weight: A (r, in), B (len(rows), r)."""

    A: Tensor
    B: Tensor
    rows: slice
    scaling: float


def cheaper_form(
    tokens: int, in_features: int, out_features: int, trains_A: bool = True, slices: int = 1
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
    apart = slices * in_features + out_features * (1 if trains_A else 2)
    return "merged" if tokens * apart >= in_features * out_features else "split"


def effective_weight(weight: Tensor, adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor:
    """Return W_res + s B A (out, in) in ``dtype``.

    The sum is made in at least float32 and rounded once. The exception is a W_res that already has
    a lower precision ``dtype``: there the kernel of that precision adds rounded factors, as under
    autocast.
    """
    exact = dtype if weight.dtype == dtype else torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(exact, copy=True)
    for A, B, rows, scaling in adapters:
        total[rows].addmm_(B.to(exact), A.to(exact), alpha=scaling)
    return total.to(dtype)


def adapted_forward(
    inputs: Tensor, operand: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], form: str
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
        columns = outputs.view(-1, outputs.shape[-1])
        for (_, B, rows, scaling), low in zip(adapters, projected, strict=True):
            columns[:, rows].addmm_(low, B.mT, alpha=scaling)
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
    sums, found = [], []
    for (A, B, rows, scaling), low in zip(adapters, projected, strict=True):
        part = grad[:, rows]
        grad_A = None
        if inputs is not None or form == "split":
            back = part @ B
            if form == "split" and grad_input is not None:
                grad_input.addmm_(back, A, alpha=scaling)
            if inputs is not None:
                grad_A = scaling * (back.mT @ inputs)
        both = torch.cat([low, ones], dim=1).mT @ part  # G stays the wide, untransposed operand
        found += [grad_A, scaling * both[:-1].mT]
        sums.append(both[-1])
    return grad_input, torch.cat(sums), found


def joint_forward(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]
) -> Tensor:
    """Return X (W + s B A)^T + b (..., out) by autograd, for the joint phase, where W trains too.

    The sum is made outside of autocast, so that W + s B A is rounded once. ``adapters`` cover all
    rows in order.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        parts = weight.split([len(adapter.B) for adapter in adapters])
        pairs = zip(parts, adapters, strict=True)
        total = [torch.addmm(part, B, A, alpha=scaling) for part, (A, B, _, scaling) in pairs]
    return F.linear(inputs, total[0] if len(total) == 1 else torch.cat(total), bias)


def dropped_forward(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], p: float
) -> Tensor:
    """Return X W_res^T + b + s drop(X) A^T B^T (..., out) by autograd, for training with dropout.

    One mask zeroes a share ``p`` of the inputs, for all row slices alike (arXiv 2106.09685). W_res
    may train.
    """
    dropped = F.dropout(inputs, p)
    low = [a.scaling * F.linear(F.linear(dropped, a.A), a.B) for a in adapters]
    weight = weight.to(compute_dtype(inputs.device.type, [adapters[0].A]))
    return F.linear(inputs, weight, bias) + torch.cat(low, dim=-1)


class Product(NamedTuple):
    """How to compute a product with adapters, besides its tensors."""

    form: str
    layout: Sequence[tuple[slice, float]]
    """rows and scaling of each adapter"""
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
        device, dtype = input.device.type, compute_dtype(input.device.type, factors)
        with torch.autocast(device, enabled=False):
            adapters = _adapters(how.layout, factors)
            operand = kept if kept is not None else operand_of(weight, adapters, how.form, dtype)
            input = input.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            cast = _adapters(how.layout, [factor.to(dtype) for factor in factors])
            outputs, projected = adapted_forward(input, operand, bias, cast, how.form)
        ctx.how, ctx.dtype, ctx.shape = how, dtype, input.shape
        inputs = input if source is None else source
        trains_A = any(ctx.needs_input_grad[6::2])
        needed = inputs if trains_A else None, kept, weight if kept is None else None
        ctx.save_for_backward(*needed, *factors, *projected)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients in the order of ``forward``'s arguments; None for the frozen weight."""
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        inputs, operand, weight, *rest = ctx.saved_tensors
        form, layout, gelu = ctx.how
        factors, projected = rest[: 2 * len(layout)], rest[2 * len(layout) :]
        with torch.autocast(grad.device.type, enabled=False):
            if inputs is not None:
                inputs = inputs if gelu is None else F.gelu(inputs, approximate=gelu)
                inputs = inputs.to(ctx.dtype).reshape(len(grad), -1)
            adapters = _adapters(layout, factors)
            if not ctx.needs_input_grad[0]:
                operand = None
            elif operand is None:
                operand = operand_of(weight, adapters, form, ctx.dtype)
            cast = _adapters(layout, [factor.to(ctx.dtype) for factor in factors])
            grad_input, grad_bias, found = adapted_backward(
                grad, operand, inputs, projected, cast, form
            )
        if grad_input is not None:
            grad_input = grad_input.view(ctx.shape)
        bias = grad_bias if ctx.needs_input_grad[2] else None
        return grad_input, None, bias, None, None, None, *found


def gelu_input(outputs: Tensor) -> tuple[Tensor | None, str | None]:
    """Return Z and gelu's approximation if ``outputs`` = gelu(Z) comes directly from a gelu.

    Return (None, None) for any other tensor, and in compiled code.
    """
    node = None if torch.compiler.is_compiling() else outputs.grad_fn
    if node is None or node.name() != "GeluBackward0":
        return None, None
    return node._saved_self.detach(), node._saved_approximate  # type: ignore[attr-defined]


def compute_dtype(device: str, factors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of the products: autocast's if it is on, else the factors'."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return factors[0].dtype


def operand_of(
    weight: Tensor, adapters: Sequence[Adapter], form: str, dtype: torch.dtype
) -> Tensor:
    """Return the matrix (out, in) that ``adapted_forward`` multiplies by.

    It is the effective weight in the merged form, W_res in the split form.
    """
    return effective_weight(weight, adapters, dtype) if form == "merged" else weight.to(dtype)


def _adapters(layout: Sequence[tuple[slice, float]], factors: Sequence[Tensor]) -> list[Adapter]:
    pairs = zip(layout, factors[::2], factors[1::2], strict=True)
    return [Adapter(A, B, rows, scaling) for (rows, scaling), A, B in pairs]
