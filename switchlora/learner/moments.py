"""Moments: an optimizer's state of each tensor. Hand it on, project it onto factors, prune it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switchlora.adapters import Adapter, is_factor
from switchlora.errors import check_choice, check_share
from switchlora.process import like

State = Mapping[str, Any]  # an optimizer's state of one parameter
Moments = Mapping[str, State]  # by parameter name
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq",)
POWERS = {
    **dict.fromkeys(FIRST_MOMENTS, 1),
    **dict.fromkeys((*SECOND_MOMENTS, "max_exp_avg_sq"), 2),
}
"""power to which a factor of the gradient appears in each moment"""
PROJECTED = "projected_"
"""begins the names of moments that do not have the rows of their weight"""
PRUNINGS = ("random", "magnitude", "zero")


def moments_of(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state of each tensor it has stepped, by name; nothing is copied."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            found[name] = optimizer.state[parameter]
    return found


def load_moments(model: nn.Module, optimizer: Optimizer, moments: Moments) -> int:
    """Give each tensor that ``optimizer`` trains its state in ``moments``; return their number.

    A state is shared, unless it has to move to another device or be sharded first.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    loaded = 0
    for group in optimizer.param_groups:
        counts_on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            state = moments.get(names.get(parameter, ""))
            if state is not None:
                optimizer.state[parameter] = _placed(state, parameter, counts_on_device)
                loaded += 1
    return loaded


def _placed(state: State, parameter: Tensor, counts_on_device: bool) -> dict[str, Any]:
    """Return ``state`` on the device of ``parameter``; its counters too if they are kept there."""
    placed = dict(state)
    for key, value in state.items():
        if isinstance(value, Tensor) and (value.ndim or counts_on_device):
            placed[key] = like(value, parameter)
    return placed


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

    Factors whose projected moments would be zero (B = 0) are left out and keep a fresh state. So
    do those of a weight whose own moments lie in a subspace (GaLore).
    """
    projected: dict[str, dict[str, Any]] = {}
    for name, parts in adapters.items():
        for part, adapter in parts.items():
            end = f".{part}" if part else ""
            state = _replaced_state(moments, name, part, adapter.rows)
            if state and adapter.A.any() and adapter.B.any():
                of_A = {key: _project_A(key, value, adapter) for key, value in state.items()}
                of_B = {key: _project_B(key, value, adapter) for key, value in state.items()}
                projected[f"{name}.lora_A{end}"] = of_A
                projected[f"{name}.lora_B{end}"] = of_B
    return projected


def _replaced_state(moments: Moments, name: str, part: str, rows: slice) -> State:
    """Return the state of the weight, or of its rows, that an adapter replaces; maybe empty."""
    alone = moments.get(f"{name}.dense.{part}")
    state = alone or moments.get(f"{name}.weight", {})
    if _in_a_subspace(state):
        return {}
    if alone:
        return alone
    return {key: value[rows] if _is_moment(key) else value for key, value in state.items()}


def _in_a_subspace(state: State) -> bool:
    return any(key.startswith(PROJECTED) for key in state)


def _is_moment(key: str) -> bool:
    return key in FIRST_MOMENTS or key in SECOND_MOMENTS


@torch.no_grad()
def dense_moments(
    slices: Mapping[str, Mapping[str, slice]], moments: Moments
) -> dict[str, dict[str, Any]]:
    """Return moments of dense slices, copied from their rows of the fused weight's moments.

    ``slices`` are the rows of each dense slice, by module. State without rows, such as the number
    of steps, is copied whole. Slices of a weight with projected moments keep a fresh state.
    """
    found = {}
    for name, parts in slices.items():
        state = moments.get(f"{name}.weight")
        if state is None or _in_a_subspace(state):
            continue
        for part, rows in parts.items():
            found[f"{name}.dense.{part}"] = {k: _rows_of(v, rows) for k, v in state.items()}
    return found


def _rows_of(value: Any, rows: slice) -> Any:
    if not isinstance(value, Tensor):
        return value
    has_rows = value.ndim > 0 and len(value) > 1
    return value[rows].clone() if has_rows else value.clone()


def _project_A(key: str, value: Any, adapter: Adapter) -> Any:
    s, B = adapter.scaling, adapter.B
    if key in SECOND_MOMENTS:
        return s**2 * B.square().mT @ value
    if key in FIRST_MOMENTS:
        return s * B.mT @ value
    return _copied(key, value)


def _project_B(key: str, value: Any, adapter: Adapter) -> Any:
    s, A = adapter.scaling, adapter.A
    if key in SECOND_MOMENTS:
        return s**2 * value @ A.square().mT
    if key in FIRST_MOMENTS:
        return s * value @ A.mT
    return _copied(key, value)


def _copied(key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(
            f"switch.moments=factors does not know how '{key}' of this optimizer transforms; "
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
                f"adapter/refactoring=reflora_s does not know how '{key}' of this optimizer "
                "scales; use adapter/refactoring=reflora"
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
    for name in filter(is_factor, moments):
        state = moments[name]
        found = [state[key] for key in POWERS if state.get(key) is not None]
        if not found:
            continue
        drawn = torch.rand(found[0].shape, generator=generator)
        for moment in found:
            moment.mul_(_kept(moment, how, share, drawn))


def _kept(moment: Tensor, how: str, share: float, drawn: Tensor) -> Tensor:
    """Return ones where an entry of ``moment`` is kept, zeros elsewhere."""
    kept = torch.ones_like(moment)
    if how == "zero":
        return kept.zero_()
    if how == "random":
        return kept.copy_(drawn >= share)
    number = int(share * moment.numel())
    smallest = moment.abs().flatten().topk(number, largest=False).indices
    return kept.flatten().index_fill_(0, smallest, 0).view(moment.shape)
