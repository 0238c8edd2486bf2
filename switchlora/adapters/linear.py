"""Linear layers with low-rank adapters on a frozen residual weight."""

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchlora.adapters.forms import Shape, cheaper_form, faster_form, rates_of
from switchlora.adapters.product import (
    AdaptedProduct,
    Adapter,
    Made,
    Product,
    adapters_of,
    compute_dtype,
    gelu_input,
    in_compiled_code,
    joint_forward,
    launches_kernels,
    operand_of,
    plain_forward,
    rounded,
    whole_weight,
    without_autocast,
)


class Factors(NamedTuple):
    """The two factors of an adapter: A (r, in) and B (out, r), float32.

    The adapter is scaling * B A.
    """

    A: Tensor
    B: Tensor


class Norms(NamedTuple):
    """||A||_2 and ||B||_2 of an adapter at the time when it was put on."""

    A: float
    B: float


FACTORS = ("A", "B")
BASIS, SPARSE, POOL = "U", "S", "pool"
"""what follows ``lora_`` in the names of the second frozen basis of a core, of SLTrain's sparse
entries and of SwitchLoRA's pool"""
TENSORS = (*FACTORS, BASIS, SPARSE, POOL)
REFORMED_FROM = 8192
"""number of tokens from which the backward pass forms the effective weight again on a CPU, instead
of keeping it; forming it costs about r / T of one product of T tokens, and keeping it costs the
memory of the weight. On a GPU it costs its passes over memory, 11 F / B / T of a product: 30 % of
it at 8,192 tokens on an H100, so there it is always kept"""


class AdaptedLinear(nn.Linear):
    """y = W_res x + b + s B A x (Hu et al., arXiv 2106.09685).

    W_res is usually frozen; in the joint phase it trains and gets a gradient. ``weight`` and
    ``bias`` stay where ``nn.Linear`` has them, so their names in state dicts, optimizers and
    curves survive the switch. Subclasses say where the factors are.

    A ``weight_scale`` beside says that ``weight`` holds the codes of a quantised W_res, in the
    dtype ``coded``: see ``switchlora.adapters.quantised``.

    - ``form`` says how the product is computed: 'merged' or 'split'. With None, ``cheaper_form``
      decides on a CPU, and ``faster_form`` on a GPU.
    - ``recompute_gelu`` saves memory. Inputs that come from a gelu are computed again in the
      backward pass instead of kept.
    - ``dropout`` is the share of the adapter's inputs that training zeroes.
    - ``start_norms`` are the norms of the factors when they were put on, by row slice.

    With dropout, with a weight that trains, or inside ``torch.func``, autograd makes the products.
    ``form`` and ``recompute_gelu`` have no effect then.

    ``nn.TransformerEncoderLayer`` has a fast path for evaluation that reads weights and ignores
    adapters. It is off, in this process, from the first adapter on, made or unpickled.
    """

    kind = "lora"
    """name of the class's adapters in saved layouts and in ``conf/switch/adapter``"""
    keeps_residual = True
    """whether W_res stays beside the adapter, so that injecting it keeps the function"""
    must_save = True
    """whether a target stays full when its factors would have no fewer parameters than it has"""
    begins_anew = False
    """whether it starts as a layer of its own, not as the weight that it replaces"""
    has_weight = True
    """whether it is a linear map, for which one weight can stand"""
    form: str | None = None
    recompute_gelu = False
    dropout = 0.0
    weight_scale: nn.Parameter | None
    coded: torch.dtype | None = None
    _kept: "Kept | None" = None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        torch.backends.mha.set_fastpath_enabled(False)
        self.start_norms: dict[str, Norms] = {}
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("weight_scale", None)
        self.bias = bias  # type: ignore[assignment]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        torch.backends.mha.set_fastpath_enabled(False)

    def adapters(self) -> dict[str, Adapter]:
        """Return the adapters by the name of their row slice, in the order of the rows."""
        raise NotImplementedError

    def dense_rows(self) -> dict[str, nn.Parameter]:
        """Return the weights of the dense row slices by name: no adapter, they train in full."""
        return {}

    def residual(self) -> Tensor:
        """Return what the adapters add to (out, in): W_res, with the rows of dense slices."""
        return self.frozen_weight()

    def frozen_weight(self) -> Tensor:
        """Return ``weight``, or what its codes stand for in the dtype of the factors."""
        if self.coded is None:
            return self.weight
        adapter = next(iter(self.adapters().values()))
        whole = whole_weight(self.weight, self.weight_scale, self.coded, self.in_features)
        return whole.to(adapter.A.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        adapters = list(self.adapters().values())
        bias = self.bias
        if self.dropout and self.training:
            return plain_forward(input, self.residual(), bias, adapters, self.dropout)
        if self.weight.requires_grad or self.dense_rows():
            return joint_forward(input, self.residual(), bias, adapters)
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return plain_forward(input, self.residual(), bias, adapters)
        return self._frozen_forward(input, adapters)

    def _frozen_forward(self, input: Tensor, adapters: Sequence[Adapter]) -> Tensor:
        layout = []
        factors = []
        for A, B, rows, scaling in adapters:
            layout.append((rows, scaling))
            factors += [A, B]
        tokens = input.shape[:-1].numel()
        device = input.device.type
        dtype = compute_dtype(device, factors)
        keeps = self._kept is not None and _keeps_operand(tokens, device)
        keeps = keeps and self.coded is None  # kept operands are as large as whole weights
        form = self.form or self._chosen_form(tokens, adapters, device, dtype, keeps)
        made = None
        if self._kept is not None and not in_compiled_code():
            made = self._kept.made(self, adapters, form, dtype, keeps)
        source, gelu = None, None
        if self.recompute_gelu:
            source, gelu = gelu_input(input)
        stacks = self._stacks(form, adapters, device, keeps)
        how = Product(form, layout, gelu, keeps, stacks, self.coded)
        frozen = self.weight, self.weight_scale, self.bias
        return AdaptedProduct.apply(input, *frozen, made, source, how, *factors)

    def _stacks(self, form: str, adapters: Sequence[Adapter], device: str, keeps: bool) -> bool:
        """Return whether A becomes part of the operand: in a GPU's compiled code.

        There the copy is part of other kernels. Eager code would copy the factor, and gain less
        than it loses.
        """
        compiled = in_compiled_code() and launches_kernels(device)
        has_rank = len(adapters) == 1 and len(adapters[0].A) > 0
        return compiled and keeps and has_rank and form == "merged"

    def _chosen_form(
        self,
        tokens: int,
        adapters: Sequence[Adapter],
        device: str,
        dtype: torch.dtype,
        keeps: bool,
    ) -> str:
        trains_A = any(adapter.A.requires_grad for adapter in adapters)
        if not launches_kernels(device):
            size = self.in_features, self.out_features
            return cheaper_form(tokens, *size, trains_A, slices=len(adapters))
        shape = Shape(
            tokens,
            self.in_features,
            slices=[adapter.B.shape for adapter in adapters],  # type: ignore[misc]
            itemsize=dtype.itemsize,
            weight_itemsize=self.weight.dtype.itemsize,
            trains_A=trains_A,
            made=1 if keeps else 2,
        )
        return faster_form(shape, rates_of(device))

    def merged(self) -> Tensor:
        """Return the effective weight W_res + s B A (out, in): summed in float64, rounded once."""
        return add_adapters(self.residual().detach(), self.adapters())

    def settings(self) -> dict[str, Any]:
        """Return the kind and the attributes that ``kinds.rebuilt`` needs.

        Weights and ranks are not among them.
        """
        norms = {part: tuple(norms) for part, norms in self.start_norms.items()}
        return {"kind": self.kind, "dropout": self.dropout, "start_norms": norms}

    def extra_repr(self) -> str:
        """Return the shapes and the ranks, for ``repr``."""
        ranks = {name: len(adapter.A) for name, adapter in self.adapters().items()}
        return f"{super().extra_repr()}, ranks={ranks}"


class LoRALinear(AdaptedLinear):
    """A linear with one adapter: ``lora_A`` (r, in) and ``lora_B`` (out, r)."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, adapter: Adapter) -> None:
        super().__init__(weight, bias)
        self.scaling = adapter.scaling
        self.lora_A = nn.Parameter(adapter.A)
        self.lora_B = nn.Parameter(adapter.B)

    def adapters(self) -> dict[str, Adapter]:
        """Return the one adapter, under the name '', which stands for all rows."""
        rows = slice(0, self.out_features)
        return {"": Adapter(self.lora_A, self.lora_B, rows, self.scaling)}


class SlicedLoRALinear(AdaptedLinear):
    """A fused linear, such as qkv, with one adapter for each of its row slices.

    The slices cover all rows in order. Their factors are ``lora_A.q`` (r_q, in), ``lora_B.q``
    (rows of q, r_q), and so on. The cost is that of the separate low-rank products, never that of
    a block-diagonal B. A slice of rank 0 has no adapter and is one of these:

    - frozen: its rows are part of ``weight``.
    - dense, because it is to switch later: its rows train as the parameter ``dense.q`` (rows of q,
      in) and are not part of ``weight``.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        adapters: Mapping[str, Adapter],
    ) -> None:
        super().__init__(weight, bias)
        self.scalings: dict[str, float] = {}
        # OrderedDict: ParameterDict sorts the keys of a plain one, and the rows are in order
        lora_A: OrderedDict[str, nn.Parameter] = OrderedDict()
        lora_B: OrderedDict[str, nn.Parameter] = OrderedDict()
        for name, adapter in adapters.items():
            self.scalings[name] = adapter.scaling
            lora_A[name] = nn.Parameter(adapter.A)
            lora_B[name] = nn.Parameter(adapter.B)
        self.lora_A = nn.ParameterDict(lora_A)
        self.lora_B = nn.ParameterDict(lora_B)
        self.dense = nn.ParameterDict()

    @torch.no_grad()
    def make_dense(self, parts: Sequence[str]) -> None:
        """Let the rows of these slices train in full; their adapters must have rank 0."""
        weights = {}
        for name, adapter in self.adapters().items():
            weights[name] = self.weight[adapter.rows]
        dense = {part: nn.Parameter(weights.pop(part).clone()) for part in parts}
        self.dense.update(dense)
        frozen = torch.cat(list(weights.values()))
        self.weight = nn.Parameter(frozen, requires_grad=False)

    def settings(self) -> dict[str, Any]:
        """Return the kind and the attributes, with the names of the dense slices."""
        settings = super().settings()
        settings["dense"] = list(self.dense)
        return settings

    def dense_rows(self) -> dict[str, nn.Parameter]:
        """Return the slices that ``make_dense`` took out of ``weight``, by name."""
        return dict(self.dense.items())

    def residual(self) -> Tensor:
        """Return ``weight`` and the dense slices as one matrix (out, in), in the order of rows.

        Gradients flow through it to the parameters.
        """
        dense, weight = self.dense_rows(), self.frozen_weight()
        if not dense:
            return weight
        sizes = [len(B) for name, B in self.lora_B.items() if name not in dense]
        frozen = iter(weight.split(sizes))
        copies = {name: rows * 1 for name, rows in dense.items()}  # gradients not views of one
        dtype = next(iter(dense.values())).dtype
        slices = []
        for name in self.lora_B:
            rows = copies[name] if name in copies else next(frozen).to(dtype)
            slices.append(rows)
        return torch.cat(slices)

    def adapters(self) -> dict[str, Adapter]:
        """Return the adapter of each row slice by its name."""
        adapters = {}
        start = 0
        for name, B in self.lora_B.items():
            stop = start + len(B)
            rows = slice(start, stop)
            adapters[name] = Adapter(self.lora_A[name], B, rows, self.scalings[name])
            start = stop
        return adapters


class Kept:
    """What the adapted linears of a model make once in an update, and use in all of its passes."""

    def __init__(self, modules: Sequence[AdaptedLinear]) -> None:
        self._modules = modules
        self._small: dict[torch.dtype, dict[AdaptedLinear, Made]] = {}
        self.operands: dict[tuple[AdaptedLinear, str, torch.dtype], Tensor] = {}

    @torch.no_grad()
    def made(
        self,
        module: AdaptedLinear,
        adapters: Sequence[Adapter],
        form: str,
        dtype: torch.dtype,
        with_operand: bool,
    ) -> Made:
        """Return the rounded factors and bias of ``module``, and its operand if asked for."""
        if dtype not in self._small:
            self._small[dtype] = rounded_at_once(self._modules, dtype)
        made = self._small[dtype][module]
        if not with_operand:
            return made
        key = (module, form, dtype)
        if key not in self.operands:
            layout = [(adapter.rows, adapter.scaling) for adapter in adapters]
            small = adapters_of(layout, made.factors)
            with without_autocast(module.weight.device.type):
                self.operands[key] = operand_of(module.weight, adapters, small, form, dtype)
        return Made(self.operands[key], made.bias, made.factors)


def _keeps_operand(tokens: int, device: str) -> bool:
    return launches_kernels(device) or tokens < REFORMED_FROM


def rounded_at_once(
    modules: Iterable[AdaptedLinear], dtype: torch.dtype
) -> dict[AdaptedLinear, Made]:
    """Return the factors and the bias of each module in ``dtype``, without operands.

    One call casts all of them: a kernel in the place of some hundreds on a GPU.
    """
    found = {}
    sources: list[Tensor] = []
    copies: list[Tensor] = []

    def cast(tensor: Tensor) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        sources.append(tensor)
        copies.append(torch.empty_like(tensor, dtype=dtype))
        return copies[-1]

    for module in modules:
        factors: list[Tensor] = []
        for A, B, _, _ in module.adapters().values():
            factors += [A, B]
        bias = module.bias
        small = rounded(factors, dtype, cast)
        found[module] = Made(None, None if bias is None else cast(bias), small)
    if sources:
        torch._foreach_copy_(copies, sources)
    return found


@contextmanager
def operands_kept(model: nn.Module) -> Iterator[None]:
    """Round all factors and form each effective weight once inside, and keep them.

    Use it around one update: factors must not change inside. Two cases form the weight in each
    forward and each backward pass, and hold it only as long as a product takes:

    - passes outside of this context,
    - passes of ``REFORMED_FROM`` tokens or more, on a CPU.
    """
    modules = list(adapted_modules(model).values())
    kept = Kept(modules)
    for module in modules:
        module._kept = kept
    try:
        yield
    finally:
        for module in modules:
            module._kept = None


def adapted_linear(linear: nn.Linear, adapters: Mapping[str, Adapter]) -> AdaptedLinear:
    """Return a module with ``adapters`` that computes the same function as ``linear``.

    The bias is shared with ``linear``, whose own weight is left alone: W_res = W - s B A is a new
    tensor. To undo the switch, put ``linear`` back.
    """
    weight = add_adapters(linear.weight.detach(), adapters, sign=-1)
    module: AdaptedLinear
    if set(adapters) == {""}:
        module = LoRALinear(weight, linear.bias, adapters[""])
    else:
        module = SlicedLoRALinear(weight, linear.bias, adapters)
    return module.train(linear.training)


@torch.no_grad()
def add_adapters(weight: Tensor, adapters: Mapping[str, Adapter], sign: int = 1) -> Tensor:
    """Return W + sign * s B A, with each adapter added on its rows.

    The sum is made in float64 and rounded once, to the finer dtype of ``weight`` and the factors.
    """
    total = weight.to(torch.float64, copy=True)
    dtype = weight.dtype
    for A, B, rows, scaling in adapters.values():
        product = B.double() @ A.double()
        total[rows].add_(product, alpha=sign * scaling)
        dtype = torch.promote_types(dtype, A.dtype)
    return total.to(dtype)


def seed_of(A: Tensor) -> int:
    """Return a seed that is a function of a factor, so the same on all ranks; 0 on 'meta'."""
    return 0 if A.is_meta else zlib.crc32(A.detach().cpu().contiguous().numpy().tobytes())


def is_factor(parameter_name: str, which: Sequence[str] = TENSORS) -> bool:
    """Return whether this names a tensor of an adapter, or one of its tensors ``which``."""
    return any(f"lora_{factor}" in parameter_name for factor in which)


def scaling_one(rank: int) -> float:
    """Return s = 1: the factors alone carry the adapter's magnitude."""
    return 1.0


def alpha_over_rank(rank: int, alpha: float) -> float:
    """Return s = alpha / r (Hu et al., arXiv 2106.09685)."""
    return alpha / max(rank, 1)


def rank_stabilised(rank: int, alpha: float) -> float:
    """Return s = alpha / sqrt(r) (rsLoRA; Kalajdzievski, arXiv 2312.03732)."""
    return alpha / max(rank, 1) ** 0.5


def trained_adapters(model: nn.Module) -> list[Adapter]:
    """Return the adapters of ``model`` whose factors train; it is enough that B does.

    Each row slice counts as an adapter of its own.
    """
    trained = []
    for module in adapted_modules(model).values():
        for adapter in module.adapters().values():
            if len(adapter.A) and adapter.B.requires_grad:
                trained.append(adapter)
    return trained


@torch.no_grad()
def add_frobenius_decay(adapters: Iterable[Adapter], strength: float) -> None:
    """Add the gradient of strength/2 ||s B A||_F^2 to the factors' gradients.

    g_A += strength s^2 (B^T B) A and g_B += strength s^2 B (A A^T). No product here has the size
    of the weight. Factors without a gradient are left out. This is Cuttlefish's Frobenius decay
    (Wang et al., arXiv 2305.02538).
    """
    for A, B, _, scaling in adapters:
        factor = strength * scaling**2
        if A.grad is not None:
            A.grad.addmm_(B.mT @ B, A, alpha=factor)
        if B.grad is not None:
            B.grad.addmm_(B, A @ A.mT, alpha=factor)


def without_weight(model: nn.Module) -> list[str]:
    """Return the modules with adapters that no weight can stand for, by name."""
    return [name for name, module in adapted_modules(model).items() if not module.has_weight]


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the modules with adapters, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            found[name] = module
    return found
