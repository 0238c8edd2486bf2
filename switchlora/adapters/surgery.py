"""Put adapters into a model, take them out again, read the merged weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from switchlora.adapters.kinds import rebuilt
from switchlora.adapters.linear import (
    AdaptedLinear,
    Factors,
    Norms,
    SlicedLoRALinear,
    adapted_linear,
    adapted_modules,
    is_factor,
)
from switchlora.adapters.product import Adapter
from switchlora.adapters.quantised import is_quantised, quantised
from switchlora.adapters.targets import Target


def inject(
    model: nn.Module,
    targets: Mapping[str, Target],
    factors: Mapping[str, Factors],
    scaling: Callable[[int], float],
    make: Callable[[nn.Linear, Mapping[str, Adapter]], AdaptedLinear] = adapted_linear,
    dropout: float = 0.0,
) -> dict[str, nn.Linear]:
    """Put adapters on the targets that ``factors`` names; return the replaced modules by name.

    ``restore`` undoes it exactly. ``make`` builds the new module from a plain linear and its
    adapters; most kinds keep the function of that linear. A module that has adapters already is
    merged first.

    - Row slices of a fused linear that ``factors`` does not name keep the factors they have.
      Without factors they stay dense.
    - A plain linear whose rows would all get rank 0 stays an ``nn.Linear``.
    """
    replaced = {}
    adapted = {}
    for name, new in _by_module(targets, factors, scaling).items():
        linear = cast(nn.Linear, model.get_submodule(name))
        rows = _slices_of(name, targets)
        adapters, dense = _of_all_slices(linear, rows, new)
        has_rank = any(len(adapter.A) for adapter in new.values())
        if dense or has_rank or isinstance(linear, AdaptedLinear):
            module = make(plain(linear), adapters)
            if dense:
                cast(SlicedLoRALinear, module).make_dense(dense)
            module.dropout = dropout
            made = module.adapters()
            module.start_norms = _start_norms(linear, {part: made[part] for part in new})
            replaced[name] = linear
            adapted[name] = module
    for name, module in adapted.items():
        model.set_submodule(name, module)
    return replaced


def plain(module: nn.Linear) -> nn.Linear:
    """Return ``module`` if it has no adapters, else an ``nn.Linear`` with its effective weight.

    The bias is the same parameter.
    """
    if not isinstance(module, AdaptedLinear):
        return module
    merged = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    merged.weight = nn.Parameter(module.merged().detach())
    merged.bias = module.bias
    return merged.train(module.training)


def merge(model: nn.Module) -> dict[str, nn.Linear]:
    """Replace all modules with adapters by plain linears of the same function.

    Return the replaced modules by name: ``restore(model, merge(model))`` leaves every bit as it
    was.
    """
    replaced: dict[str, nn.Linear] = {}
    for name, module in adapted_modules(model).items():
        model.set_submodule(name, plain(module))
        replaced[name] = module
    return replaced


def adapter_layout(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what ``inject_empty`` needs to build the adapters of ``model`` again, by module.

    That is the rank and the scaling of each row slice, the dtype of the residual weight, and the
    module's settings.
    """
    layout = {}
    for name, module in adapted_modules(model).items():
        parts = {}
        for part, adapter in module.adapters().items():
            parts[part] = {"rank": len(adapter.A), "scaling": adapter.scaling}
        dtype = str(_kept_in(module)).removeprefix("torch.")
        layout[name] = {"dtype": dtype, "settings": module.settings(), "parts": parts}
    return layout


def inject_empty(model: nn.Module, layout: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a plain model the adapters that ``adapter_layout`` describes, with factors of zeros.

    The caller loads the weights next.
    """
    for name, kept in layout.items():
        linear = cast(nn.Linear, model.get_submodule(name))
        adapters = _empty_adapters(linear, kept["parts"])
        module = rebuilt(linear, adapters, **kept["settings"])
        model.set_submodule(name, module)
        round_residual(module, getattr(torch, kept["dtype"]))


def round_residual(module: AdaptedLinear, dtype: torch.dtype) -> None:
    """Convert the frozen weight of a module with adapters, if it has one, to ``dtype``.

    int8, float8_e4m3fn and uint8 quantise it: see ``switchlora.adapters.quantised``.
    """
    if module.weight is None:
        return
    if not is_quantised(dtype):
        module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
        return
    codes, scale = quantised(module.frozen_weight(), dtype)
    module.weight = nn.Parameter(codes, requires_grad=False)
    module.weight_scale = nn.Parameter(scale, requires_grad=False)
    module.coded = dtype


def restore(model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    """Put back the linears that ``inject`` or ``merge`` replaced."""
    for name, linear in linears.items():
        model.set_submodule(name, linear)


def applied_ranks(
    model: nn.Module,
    targets: Mapping[str, Target],
    names: Iterable[str],
) -> dict[str, int]:
    """Return the rank of each named target in ``model``; 0 for a target without an adapter."""
    modules = adapted_modules(model)
    ranks = dict.fromkeys(names, 0)
    for name in ranks:
        target = targets[name]
        if target.module in modules:
            adapter = modules[target.module].adapters()[target.part]
            ranks[name] = len(adapter.A)
    return ranks


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model, with the adapters merged into the weights.

    Sums are made in float64 and rounded once; factors are left out. All other tensors are shared
    with ``model``, which is not changed.
    """
    state = without_adapters(model)
    for name, module in adapted_modules(model).items():
        state[f"{name}.weight"] = module.merged()
    return state


def adapted_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the linears with adapters, by their names in the model.

    Beside ``merged_state_dict`` it has what merged weights do not tell.
    """
    found = {}
    for name, module in adapted_modules(model).items():
        for key, tensor in module.state_dict(prefix=f"{name}.").items():
            found[key] = tensor
    return found


def without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model without its adapters: W_res in the place of W.

    A quantised W_res is dequantised.
    """
    state = model.state_dict()
    plain_state = {}
    for name, tensor in state.items():
        if not is_factor(name):
            plain_state[name] = tensor
    for name, module in adapted_modules(model).items():
        if module.dense_rows() or module.coded is not None:
            plain_state[f"{name}.weight"] = module.residual().detach()
        plain_state.pop(f"{name}.weight_scale", None)
        for part in module.dense_rows():
            del plain_state[f"{name}.dense.{part}"]
    return plain_state


def plain_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the plain model's state dict, by name."""
    state = without_adapters(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, module in adapted_modules(model).items():
        shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    return shapes


def _kept_in(module: AdaptedLinear) -> torch.dtype:
    """Return the dtype of the residual weight, or of the factors if there is none."""
    if module.weight is None:
        return next(module.parameters()).dtype
    return module.coded or module.weight.dtype


def _empty_adapters(
    linear: nn.Linear,
    parts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Adapter]:
    """Return adapters of zeros for row slices of equal size, in the order of ``parts``."""
    zeros = linear.weight.new_zeros
    size = linear.out_features // len(parts)
    adapters = {}
    start = 0
    for part, values in parts.items():
        rank = values["rank"]
        A = zeros(rank, linear.in_features)
        B = zeros(size, rank)
        rows = slice(start, start + size)
        adapters[part] = Adapter(A, B, rows, values["scaling"])
        start += size
    return adapters


def _by_module(
    targets: Mapping[str, Target],
    factors: Mapping[str, Factors],
    scaling: Callable[[int], float],
) -> dict[str, dict[str, Adapter]]:
    """Return the adapters of ``factors``, for each module by the name of the row slice."""
    by_module: dict[str, dict[str, Adapter]] = {}
    for name, (A, B) in factors.items():
        target = targets[name]
        adapter = Adapter(A, B, target.rows, scaling(len(A)))
        by_module.setdefault(target.module, {})[target.part] = adapter
    return by_module


def _start_norms(linear: nn.Linear, new: Mapping[str, Adapter]) -> dict[str, Norms]:
    """Return the norms of new factors by row slice, and those of the factors that stay."""
    norms = {}
    if isinstance(linear, AdaptedLinear):
        norms.update(linear.start_norms)
    for part, (A, B, _, _) in new.items():
        norms[part] = Norms(_norm(A), _norm(B))
    return norms


def _norm(factor: Tensor) -> float:
    """Return the largest singular value; 0 of a factor that is empty or without content."""
    if factor.is_meta or not factor.numel():
        return 0.0
    return float(torch.linalg.matrix_norm(factor.detach().double(), 2))


def _slices_of(module: str, targets: Mapping[str, Target]) -> dict[str, slice]:
    """Return the rows of each target of a module, by the name of the row slice."""
    slices = {}
    for target in targets.values():
        if target.module == module:
            slices[target.part] = target.rows
    return slices


def _of_all_slices(
    linear: nn.Linear,
    rows: Mapping[str, slice],
    new: Mapping[str, Adapter],
) -> tuple[dict[str, Adapter], list[str]]:
    """Return the adapters of all slices of ``rows``, and the names of the dense slices.

    An adapter is the one of ``new``, else the one that ``linear`` has. A dense slice has neither
    and gets an adapter of rank 0.
    """
    known: dict[str, Adapter] = {}
    if isinstance(linear, AdaptedLinear):
        known.update(linear.adapters())
        for part in linear.dense_rows():
            del known[part]
    known.update(new)
    dense = [part for part in rows if part not in known]
    some = next(iter(new.values()))
    zeros = some.A.new_zeros
    for part in dense:
        size = rows[part].stop - rows[part].start
        A = zeros(0, linear.in_features)
        B = zeros(size, 0)
        known[part] = Adapter(A, B, rows[part], scaling=1.0)
    return {part: known[part] for part in rows}, dense
