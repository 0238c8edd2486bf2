"""A few inputs of a model that somebody else calls, and the logits that it makes of them."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

Logits = Callable[[nn.Module, Any], Tensor]
ROWS = 8


class FirstInputs:
    """The first rows of the first batch that ``model`` is called with.

    Where a loop calls a part of it, as ``training_step`` of Lightning does, they are those of the
    outermost part that holds all ``modules``. Hooks take them and go. ``logits(model, batch)``
    returns what the module makes of them. By default it is the first tensor that it returns.
    """

    def __init__(
        self, model: nn.Module, logits: Logits | None = None, modules: Sequence[str] = ()
    ) -> None:
        self._given = logits
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._called = ""
        self.seen = False
        self._hooks: list[RemovableHandle] = []
        self._listen(model, "")
        plain = getattr(model, "_orig_mod", model)
        for name in _around(modules):
            self._listen(plain.get_submodule(name), name)

    def __call__(self, model: nn.Module, _: Any = None) -> Tensor:
        """Return the logits of ``model`` on the inputs; ValueError when none were seen."""
        if not self.seen:
            raise ValueError(
                "the model was not called since LowRankSwitch got it: give it the module that the "
                "loop calls"
            )
        called = model.get_submodule(self._called)
        if self._given is not None:
            return self._given(called, self._batch())
        return first_tensor(called(*self._args, **self._kwargs))

    def _listen(self, module: nn.Module, name: str) -> None:
        seen_by = weakref.ref(self)  # so that a copy of the model copies no training

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            here = seen_by()
            if here is not None and not here.seen and not _redirected(module):
                here._keep(name, args, kwargs)

        self._hooks.append(module.register_forward_pre_hook(see, with_kwargs=True))

    def remove(self) -> None:
        """Take the hook away and let the inputs go."""
        self._remove_hooks()
        self._args, self._kwargs = (), {}

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        rows = next((len(tensor) for tensor in tensors if tensor.ndim), 0)

        def first_rows(tensor: Tensor) -> Tensor:
            whole = not tensor.ndim or len(tensor) != rows
            return tensor.detach().clone() if whole else tensor[:ROWS].detach().clone()

        self._args, self._kwargs = tree_map_only(Tensor, first_rows, (args, kwargs))
        self._called = name
        self.seen = True
        self._remove_hooks()

    def _batch(self) -> Any:
        if self._kwargs and not self._args:
            return self._kwargs
        return self._args[0] if len(self._args) == 1 and not self._kwargs else self._args


def _redirected(module: nn.Module) -> bool:
    """Return whether this call of the module's forward is Lightning's, for ``training_step``."""
    forward = vars(module).get("forward")
    return getattr(forward, "__qualname__", "").startswith("_ForwardRedirection")


def _around(modules: Sequence[str]) -> list[str]:
    """Return the names of the modules that hold all ``modules``, from the outside in."""
    if not modules:
        return []
    shared = commonprefix([name.split(".")[:-1] for name in modules])
    return [".".join(shared[:depth]) for depth in range(1, len(shared) + 1)]


def first_tensor(output: Any) -> Tensor:
    """Return the logits in what a model returns: a tensor, or something that holds one.

    ValueError when it holds none.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if isinstance(logits, Tensor):
        return logits
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.is_floating_point():
            return leaf
    raise ValueError(
        f"the model returns a {type(output).__name__} without a tensor: give "
        "forward=lambda model, batch: ... that returns the logits"
    )
