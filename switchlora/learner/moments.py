"""Moments: an optimizer's state of each tensor. Hand it on, project it onto factors, prune it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switchlora.adapters import Adapter, is_factor
from switchlora.errors import check_choice, check_share
from switchlora.process import like

Moments = Mapping[str, Mapping[str, Any]]  # optimizer state by parameter name
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq",)
POWERS = {
    **dict.fromkeys(FIRST_MOMENTS, 1),
    **dict.fromkeys((*SECOND_MOMENTS, "max_exp_avg_sq"), 2),
}
"""power to which a factor of the gradient appears in each moment"""
PRUNINGS = ("random", "magnitude", "zero")


def moments_of(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state of each tensor it has stepped, by name; nothing is copied."""
    return {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}


def load_moments(model: nn.Module, optimizer: Optimizer, moments: Moments) -> int:
    """Give each tensor that ``optimizer`` trains its state in ``moments``; return their number.

    A state is shared, unless it has to move to another device or be sharded first.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {n: p for n, p in model.named_parameters() if n in moments and id(p) in groups}
    for name, parameter in found.items():
        on_device = any(groups[id(parameter)].get(key) for key in ("fused", "capturable"))
        optimizer.state[parameter] = {
            key: like(value, parameter)
            if isinstance(value, Tensor) and (value.ndim or on_device)
            else value
            for key, value in moments[name].items()
        }
    return len(found)


@torch.no_grad()
def factor_moments(
    adapters: Mapping[str, Mapping[str, Adapter]], moments: Moments
) -> dict[str, dict[str, Any]]:
    """Return moments of the factors, projected from those of the weights they replace.

    ``adapters`` are those of each module, by row slice. A slice that was dense before has had
    moments of its own, which are used then.

    - Gradients obey g_A = s B^T g_W and g_B = s g_W A^T. So first moments map exactly: m_A = s B^T
      m_W, m_B = s m_W A^T.
    - For second moments the entries of g_W are taken as uncorrelated: v_A = s^2 (B*B)^T v_W, v_B =
      s^2 v_W (A*A)^T.

    Factors whose projected moments would be zero (B = 0) are left out and keep a fresh state.
    """
    projected = {}
    for name, parts in adapters.items():
        for part, (A, B, rows, s) in parts.items():
            state = moments.get(f"{name}.weight", {})
            if alone := moments.get(f"{name}.dense.{part}"):
                state, rows = alone, slice(None)
            if state and A.any() and B.any():
                end = f".{part}" if part else ""
                projected[f"{name}.lora_A{end}"] = {
                    k: _project_A(k, v, B, rows, s) for k, v in state.items()
                }
                projected[f"{name}.lora_B{end}"] = {
                    k: _project_B(k, v, A, rows, s) for k, v in state.items()
                }
    return projected


@torch.no_grad()
def dense_moments(
    slices: Mapping[str, Mapping[str, slice]], moments: Moments
) -> dict[str, dict[str, Any]]:
    """Return moments of dense slices, copied from their rows of the fused weight's moments.

    ``slices`` are the rows of each dense slice, by module. State without rows, such as the number
    of steps, is copied whole.
    """
    return {
        f"{name}.dense.{part}": {
            key: _rows_of(value, rows) for key, value in moments[f"{name}.weight"].items()
        }
        for name, parts in slices.items()
        for part, rows in parts.items()
        if f"{name}.weight" in moments
    }


def _rows_of(value: Any, rows: slice) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value[rows].clone() if value.ndim and len(value) > 1 else value.clone()


def _project_A(key: str, value: Any, B: Tensor, rows: slice, s: float) -> Any:
    if key in SECOND_MOMENTS:
        return s**2 * B.square().mT @ value[rows]
    return s * B.mT @ value[rows] if key in FIRST_MOMENTS else _copied(key, value)


def _project_B(key: str, value: Any, A: Tensor, rows: slice, s: float) -> Any:
    if key in SECOND_MOMENTS:
        return s**2 * value[rows] @ A.square().mT
    return s * value[rows] @ A.mT if key in FIRST_MOMENTS else _copied(key, value)


def _copied(key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(
            f"moments=factors does not know how '{key}' of this optimizer transforms; "
            "use switch.moments=surviving"
        )
    return value.clone() if isinstance(value, Tensor) else value


def rescale_moments(state: Mapping[str, Any], factor: Tensor | float) -> None:
    """Change one tensor's ``state`` in place to that of ``factor`` times its gradients.

    First moments are multiplied by the factor, second moments by its square. ValueError for other
    state tensors.
    """
    for key, value in state.items():
        if key in POWERS and value is not None:
            value.mul_(factor ** POWERS[key])
        elif isinstance(value, Tensor) and value.ndim:
            raise ValueError(
                f"refactoring=reflora_s does not know how '{key}' of this optimizer scales; "
                "use adapter/refactoring=reflora"
            )


@torch.no_grad()
def prune_moments(moments: Moments, how: str, share: float, seed: int) -> None:
    """Zero a ``share`` of each factor's moments in place (ReLoRA, arXiv 2307.05695).

    ``how`` is one of:

    - 'random': each entry is kept with probability 1 - share. One draw serves all moments of a
      tensor. It depends on ``seed`` alone, since all ranks must draw alike; the number of updates
      is a good seed.
    - 'magnitude': of the n entries of a moment, the floor(share * n) smallest in absolute value
      are zeroed.
    - 'zero': all entries are zeroed, whatever the share.

    Counters stay, and so do the moments of all other parameters.
    """
    check_choice("how", how, PRUNINGS)
    check_share("share", share)
    generator = torch.Generator().manual_seed(seed)
    for state in (state for name, state in moments.items() if is_factor(name)):
        found = [state[key] for key in POWERS if state.get(key) is not None]
        drawn = torch.rand(found[0].shape if found else 0, generator=generator)
        for moment in found:
            moment.mul_(_kept(moment, how, share, drawn))


def _kept(moment: Tensor, how: str, share: float, drawn: Tensor) -> Tensor:
    """Return ones where an entry of ``moment`` is kept, zeros elsewhere."""
    kept = torch.ones_like(moment)
    if how == "zero":
        return kept.zero_()
    if how == "random":
        return kept.copy_(drawn >= share)
    smallest = moment.abs().flatten().topk(int(share * moment.numel()), largest=False).indices
    return kept.flatten().index_fill_(0, smallest, 0).view(moment.shape)
