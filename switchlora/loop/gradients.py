"""Gradients of whole weights, from the backward passes that a loop makes anyway."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from switchlora.adapters import Target


class WeightGradients:
    """G = sum over tokens of g_y x^T (out, in), float32, for each of the ``targets``.

    x is the input of the linear and g_y the gradient of its output. All backward passes until
    ``remove`` are added. One that is not finite, as where a GradScaler skips an update, is left
    out.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target]) -> None:
        self._targets = targets
        self._found: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        for name in {target.module for target in targets.values()}:
            self._listen(model.get_submodule(name), name)

    def found(self) -> dict[str, Tensor]:
        """Return the gradients of the targets whose modules had one."""
        there = {name: t for name, t in self._targets.items() if t.module in self._found}
        return {name: self._found[target.module][target.rows] for name, target in there.items()}

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _listen(self, module: nn.Module, name: str) -> None:
        seen_by = weakref.ref(self)  # so that a copy of the model copies no gradients

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            here = seen_by()
            if here is not None and output.requires_grad:
                x = (args[0] if args else kwargs["input"]).detach()
                output.register_hook(lambda g_y: here._add(name, g_y, x))

        self._hooks.append(module.register_forward_hook(see, with_kwargs=True))

    @torch.no_grad()
    def _add(self, name: str, g_y: Tensor, x: Tensor) -> None:
        rows = [each.reshape(-1, each.shape[-1]).float() for each in (g_y, x)]
        gradient = rows[0].mT @ rows[1]
        if gradient.isfinite().all():
            self._found[name] = self._found.get(name, 0) + gradient
