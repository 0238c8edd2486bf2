"""Linear layers with low-rank adapters on a frozen residual weight."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FACTORS = ("A", "B")
REFORMED_FROM = 8192
"""tokens from which an effective weight is formed again in the backward pass: that costs about
r / T of a product, and keeping it the memory of the weight"""


class Adapter(NamedTuple):
    """scaling * B A on some rows of a weight: A (r, in), B (len(rows), r)."""

    A: Tensor
    B: Tensor
    rows: slice
    scaling: float


def cheaper_form(
    tokens: int, in_features: int, out_features: int, trains_A: bool = True, slices: int = 1
) -> str:
    """'merged' or 'split', whichever costs less for ``tokens`` inputs; only shapes decide.

    Forming W_res + s B A takes r in out multiply-adds once; apart, the low-rank path adds
    T r (n in + out) with n row slices, and T r out more where A is frozen, whose gradient would
    need that product anyway. Bytes read and written compare in the same way, so r cancels out.
    """
    apart = slices * in_features + out_features * (1 if trains_A else 2)
    return "merged" if tokens * apart >= in_features * out_features else "split"


def effective_weight(weight: Tensor, adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor:
    """W_res + s B A (out, in) in ``dtype``.

    The sum is made in at least float32 and rounded once; where W_res has a lower precision
    already, by the kernel of that precision, with rounded factors, as under autocast.
    """
    exact = dtype if weight.dtype == dtype else torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(exact, copy=True)
    for A, B, rows, scaling in adapters:
        total[rows].addmm_(B.to(exact), A.to(exact), alpha=scaling)
    return total.to(dtype)


def adapted_forward(
    inputs: Tensor, operand: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], form: str
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (..., out) of X (..., in), and X A^T (T, r) of each adapter, for B's gradient.

    ``operand`` is the effective weight in the merged form, W_res in the split one, where
    s (X A^T) B^T is added in place.
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
    """Gradients of X, of the bias and of the factors from that of the outputs, G (T, out).

    g_X = G (W_res + s B A), g_A = s (G B)^T X, g_B = s G^T (X A^T): no dense (out, in) product.
    Without ``operand`` g_X is left out, without ``inputs`` g_A. The bias's gradient, the column
    sums of G, comes out of the product that makes g_B: X A^T gets a column of ones.
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


class Product(NamedTuple):
    """How an adapted product is made, besides its tensors."""

    form: str
    layout: Sequence[tuple[slice, float]]
    """rows and scaling of each adapter"""
    gelu: str | None = None
    """approximation of the gelu that made the inputs, where they are not kept"""


class AdaptedProduct(torch.autograd.Function):
    """X (W_res + s B A)^T + b with gradients for X, b and the factors only.

    Merged, the effective weight is formed and used in one full-size product each way; split, the
    low-rank path is added in place to the outputs and to the inputs' gradient. X is kept for the
    backward pass only where A trains, the (T, r) projections always, and nothing twice: the
    output of a gelu can be made again from ``source``, the input that gelu keeps for itself.
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
        """(..., in) -> (..., out); ``factors`` are A, B of each adapter of ``how``.

        ``kept`` is the operand when it was made before; it is then kept for the backward pass,
        where it is made a second time otherwise.
        """
        device, dtype = input.device.type, compute_dtype(input.device.type, factors)
        with torch.autocast(device, enabled=False):
            adapters = _adapters(how.layout, factors)
            operand = kept if kept is not None else _operand(weight, adapters, how.form, dtype)
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
        """Gradients in the order of the arguments of ``forward``; None for the frozen weight."""
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
                operand = _operand(weight, adapters, form, ctx.dtype)
            cast = _adapters(layout, [factor.to(ctx.dtype) for factor in factors])
            grad_input, grad_bias, found = adapted_backward(
                grad, operand, inputs, projected, cast, form
            )
        if grad_input is not None:
            grad_input = grad_input.view(ctx.shape)
        bias = grad_bias if ctx.needs_input_grad[2] else None
        return grad_input, None, bias, None, None, None, *found


def gelu_input(outputs: Tensor) -> tuple[Tensor | None, str | None]:
    """Z and the approximation where ``outputs`` = gelu(Z) comes fresh from a gelu, else None."""
    node = None if torch.compiler.is_compiling() else outputs.grad_fn
    if node is None or node.name() != "GeluBackward0":
        return None, None
    return node._saved_self.detach(), node._saved_approximate  # type: ignore[attr-defined]


def compute_dtype(device: str, factors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, the factors' otherwise."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return factors[0].dtype


def _operand(weight: Tensor, adapters: Sequence[Adapter], form: str, dtype: torch.dtype) -> Tensor:
    return effective_weight(weight, adapters, dtype) if form == "merged" else weight.to(dtype)


def _adapters(layout: Sequence[tuple[slice, float]], factors: Sequence[Tensor]) -> list[Adapter]:
    pairs = zip(layout, factors[::2], factors[1::2], strict=True)
    return [Adapter(A, B, rows, scaling) for (rows, scaling), A, B in pairs]


class AdaptedLinear(nn.Linear):
    """y = W_res x + b + s B A x with W_res frozen (Hu et al., arXiv 2106.09685).

    ``weight`` and ``bias`` stay where ``nn.Linear`` has them, so the names in state dicts,
    optimizers and curves survive the switch. Subclasses say where the factors are. ``form`` is
    'merged' or 'split', None leaves it to ``cheaper_form``. With ``recompute_gelu``, inputs that
    come from a gelu are made again in the backward pass instead of kept.
    """

    kind = "lora"
    form: str | None = None
    recompute_gelu = False
    dropout = 0.0
    _kept: dict[tuple[str, torch.dtype], Tensor] | None = None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]

    def adapters(self) -> dict[str, Adapter]:
        """The adapters by the name of their row slice, in the order of the rows."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        adapters = list(self.adapters().values())
        layout = [(adapter.rows, adapter.scaling) for adapter in adapters]
        factors = [factor for adapter in adapters for factor in (adapter.A, adapter.B)]
        tokens = input.shape[:-1].numel()
        trains_A = any(adapter.A.requires_grad for adapter in adapters)
        shape = (self.in_features, self.out_features)
        form = self.form or cheaper_form(tokens, *shape, trains_A, len(adapters))
        dtype = compute_dtype(input.device.type, factors)
        kept = self._kept_operand(adapters, form, dtype) if tokens < REFORMED_FROM else None
        source, gelu = gelu_input(input) if self.recompute_gelu else (None, None)
        how = Product(form, layout, gelu)
        return AdaptedProduct.apply(input, self.weight, self.bias, kept, source, how, *factors)

    def merged(self) -> Tensor:
        """The effective weight W_res + s B A (out, in): summed in float64, rounded once."""
        return add_adapters(self.weight.detach(), self.adapters())

    def settings(self) -> dict[str, Any]:
        """Kind and attributes, besides weights and ranks, that ``lowrank.rebuilt`` needs."""
        return {"kind": self.kind, "dropout": self.dropout}

    @torch.no_grad()
    def _kept_operand(
        self, adapters: Sequence[Adapter], form: str, dtype: torch.dtype
    ) -> Tensor | None:
        if torch.compiler.is_compiling() or self._kept is None:
            return None
        if (form, dtype) not in self._kept:
            with torch.autocast(self.weight.device.type, enabled=False):
                self._kept[form, dtype] = _operand(self.weight, adapters, form, dtype)
        return self._kept[form, dtype]

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


@contextmanager
def operands_kept(model: nn.Module) -> Iterator[None]:
    """Within one update, effective weights are formed once and kept for the backward pass.

    Factors must not change inside. Outside, and where a pass sees ``REFORMED_FROM`` tokens or
    more, each forward and each backward pass forms its own and holds it no longer than a product
    takes.
    """
    modules = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for module in modules:
        module._kept = {}
    try:
        yield
    finally:
        for module in modules:
            module._kept = None


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
    """W + sign * s B A on the rows of each adapter: summed in float64, rounded once.

    The result has the dtype of the factors where that is the finer one.
    """
    total = weight.to(torch.float64, copy=True)
    dtype = weight.dtype
    for adapter in adapters.values():
        product = adapter.B.double() @ adapter.A.double()
        total[adapter.rows].add_(product, alpha=sign * adapter.scaling)
        dtype = torch.promote_types(dtype, adapter.A.dtype)
    return total.to(dtype)


def is_factor(parameter_name: str, which: Sequence[str] = FACTORS) -> bool:
    """Whether a parameter name belongs to an adapter's factors, or to ``which`` of them."""
    return any(f"lora_{factor}" in parameter_name for factor in which)


def scaling_one(rank: int) -> float:
    """s = 1: the factors alone carry the adapter's magnitude."""
    return 1.0


def alpha_over_rank(rank: int, alpha: float) -> float:
    """s = alpha / r (Hu et al., arXiv 2106.09685)."""
    return alpha / max(rank, 1)


def rank_stabilised(rank: int, alpha: float) -> float:
    """s = alpha / sqrt(r) (rsLoRA; Kalajdzievski, arXiv 2312.03732)."""
    return alpha / max(rank, 1) ** 0.5
