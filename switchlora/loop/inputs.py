"""A few inputs of a model that somebody else calls, and the logits that it makes of them."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Logits = Callable[[nn.Module, Any], Tensor]
ROWS = 8


class FirstInputs:
    """The first rows of the first batch that ``model`` is called with.

    A hook takes them and goes. ``logits(model, batch)`` returns what a model makes of them. By
    default it is the first tensor that the model returns.
    """

    def __init__(self, model: nn.Module, logits: Logits | None = None) -> None:
        self._given = logits
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self.seen = False
        seen_by = weakref.ref(self)  # so that a copy of the model copies no training

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            here = seen_by()
            if here is not None and not here.seen:
                here._keep(args, kwargs)

        self._hook = model.register_forward_pre_hook(see, with_kwargs=True)

    def __call__(self, model: nn.Module, _: Any = None) -> Tensor:
        """Return the logits of ``model`` on the inputs; ValueError when none were seen."""
        if not self.seen:
            raise ValueError(
                "the model was not called since LowRankSwitch got it: give it the module that the "
                "loop calls"
            )
        if self._given is not None:
            return self._given(model, self._batch())
        return first_tensor(model(*self._args, **self._kwargs))

    def remove(self) -> None:
        """Take the hook away and let the inputs go."""
        self._hook.remove()
        self._args, self._kwargs = (), {}

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        rows = next((len(tensor) for tensor in tensors if tensor.ndim), 0)

        def first_rows(tensor: Tensor) -> Tensor:
            whole = not tensor.ndim or len(tensor) != rows
            return tensor.detach().clone() if whole else tensor[:ROWS].detach().clone()

        self._args, self._kwargs = tree_map_only(Tensor, first_rows, (args, kwargs))
        self.seen = True
        self._hook.remove()

    def _batch(self) -> Any:
        if self._kwargs and not self._args:
            return self._kwargs
        return self._args[0] if len(self._args) == 1 and not self._kwargs else self._args


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
