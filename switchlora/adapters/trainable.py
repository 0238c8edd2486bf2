"""Choose the parameters that train, freeze the others, and count both."""

import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from switchlora.adapters.linear import FACTORS, SPARSE, adapted_modules, is_factor
from switchlora.adapters.targets import Target
from switchlora.models import eval_mode
from switchlora.names import matching


def freeze_unused(model: nn.Module, images: Tensor) -> list[str]:
    """Freeze the parameters that get no gradient from a backward pass of ``images``.

    Return their names. A single process would just never move them. With several processes DDP
    would wait for their gradients for ever.
    """
    with torch.enable_grad(), eval_mode(model):
        model(images).sum().backward()
    unused = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
            unused.append(name)
        parameter.grad = None
    return unused


def frozen_outright(
    model: nn.Module,
    targets: Mapping[str, Target],
    freeze: Sequence[str],
    known: Collection[str] = (),
) -> tuple[set[str], set[str]]:
    """Return the parameters and the targets that the patterns ``freeze`` take out of training.

    ``freeze`` holds regular expressions that are searched for in names.

    - A target is frozen if its own name or the name of its weight is found.
    - A bias is frozen if it is found, or if all targets of its module are frozen.

    ``known`` holds further names that a pattern may find. ValueError for a pattern that finds
    nothing.
    """
    parameters = [name for name, _ in model.named_parameters()]
    known_weights = [f"{name}.weight" for name in known]
    names = [*parameters, *targets, *known, *known_weights]
    matched = matching(freeze, names, "switch.freeze", "parameter", re.search)
    found = set(matched)
    frozen = set()
    frozen_biases = set()
    trained_biases = set()
    for name, target in targets.items():
        bias = f"{target.module}.bias"
        if name in found or f"{target.module}.weight" in found:
            frozen.add(name)
            frozen_biases.add(bias)
        else:
            trained_biases.add(bias)
    found |= frozen_biases - trained_biases
    return found.intersection(parameters), frozen


def kept_parameters(
    model: nn.Module,
    frozen_modules: Iterable[str],
    keep: Sequence[str],
) -> dict[str, nn.Parameter]:
    """Return the parameters that go on training beside the factors, by name.

    They train now, and a regular expression of ``keep`` is found in their name. Factors and the
    weights of the ``frozen_modules`` are never among them. ValueError for a pattern that finds
    nothing.
    """
    frozen = {f"{name}.weight" for name in frozen_modules}
    others = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in frozen and not is_factor(name):
            others[name] = parameter
    found = matching(keep, others, "switch.keep", "parameter", re.search)
    return {name: others[name] for name in found}


def train_only(model: nn.Module, kept: Container[str], factors: Sequence[str] = FACTORS) -> None:
    """Train ``factors`` and the ``kept`` parameters; freeze the rest and drop its gradients.

    Sparse entries train beside any factor. A frozen parameter would otherwise keep its last
    gradient allocated.
    """
    parts = (*factors, SPARSE) if factors else ()
    for name, parameter in model.named_parameters():
        trained_factor = is_factor(name, parts) and parameter.numel() > 0
        parameter.requires_grad_(name in kept or trained_factor)
        if not parameter.requires_grad:
            parameter.grad = None


def hold_frozen_statistics(model: nn.Module) -> None:
    """Put norms that are frozen into evaluation mode, so that their running statistics stay.

    A norm is frozen when none of its parameters trains. One without parameters follows the nearest
    module around it that has some. All other norms get the mode of ``model``.
    """
    for name, module in model.named_modules():
        buffers = [buffer for buffer, _ in module.named_buffers(recurse=False)]
        if any(buffer.startswith("running_") for buffer in buffers):
            module.training = model.training and _trains(model, name)


def _trains(model: nn.Module, name: str) -> bool:
    """Return whether a module, or the nearest one around it with parameters, trains any."""
    parameters = list(model.get_submodule(name).parameters())
    while not parameters and name:
        name = name.rpartition(".")[0]
        parameters = list(model.get_submodule(name).parameters())
    return any(parameter.requires_grad for parameter in parameters)


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Return the number of parameters, or of those that train."""
    if trainable:
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(parameter_sizes(model).values())


def parameter_sizes(model: nn.Module) -> dict[str, int]:
    """Return how many numbers each parameter holds, by name.

    A quantised weight holds those that its codes stand for, and its scales none.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, module in adapted_modules(model).items():
        if module.coded is not None:
            sizes[f"{name}.weight"] = len(module.weight) * module.in_features
            sizes[f"{name}.weight_scale"] = 0
    return sizes


def plain_parameters(model: nn.Module) -> int:
    """Return the number of parameters of the plain model, whether or not it has adapters now."""
    count = 0
    for name, size in parameter_sizes(model).items():
        if not is_factor(name):
            count += size
    for module in adapted_modules(model).values():
        if module.weight is None:
            count += module.in_features * module.out_features
    return count


def training_flags(model: nn.Module) -> dict[str, bool]:
    """Return for each parameter, by name, whether it trains."""
    flags = {}
    for name, parameter in model.named_parameters():
        flags[name] = parameter.requires_grad
    return flags
