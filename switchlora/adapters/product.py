"""The product X (W_res + s B A)^T + b: its two forms, its gradients, and what it keeps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlora.adapters.forms import Rates, set_rates
from switchlora.adapters.quantised import dequantised

ARGUMENTS = 7
"""number of arguments of ``AdaptedProduct.forward`` before the factors A, B, A, B, ..."""
LAUNCHING: tuple[str, ...] = ("cuda", "xpu", "mps")
"""devices on which the host launches each operation as a kernel, and often is what an update
waits for"""
COUNTED_AS_COMPILED = False
ALIGNED_BYTES = 16
"""a GPU's kernels read so many bytes at once, if each row of a matrix begins at a multiple"""


class Adapter(NamedTuple):
    """scaling * B A on some rows of a weight: A (r, in), B (len(rows), r)."""

    A: Tensor
    B: Tensor
    rows: slice
    scaling: float


def launches_kernels(device: str) -> bool:
    """Return whether fewer operations count more than their order: see ``LAUNCHING``.

    On a CPU sums keep their order, so that losses stay the same bit by bit.
    """
    return device in LAUNCHING


def in_compiled_code() -> bool:
    """Return whether torch.compile makes code of what runs, or a trace counts as if it did."""
    return COUNTED_AS_COMPILED or torch.compiler.is_compiling()


@contextmanager
def as_on_a_gpu(rates: Rates | None = None, compiled: bool = False) -> Iterator[None]:
    """Let products on this CPU be made inside as on a GPU of these ``rates``, to count or test.

    ``compiled`` says as in compiled code there.
    """
    global LAUNCHING, COUNTED_AS_COMPILED
    before = LAUNCHING, COUNTED_AS_COMPILED
    LAUNCHING, COUNTED_AS_COMPILED = (*LAUNCHING, "cpu"), compiled
    set_rates("cpu", rates)
    try:
        yield
    finally:
        LAUNCHING, COUNTED_AS_COMPILED = before
        set_rates("cpu", None)


def effective_weight(
    weight: Tensor,
    adapters: Sequence[Adapter],
    rounded: Sequence[Adapter],
    dtype: torch.dtype,
) -> Tensor:
    """Return W_res + s B A (out, in) in ``dtype``.

    The sum is made in at least float32 and rounded once. The exception is a W_res that already has
    a lower precision ``dtype``: there the kernel of that precision adds ``rounded`` factors, as
    under autocast.
    """
    if weight.dtype == dtype:
        return _with_products(weight, rounded)
    exact = torch.promote_types(weight.dtype, torch.float32)
    return _with_products(weight.to(exact), adapters).to(dtype)


def _with_products(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Return a new W + s B A in the dtype of W."""
    dtype = weight.dtype
    if len(adapters) == 1:
        A, B, _, scaling = adapters[0]
        return torch.addmm(weight, B.to(dtype), A.to(dtype), alpha=scaling)
    total = weight.clone()
    for A, B, rows, scaling in adapters:
        total[rows].addmm_(B.to(dtype), A.to(dtype), alpha=scaling)
    return total


def adapted_forward(
    inputs: Tensor,
    operand: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    form: str,
    stacked: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs (..., out) of X (..., in), and X A^T (T, r) of each adapter.

    X A^T is kept for B's gradient. ``operand`` (out, in) depends on ``form``:

    - 'merged': the effective weight.
    - 'split': W_res. s (X A^T) B^T is then added in place.

    ``stacked`` says that it is what ``stacked_operand`` returns.
    """
    if stacked:
        return _stacked_forward(inputs, operand, bias, len(adapters[0].B))
    outputs = F.linear(inputs, operand, bias)
    flat = inputs.reshape(-1, inputs.shape[-1])
    projected = [F.linear(flat, adapter.A) for adapter in adapters]
    if form == "split":
        out_features = outputs.shape[-1]
        columns = outputs.view(-1, out_features)
        for adapter, low in zip(adapters, projected, strict=True):
            place = _columns(columns, adapter.rows)
            place.addmm_(low, adapter.B.t(), alpha=adapter.scaling)
    return outputs, projected


def _stacked_forward(
    inputs: Tensor, operand: Tensor, bias: Tensor | None, out_features: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs and X A^T: of one product where X is at least as wide as the outputs.

    Of wider outputs a second pass over X costs little. One product was slower there: an H100 then
    copied the bias over all outputs (``docs/results/gpu.md``).
    """
    in_features = inputs.shape[-1]
    rank = len(operand) - out_features
    if out_features > in_features:
        flat = inputs.reshape(-1, in_features)
        outputs = F.linear(inputs, operand[:out_features], bias)
        return outputs, [F.linear(flat, operand[out_features:])]
    bias = None if bias is None else F.pad(bias, (0, rank))
    both = F.linear(inputs, operand, bias)
    outputs, low = both.split([out_features, rank], dim=-1)
    return outputs, [low.reshape(-1, rank).contiguous()]  # a view would keep all outputs alive


def stacked_operand(effective: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Return [W; A] for the effective weight W: rows for outputs, columns for inputs.

    X [W; A]^T holds the outputs and X A^T. So one product passes over X, where two would.
    """
    return torch.cat([effective, adapters[0].A])


def adapted_backward(
    grad: Tensor,
    operand: Tensor | None,
    inputs: Tensor | None,
    projected: Sequence[Tensor],
    adapters: Sequence[Adapter],
    form: str,
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor]]:
    """Return the gradients of X and of the factors, and of the bias where they come with it.

    They come from the gradient G (T, out) of the outputs, without a dense (out, in) product: g_X =
    G (W_res + s B A), g_A = s (G B)^T X, g_B = s G^T (X A^T). Without ``operand`` there is no g_X,
    and without ``inputs`` no g_A. ``dtype`` is that of the trained factors.

    On a CPU the product for g_B yields the bias's gradient too, the column sums of G, because
    X A^T gets a column of ones. On a GPU rows of r + 1 numbers would be misaligned.

    g_X has memory of its own. Attention on a GPU may read a part of a wider matrix wrongly: torch
    keeps cuDNN's graph for the strides of the first gradient (``docs/results/gpu.md``).
    """
    grad_input = None if operand is None else torch.mm(grad, operand)
    few_kernels = launches_kernels(grad.device.type)
    ones = None if few_kernels else grad.new_ones(len(grad), 1)
    grad_bias: list[Tensor] = []
    grad_factors: list[Tensor | None] = []
    for adapter, low in zip(adapters, projected, strict=True):
        A, B, rows, scaling = adapter
        part = _columns(grad, rows)
        grad_A = None
        if inputs is not None or form == "split":
            back = torch.mm(part, B)
            if form == "split" and grad_input is not None:
                grad_input.addmm_(back, A, alpha=scaling)
            if inputs is not None:
                grad_A = _scaled(_product(back.t(), inputs, dtype), scaling)
        if ones is None:
            grad_B = _product(part.t(), low, dtype)  # contiguous, as the factor is
        else:
            with_ones = torch.cat([low, ones], dim=1)
            both = with_ones.t() @ part  # G stays the wide, untransposed operand
            grad_B = both[:-1].t()
            grad_bias.append(both[-1])
        grad_factors += [grad_A, _scaled(grad_B, scaling)]
    return grad_input, grad_factors, grad_bias


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left @ right, in ``dtype`` if the kernel can: CUDA's sum 16 bits into float32.

    A gradient then needs no cast of its own.
    """
    halves = left.dtype in (torch.bfloat16, torch.float16)
    if left.is_cuda and halves and dtype == torch.float32 and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right)


def _columns(matrix: Tensor, columns: slice) -> Tensor:
    whole = columns.start == 0 and columns.stop == matrix.shape[1]
    return matrix if whole else matrix[:, columns]


def _scaled(product: Tensor, scaling: float) -> Tensor:
    return product if scaling == 1 else product.mul_(scaling)


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
    keeps: bool = False
    """whether the operand is kept for the backward pass, which else makes it a second time"""
    stacked: bool = False
    """whether one adapter's A is part of the operand, beside the effective weight: see
    ``stacked_operand``"""
    coded: torch.dtype | None = None
    """how to read the codes of a quantised W_res"""


class Made(NamedTuple):
    """What a product takes instead of making it: see ``AdaptedProduct``."""

    operand: Tensor | None
    """the operand of ``adapted_forward``; None: it is made when it is needed"""
    bias: Tensor | None
    factors: Sequence[Tensor]
    """A, B of each adapter, as ``rounded`` returns them"""


class AdaptedProduct(torch.autograd.Function):
    """X (W_res + s B A)^T + b with gradients for X, b and the factors only.

    A quantised W_res comes with its ``scale``. It is dequantised where an operand is made.

    - Merged form: the effective weight is used in one full-size product each way.
    - Split form: the low-rank path is added in place to the outputs, and to the gradient of X.

    RunLoRA (Cherniuk et al., arXiv 2312.03415) published such forms, and that shapes choose.

    The backward pass needs the (T, r) projections, which are always kept. X is kept only if A
    trains. Nothing is kept twice: the output of a gelu can be computed again from ``source``, the
    input that gelu keeps for itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        made: Made | None,
        source: Tensor | None,
        how: Product,
        *factors: Tensor,
    ) -> Tensor:
        """Map inputs (..., in) to outputs (..., out).

        ``factors`` are A, B of each adapter of ``how``. ``made`` holds what was made of them
        before.
        """
        device = input.device.type
        dtype = compute_dtype(device, factors)
        with without_autocast(device):
            if made is None:
                small_factors = rounded(factors, dtype, padded=how.stacked)
                made = Made(None, None if bias is None else bias.to(dtype), small_factors)
            small = adapters_of(how.layout, made.factors)
            operand = made.operand
            if operand is None:
                adapters = adapters_of(how.layout, factors)
                whole = whole_weight(weight, scale, how.coded, input.shape[-1])
                operand = operand_of(whole, adapters, small, how.form, dtype)
                if how.stacked:
                    operand = stacked_operand(operand, small)
            input = input.to(dtype)
            outputs, projected = adapted_forward(
                input, operand, made.bias, small, how.form, how.stacked
            )
        ctx.how = how
        ctx.dtype = dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.shape = input.shape
        for_A = None
        if any(ctx.needs_input_grad[ARGUMENTS::2]):
            for_A = input if source is None else source
        kept = (for_A, operand, None, None) if how.keeps else (for_A, None, weight, scale)
        ctx.save_for_backward(*kept, *factors, *made.factors, *projected)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients in the order of ``forward``'s arguments; None for the frozen weight."""
        (grad,) = grads
        grad = grad.reshape(-1, grad.shape[-1])
        inputs, operand, weight, scale, *rest = ctx.saved_tensors
        form, layout, gelu, _, stacked, coded = ctx.how
        num_factors = 2 * len(layout)
        factors = rest[:num_factors]
        small = adapters_of(layout, rest[num_factors : 2 * num_factors])
        projected = rest[2 * num_factors :]
        with without_autocast(grad.device.type):
            if inputs is not None and gelu is not None:
                inputs = F.gelu(inputs, approximate=gelu)
            if inputs is not None:
                inputs = inputs.to(ctx.dtype).reshape(len(grad), -1)
            if not ctx.needs_input_grad[0]:
                operand = None
            elif operand is None:
                adapters = adapters_of(layout, factors)
                whole = whole_weight(weight, scale, coded, ctx.shape[-1])
                operand = operand_of(whole, adapters, small, form, ctx.dtype)
            if stacked and operand is not None:
                operand = operand[: grad.shape[1]]
            grad_input, grad_factors, bias_parts = adapted_backward(
                grad, operand, inputs, projected, small, form, factors[0].dtype
            )
            grad_bias = None
            if ctx.needs_input_grad[3]:
                grad_bias = _bias_gradient(grad, bias_parts, ctx.bias_dtype)
        if grad_input is not None:
            grad_input = grad_input.view(ctx.shape)
        cut = _without_padding(grad_factors, factors)
        return grad_input, None, None, grad_bias, None, None, None, *cut


def _bias_gradient(grad: Tensor, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the column sums of ``grad``: its ``parts`` by row slice, where they were made."""
    return torch.cat(list(parts)) if parts else grad.sum(0, dtype=dtype)


def without_autocast(device: str) -> AbstractContextManager:
    """Return a context in which autocast is off."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


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


def whole_weight(
    weight: Tensor, scale: Tensor | None, coded: torch.dtype | None, in_features: int
) -> Tensor:
    """Return W_res (out, in): ``weight`` itself, or in float32 what its codes stand for."""
    if scale is None or coded is None:
        return weight
    return dequantised(weight, scale, coded, in_features)


def operand_of(
    weight: Tensor,
    adapters: Sequence[Adapter],
    rounded: Sequence[Adapter],
    form: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the matrix (out, in) that ``adapted_forward`` multiplies by.

    It is the effective weight in the merged form, W_res in the split form.
    """
    if form == "merged":
        return effective_weight(weight, adapters, rounded, dtype)
    return weight.to(dtype)


def rounded(
    factors: Sequence[Tensor],
    dtype: torch.dtype,
    cast: Callable[[Tensor], Tensor] | None = None,
    padded: bool = False,
) -> list[Tensor]:
    """Return A, B, A, B, ... in ``dtype``, with ``padding`` of zeros.

    What needs no padding is ``cast``, which may do so later; without it, at once. ``padded`` pads
    where it costs a copy, too.
    """
    found = []
    for number, factor in enumerate(factors):
        is_B = number % 2 == 1
        added = padding(factor, is_B, dtype, padded)
        if added:
            found.append(F.pad(factor.to(dtype), (0, added) if is_B else (0, 0, 0, added)))
        else:
            found.append(factor.to(dtype) if cast is None else cast(factor))
    return found


def padding(factor: Tensor, is_B: bool, dtype: torch.dtype, always: bool = False) -> int:
    """Return how many ranks of zeros align the rows of matrices of r columns, on a GPU.

    0 where the factor is used as it is, without a cast: padding it would cost a copy. ``always``
    takes it.
    """
    used_as_it_is = factor.dtype == dtype and not always
    if used_as_it_is or not launches_kernels(factor.device.type):
        return 0
    rank = factor.shape[1 if is_B else 0]
    return -rank % (ALIGNED_BYTES // dtype.itemsize)


def _without_padding(
    gradients: Sequence[Tensor | None], factors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients in the shapes of their ``factors``."""
    found = []
    for gradient, factor in zip(gradients, factors, strict=True):
        if gradient is not None and gradient.shape != factor.shape:
            gradient = gradient[: factor.shape[0], : factor.shape[1]]
        found.append(gradient)
    return found


def adapters_of(layout: Layout, factors: Sequence[Tensor]) -> list[Adapter]:
    """Return the adapters of a ``layout``, with the ``factors`` A, B, A, B, ..."""
    adapters = []
    for number, (rows, scaling) in enumerate(layout):
        adapters.append(Adapter(factors[2 * number], factors[2 * number + 1], rows, scaling))
    return adapters
