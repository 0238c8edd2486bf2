"""Targets: the linears that are measured and get adapters, or row slices of fused linears."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from switchlora.adapters.linear import AdaptedLinear
from switchlora.models import eval_mode
from switchlora.names import matching, some
from switchlora.process import full

DEFAULT_TARGETS = (
    r"attn\.(qkv|[qkv]_proj)",
    r"attn\.proj",
    r"mlp\.(fc1|fc1_[gx]|w12)",
    r"mlp\.(fc2|w3)",
)
QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Target:
    """A linear, or some rows of a fused one, that is measured and gets an adapter.

    ``name`` is the module's name; a row slice has '.q', '.k' or '.v' appended. The weight of a
    module with adapters is its effective weight. In a sharded model ``weight`` and ``grad`` are
    gathered, so all ranks must ask for them.
    """

    name: str
    module: str
    rows: slice
    part: str = ""

    def weight(self, model: nn.Module) -> Tensor:
        """Return the target's weight (out, in) in ``model``, detached.

        It is a view of the parameter where the target has no adapter.
        """
        module = self._linear(model)
        alone = self._dense_rows(model)
        if alone is not None:
            return alone.detach()
        if isinstance(module, AdaptedLinear):
            return module.merged().detach()[self.rows]
        return full(module.weight.detach())[self.rows]

    def grad(self, model: nn.Module) -> Tensor | None:
        """Return the gradient of the target's weight (out, in), or None if it has none."""
        alone = self._dense_rows(model)
        if alone is not None:
            return alone.grad
        weight = self._linear(model).weight
        if weight is None or weight.grad is None:  # a factorised module has no weight
            return None
        return full(weight.grad)[self.rows]

    def is_dense(self, model: nn.Module) -> bool:
        """Return whether the target is still a plain weight.

        False for a target with an adapter. False also for a row slice without an adapter that is
        frozen beside slices with adapters.
        """
        if isinstance(self._linear(model), AdaptedLinear):
            return self._dense_rows(model) is not None
        return True

    def trains_in_full(self, model: nn.Module) -> bool:
        """Return whether the target's own rows train, without factors."""
        parameter = self.parameter_name(model)
        return self.is_dense(model) and model.get_parameter(parameter).requires_grad

    def parameter_name(self, model: nn.Module) -> str:
        """Return the name of the parameter that holds the target's rows.

        For a target with an adapter that is its residual weight.
        """
        if self._dense_rows(model) is not None:
            return f"{self.module}.dense.{self.part}"
        return f"{self.module}.weight"

    def _linear(self, model: nn.Module) -> nn.Linear:
        return cast(nn.Linear, model.get_submodule(self.module))

    def _dense_rows(self, model: nn.Module) -> nn.Parameter | None:
        module = self._linear(model)
        if not isinstance(module, AdaptedLinear):
            return None
        return module.dense_rows().get(self.part)


def find_targets(
    model: nn.Module,
    patterns: Sequence[str],
    split_qkv: bool = False,
) -> dict[str, Target]:
    """Return the targets by name: linears whose name ends, after a dot, in a match of a pattern.

    Patterns are regular expressions: ``attn.qkv`` finds ``blocks.3.attn.qkv``. With ``split_qkv``
    a fused qkv counts as three targets. ValueError for a pattern without a match; its message
    lists the linears that there are.
    """
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = module
    try:
        names = matching(patterns, linears, "target pattern", "linear layer", _match_ending)
    except ValueError as error:
        raise ValueError(f"{error}; linears of this model: {shortened(linears)}") from None
    if not names:
        raise ValueError("no target module: give at least one pattern in switch.targets")
    targets = {}
    for name in names:
        out_features = linears[name].out_features
        for target in _targets_of(name, out_features, split_qkv):
            targets[target.name] = target
    return targets


def shortened(names: Iterable[str], most: int = 10) -> str:
    """Return a list of ``names`` in which names that differ in numbers alone are one entry.

    It has at most ``most`` entries, and the number of those left out.

    >>> shortened(["blocks.0.attn.qkv", "blocks.1.attn.qkv", "head"])
    'blocks.*.attn.qkv, head'
    >>> shortened(["stages.0.1.fc", "stages.1.0.fc", "norm", "head"], most=1)
    'stages.*.*.fc and 2 more'
    """
    families = list(dict.fromkeys(map(_without_numbers, names)))
    return some(families, most) or "none"


def coverage_line(model: nn.Module, targets: Iterable[Target], most: int = 3) -> str:
    """Return one line: what share of the weights the targets are, and the largest left out.

    Shares are of the weights of linears. Linears whose names differ in numbers alone count
    together.
    """
    covered = {target.module for target in targets}
    sizes: dict[str, int] = {}
    left_out: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes[name] = module.in_features * module.out_features
            if name not in covered:
                kind = _without_numbers(name)
                left_out[kind] = left_out.get(kind, 0) + sizes[name]
    total = sum(sizes.values())
    share = (total - sum(left_out.values())) / total
    line = f"targets: {share:.1%} of the weights of the model's linears"
    largest = sorted(left_out, key=lambda kind: left_out[kind], reverse=True)
    if not largest:
        return line
    shares = [f"{kind} ({left_out[kind] / total:.1%})" for kind in largest]
    return f"{line}; left out: {some(shares, most)}"


@torch.no_grad()
def call_order(model: nn.Module, inputs: Tensor | Callable[[nn.Module], Tensor]) -> list[str]:
    """Return the names of the modules that own parameters, in the order of their first calls.

    The order comes from one forward pass of ``inputs``. A function in their place makes the pass.
    """
    owners = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            owners.append(name)
    if not isinstance(inputs, Tensor):
        return _called_modules(model, owners, inputs)
    moved = inputs.to(next(model.parameters()).device)
    return _called_modules(model, owners, lambda model: model(moved))


def _called_modules(
    model: nn.Module, names: Iterable[str], forward: Callable[[nn.Module], Tensor]
) -> list[str]:
    """Return those of ``names`` that one forward pass calls, in the order of their first calls."""
    called: dict[str, None] = {}
    hooks = []
    for name in names:
        module = model.get_submodule(name)
        hook = module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        hooks.append(hook)
    try:
        with eval_mode(model):
            forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)


def _targets_of(module: str, out_features: int, split_qkv: bool) -> list[Target]:
    fused = module.endswith("qkv")
    splits = out_features % len(QKV) == 0
    if not (split_qkv and fused and splits):
        return [Target(module, module, slice(0, out_features))]
    size = out_features // len(QKV)
    targets = []
    for number, part in enumerate(QKV):
        rows = slice(number * size, (number + 1) * size)
        targets.append(Target(f"{module}.{part}", module, rows, part))
    return targets


def _without_numbers(name: str) -> str:
    words = ["*" if word.isdigit() else word for word in name.split(".")]
    return ".".join(words)


def _match_ending(pattern: str, name: str) -> re.Match | None:
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)
