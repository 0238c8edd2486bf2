"""Check before a run that adapters on its targets do what their merged weights would do."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from switchlora.adapters.linear import LoRALinear, add_adapters
from switchlora.adapters.product import Adapter
from switchlora.adapters.surgery import restore
from switchlora.adapters.targets import Target
from switchlora.models import eval_mode, same_draws

INPUTS, RANK = 4, 8
SIZE = 0.5
"""norm of a random adapter, relative to that of its weight"""
TOLERANCE = 0.01
"""accepted difference of logits, relative to what the adapters change"""
ASLEEP, AWAKE = 1e-3, 0.1
"""parameters smaller than the first hide what comes before them: they become that of the second"""

Linears = Mapping[str, nn.Linear]
Forward = Callable[[nn.Module], Tensor]


class _Watched(LoRALinear):
    """An adapted linear that knows whether it was called."""

    called = False

    def forward(self, input: Tensor) -> Tensor:
        self.called = True
        return super().forward(input)


@torch.no_grad()
def check_adapters_work(
    model: nn.Module, targets: Iterable[Target], inputs: Tensor | Forward
) -> None:
    """Compare random adapters on the targets with the weights that they stand for.

    Both are evaluated on a few of the ``inputs``, without hooks, which would switch off the paths
    that pass adapters by. ``model`` is afterwards as it was. A function in the place of
    ``inputs`` returns the logits of a model on inputs of its own.

    ValueError in these cases:

    - the model cannot take inputs of this shape,
    - it never calls a target's module, as ``nn.MultiheadAttention`` reads ``out_proj.weight``,
    - an adapter does something else than its weight, as where two modules share a weight.
    """
    linears: dict[str, nn.Linear] = {}
    for target in targets:
        linears[target.module] = cast(nn.Linear, model.get_submodule(target.module))
    forward = partial(_of_inputs, inputs[:INPUTS]) if isinstance(inputs, Tensor) else inputs
    generator = torch.Generator().manual_seed(0)
    with eval_mode(model), _awake(model, generator):
        watched = {name: _with_adapter(linear, generator) for name, linear in linears.items()}
        before = _logits(model, forward)
        adapted = _logits_with(model, watched, linears, forward)
        _refuse_silent([name for name, module in watched.items() if not module.called])
        if _agree(before, adapted, _logits_of_weights(model, watched, linears, forward)):
            return
        found = []
        for name, module in watched.items():
            one, linear = {name: module}, {name: linears[name]}
            adapted = _logits_with(model, one, linear, forward)
            if not _agree(before, adapted, _logits_of_weights(model, one, linear, forward)):
                found.append(name)
    _refuse_different(found or list(linears))


def _with_adapter(linear: nn.Linear, generator: torch.Generator) -> _Watched:
    """Return W + B A of a random adapter, whose norm is about ``SIZE`` times that of W."""
    weight = linear.weight.detach()
    out_features, in_features = weight.shape
    rank = min(RANK, out_features, in_features)
    A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
    B = torch.randn(out_features, rank, generator=generator) / (out_features * rank) ** 0.5
    norm = SIZE * torch.linalg.vector_norm(weight.float()).cpu()
    adapter = Adapter(A.to(weight), (norm * B).to(weight), slice(0, out_features), 1.0)
    return _Watched(weight, linear.bias, adapter).train(linear.training)


@contextmanager
def _awake(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Draw parameters that are almost zero anew inside, and put them back afterwards.

    A new head of zeros, or a layer scale of 1e-6, would hide what comes before it.
    """
    kept = {}
    try:
        for parameter in model.parameters():
            data = parameter.data
            if data.numel() and data.is_floating_point() and data.abs().max() < ASLEEP:
                kept[parameter] = data
                drawn = torch.rand(data.shape, generator=generator)
                parameter.data = (AWAKE * drawn).to(data)
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def _of_inputs(inputs: Tensor, model: nn.Module) -> Tensor:
    """Return the logits; ValueError when the model cannot take the inputs."""
    try:
        return model(inputs)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        shape = tuple(inputs.shape[1:])
        raise ValueError(
            f"the model cannot take the data's inputs of {shape}: {reason}"
        ) from error


def _logits(model: nn.Module, forward: Forward) -> Tensor:
    """Return the logits in float64; what the model draws is the same each time."""
    with same_draws(model):
        return forward(model).double()


def _logits_with(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    linears: Linears,
    forward: Forward,
) -> Tensor:
    """Return the logits with ``modules`` in the place of ``linears``."""
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        return _logits(model, forward)
    finally:
        restore(model, linears)


def _logits_of_weights(
    model: nn.Module,
    adapted: Mapping[str, LoRALinear],
    linears: Linears,
    forward: Forward,
) -> Tensor:
    """Return the logits with the weights that ``adapted`` stand for, where they are read."""
    weights = {name: linear.weight.data for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.weight.data = add_adapters(weights[name], adapted[name].adapters())
        return _logits(model, forward)
    finally:
        for name, linear in linears.items():
            linear.weight.data = weights[name]


def _agree(before: Tensor, adapted: Tensor, weights: Tensor) -> bool:
    """Return whether adapters did what weights do; True where neither can be seen."""
    effect = torch.maximum((adapted - before).abs().max(), (weights - before).abs().max())
    if not torch.isfinite(effect):
        return True
    return bool((adapted - weights).abs().max() <= TOLERANCE * effect)


def _refuse_silent(names: list[str]) -> None:
    if names:
        raise ValueError(
            f"{len(names)} target(s), such as {names[0]}, are never called: this model reads "
            "their weight directly, so an adapter there would do nothing; leave them out of "
            "switch.targets"
        )


def _refuse_different(names: list[str]) -> None:
    raise ValueError(
        f"{len(names)} target(s), such as {names[0]}, compute something else with an adapter than "
        "with the weight that it stands for: that weight is also read directly, or shared with "
        "another module, or made anew in each pass; leave them out of switch.targets"
    )
