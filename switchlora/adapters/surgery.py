"""Put adapters into a model, take them out again, read the merged weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from switchlora.adapters.factorized import rebuilt
from switchlora.adapters.linear import (
    AdaptedLinear,
    Factors,
    SlicedLoRALinear,
    adapted_linear,
    adapted_modules,
    is_factor,
)
from switchlora.adapters.product import Adapter
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
    chosen: dict[str, dict[str, Adapter]] = {}
    for name, (A, B) in factors.items():
        target = targets[name]
        adapter = Adapter(A, B, target.rows, scaling(len(A)))
        chosen.setdefault(target.module, {})[target.part] = adapter
    linears, adapted = {}, {}
    for name, new in chosen.items():
        linear = cast(nn.Linear, model.get_submodule(name))
        rows = {t.part: t.rows for t in targets.values() if t.module == name}
        adapters, dense = _of_all_slices(linear, rows, new)
        if dense or isinstance(linear, AdaptedLinear) or any(len(A) for A, *_ in new.values()):
            module = make(plain(linear), adapters)
            if dense:
                cast(SlicedLoRALinear, module).make_dense(dense)
            module.dropout = dropout
            linears[name], adapted[name] = linear, module
    for name, module in adapted.items():
        model.set_submodule(name, module)
    return linears


def plain(module: nn.Linear) -> nn.Linear:
    """Return ``module`` if it has no adapters, else an ``nn.Linear`` with its effective weight.

    The bias is the same parameter.
    """
    if not isinstance(module, AdaptedLinear):
        return module
    merged = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    merged.weight, merged.bias = nn.Parameter(module.merged().detach()), module.bias
    return merged.train(module.training)


def merge(model: nn.Module) -> dict[str, nn.Linear]:
    """Replace all modules with adapters by plain linears of the same function.

    Return the replaced modules by name: ``restore(model, merge(model))`` leaves every bit as it
    was.
    """
    adapted: dict[str, nn.Linear] = {**adapted_modules(model)}
    for name, module in adapted.items():
        model.set_submodule(name, plain(module))
    return adapted


def adapter_layout(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what ``inject_empty`` needs to build the adapters of ``model`` again, by module.

    That is the rank and the scaling of each row slice, the dtype of the residual weight, and the
    module's settings.
    """
    return {
        name: {
            "dtype": str(_kept_in(module)).removeprefix("torch."),
            "settings": module.settings(),
            "parts": {
                part: {"rank": len(adapter.A), "scaling": adapter.scaling}
                for part, adapter in module.adapters().items()
            },
        }
        for name, module in adapted_modules(model).items()
    }


def inject_empty(model: nn.Module, layout: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a plain model the adapters that ``adapter_layout`` describes, with factors of zeros.

    The caller loads the weights next.
    """
    for name, kept in layout.items():
        linear = cast(nn.Linear, model.get_submodule(name))
        rows = linear.out_features // len(kept["parts"])
        adapters = {}
        for i, (part, values) in enumerate(kept["parts"].items()):
            A = linear.weight.new_zeros(values["rank"], linear.in_features)
            B = linear.weight.new_zeros(rows, values["rank"])
            place = slice(i * rows, (i + 1) * rows)
            adapters[part] = Adapter(A, B, place, values["scaling"])
        module = rebuilt(linear, adapters, **kept["settings"])
        model.set_submodule(name, module)
        round_residual(module, getattr(torch, kept["dtype"]))


def round_residual(module: AdaptedLinear, dtype: torch.dtype) -> None:
    """Convert the frozen weight of a module with adapters, if it has one, to ``dtype``."""
    if module.weight is not None:
        module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)


def restore(model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    """Put back the linears that ``inject`` or ``merge`` replaced."""
    for name, linear in linears.items():
        model.set_submodule(name, linear)


def applied_ranks(
    model: nn.Module, targets: Mapping[str, Target], names: Iterable[str]
) -> dict[str, int]:
    """Return the rank of each named target in ``model``; 0 for a target without an adapter."""
    modules = adapted_modules(model)
    return {
        name: len(modules[target.module].adapters()[target.part].A)
        if (target := targets[name]).module in modules
        else 0
        for name in names
    }


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model, with the adapters merged into the weights.

    Sums are made in float64 and rounded once; factors are left out. All other tensors are shared
    with ``model``, which is not changed.
    """
    merged = {n: m.merged() for n, m in adapted_modules(model).items()}
    return without_adapters(model) | {f"{n}.weight": weight for n, weight in merged.items()}


def without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model without its adapters: W_res in the place of W."""
    adapted = adapted_modules(model)
    dense = {f"{name}.dense.{part}" for name, m in adapted.items() for part in m.dense_rows()}
    state = model.state_dict()
    found = {n: t for n, t in state.items() if n not in dense and not is_factor(n)}
    partly = {f"{n}.weight": m.residual().detach() for n, m in adapted.items() if m.dense_rows()}
    return found | partly


def plain_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the plain model's state dict, by name."""
    shapes = {n: tuple(t.shape) for n, t in without_adapters(model).items()}
    for name, module in adapted_modules(model).items():
        shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    return shapes


def _kept_in(module: AdaptedLinear) -> torch.dtype:
    """Return the dtype of the residual weight, or of the factors if there is none."""
    return next(module.parameters()).dtype if module.weight is None else module.weight.dtype


def _of_all_slices(
    linear: nn.Linear, rows: Mapping[str, slice], new: Mapping[str, Adapter]
) -> tuple[dict[str, Adapter], list[str]]:
    """Return the adapters of all slices of ``rows``, and the names of the dense slices.

    An adapter is the one of ``new``, else the one that ``linear`` has. A dense slice has neither
    and gets an adapter of rank 0.
    """
    old: dict[str, Adapter] = {}
    if isinstance(linear, AdaptedLinear):
        old = {n: a for n, a in linear.adapters().items() if n not in linear.dense_rows()}
    known = {**old, **new}
    dense = [part for part in rows if part not in known]
    zeros = next(iter(new.values())).A.new_zeros
    for part in dense:
        size = rows[part].stop - rows[part].start
        known[part] = Adapter(zeros(0, linear.in_features), zeros(size, 0), rows[part], 1.0)
    return {part: known[part] for part in rows}, dense
