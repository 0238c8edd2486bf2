"""The kinds of adapters by name: which class a factory makes, and modules rebuilt as saved."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from switchlora.adapters.cola import CoLALinear, cola_linear
from switchlora.adapters.core import CoreLinear, core_linear
from switchlora.adapters.factorized import (
    GuidedLinear,
    LowRankLinear,
    factorized_linear,
    guided_linear,
)
from switchlora.adapters.linear import AdaptedLinear, Norms, SlicedLoRALinear, adapted_linear
from switchlora.adapters.product import Adapter
from switchlora.adapters.sltrain import SparseLowRankLinear, sltrain_linear
from switchlora.adapters.switched import SwitchedLoRALinear, switched_linear
from switchlora.errors import is_number


def made_class(make: Callable[..., AdaptedLinear]) -> type[AdaptedLinear]:
    """Return the class of the modules that an adapter factory makes.

    The factory has it as its attribute ``makes``. A factory without this attribute makes adapters
    beside a residual weight.
    """
    function = make.func if isinstance(make, partial) else make
    return getattr(function, "makes", AdaptedLinear)


KINDS: dict[str, Callable[..., AdaptedLinear]] = {
    AdaptedLinear.kind: adapted_linear,
    LowRankLinear.kind: factorized_linear,
    GuidedLinear.kind: guided_linear,
    CoreLinear.kind: core_linear,
    CoLALinear.kind: cola_linear,
    SparseLowRankLinear.kind: sltrain_linear,
    SwitchedLoRALinear.kind: switched_linear,
}
"""the factory of each kind, by its name in saved layouts"""


def rebuilt(
    linear: nn.Linear,
    adapters: Mapping[str, Adapter],
    kind: str,
    dense: Sequence[str] = (),
    start_norms: Mapping[str, tuple[float, float]] = {},
    made_with: Mapping[str, Any] = {},
    **attributes: Any,
) -> AdaptedLinear:
    """Return the module of this ``kind`` with ``adapters`` on ``linear``.

    ``kind``, ``dense`` and ``attributes`` are what ``settings()`` of the earlier module gave.
    ``dense`` names the dense row slices. ``start_norms`` are those of the factors by row slice.
    ``made_with`` are options of the factory.
    ``attributes`` are set on the module: flags, or shares from 0 to 1. TypeError for others.
    """
    module = KINDS[kind](linear, adapters, **made_with)
    if dense:
        cast(SlicedLoRALinear, module).make_dense(dense)
    for part, (A, B) in start_norms.items():
        if not (is_number(A) and is_number(B) and min(A, B) >= 0):
            raise TypeError(f"the norms of an adapter's factors are {A!r} and {B!r}")
        module.start_norms[part] = Norms(A, B)
    for name, value in attributes.items():
        is_flag = isinstance(getattr(module, name), bool)
        fits = isinstance(value, bool) if is_flag else is_number(value) and 0 <= value <= 1
        if not fits:
            raise TypeError(f"'{name}' of an adapter is {value!r}")
        setattr(module, name, value)
    return module
