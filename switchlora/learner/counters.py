"""Count what an update costs: FLOPs, and the bytes that autograd keeps for it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

SAME_FORMULA = {
    "addmm_": "addmm",
    "baddbmm_": "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "_scaled_dot_product_flash_attention_backward"
    ),
}


def _formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    found = dict(flop_registry)
    for name, like in SAME_FORMULA.items():
        found[getattr(aten, name)] = flop_registry[getattr(aten, like)]
    return found


FORMULAS = _formulas()


def flops_of(func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the FLOPs of one operator call; 0 for operators without a formula.

    Those are the element-wise operators and other cheap ones.
    """
    formula = FORMULAS.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of all operators that run inside, forward and backward, into ``total``.

    It hooks no modules, unlike torch's ``FlopCounterMode``. So wrappers and checkpointed blocks
    run as they do without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.total += flops_of(func, args, kwargs, result)
        return result


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this rank holds: its shard if the tensor is sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of ``tensors`` on this rank, each storage once."""
    storages = {}
    for tensor in tensors:
        storage = local(tensor).untyped_storage()
        storages[id(storage)] = storage
    return sum(map(torch.UntypedStorage.nbytes, storages.values()))


class SavedTensors(saved_tensors_hooks):
    """Watches which tensors autograd keeps for the backward pass, during a forward pass inside.

    Tensors go in and out of the graph unchanged, so gradients keep every bit. It does not see what
    the graphs of torch.compile keep.
    """

    def __init__(self) -> None:
        self._storages = WeakIdKeyDictionary()
        super().__init__(self._pack, _unpack)

    def bytes_beside(self, model: nn.Module) -> int:
        """Return the bytes kept now, without those of the parameters and buffers of ``model``.

        Parameters that a sharded model gathered and has freed again count as 0 bytes.
        """
        for tensor in (*model.parameters(), *model.buffers()):
            storage = local(tensor).untyped_storage()
            self._storages.pop(storage, None)
        return sum(map(torch.UntypedStorage.nbytes, self._storages))

    def _pack(self, tensor: Tensor) -> Tensor:
        storage: torch.UntypedStorage = tensor.untyped_storage()
        self._storages[storage] = None
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
