"""Round residual weights when they freeze, and give the factors what they can hold of the loss."""

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from switchlora.adapters import AdaptedLinear, adapted_modules, is_quantised, round_residual

Shares = dict[str, dict[str, Tensor]]
"""what is added to B, by module and row slice, on the CPU"""


class Exact(NamedTuple):
    """A module's residual weight and factors B, by row slice, as they were before rounding."""

    weight: nn.Parameter
    B: dict[str, Tensor]


@torch.no_grad()
def round_residuals(model: nn.Module, dtype: torch.dtype, exact: dict[str, Exact]) -> Shares:
    """Convert the residual weights that are frozen to ``dtype``; codes stay as they are.

    Return the shares that ``give_to_factors`` takes: none for a dtype without codes. ``exact``
    gets what ``put_back`` needs, as soon as it may be needed.
    """
    shares: Shares = {}
    for name, module in adapted_modules(model).items():
        if module.weight is None or module.weight.requires_grad or module.coded is not None:
            continue
        factors = {part: a.B.detach().clone() for part, a in module.adapters().items()}
        exact[name] = Exact(cast(nn.Parameter, module.weight), factors)
        before = module.residual().detach()
        round_residual(module, dtype)
        if is_quantised(dtype):
            shares[name] = shares_of(module, before.double() - module.residual().double())
    return shares


def shares_of(module: AdaptedLinear, lost: Tensor) -> dict[str, Tensor]:
    """Return what B gains of a ``lost`` (out, in) weight, by row slice: lost A^+ / s.

    It is the best that B can do for the A that there is. LoftQ (Li et al., arXiv 2310.08659)
    chooses A anew, from the SVD of what is lost. But the rows of A that come from recent updates
    span what the layer's inputs span, where a loss counts: docs/results/quantise.md.
    """
    found = {}
    for part, (A, B, rows, scaling) in module.adapters().items():
        if len(A):
            share = lost[rows] @ torch.linalg.pinv(A.double()) / scaling
            found[part] = share.to(B.dtype).cpu()
    return found


@torch.no_grad()
def give_to_factors(model: nn.Module, shares: Shares) -> None:
    """Add to each factor B its share of what rounding lost."""
    modules = adapted_modules(model)
    for name, parts in shares.items():
        adapters = modules[name].adapters()
        for part, share in parts.items():
            adapters[part].B.add_(share.to(adapters[part].B.device))


@torch.no_grad()
def put_back(model: nn.Module, exact: Mapping[str, Exact]) -> None:
    """Undo the rounding of the modules in ``exact``."""
    modules = adapted_modules(model)
    for name, (weight, factors) in exact.items():
        module = modules[name]
        module.weight, module.weight_scale, module.coded = weight, None, None
        for part, adapter in module.adapters().items():
            adapter.B.copy_(factors[part])
