"""The memory behind tensors: each storage once, whatever views there are on it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``: its shard of a sharded one."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors`` on this rank."""
    found = (local(tensor).untyped_storage() for tensor in tensors)
    return sum(storage.nbytes() for storage in {id(s): s for s in found}.values())


class SavedTensors(saved_tensors_hooks):
    """Watches what autograd keeps for the backward pass of the forward pass inside.

    Tensors go in and out of the graph as they are: gradients keep every bit. What torch.compile's
    graphs keep is not seen.
    """

    def __init__(self) -> None:
        self._storages = WeakIdKeyDictionary()
        super().__init__(self._pack, _unpack)

    def bytes_beside(self, model: nn.Module) -> int:
        """Bytes that are kept now, without those of the parameters and buffers of ``model``.

        Parameters that a sharded model gathered and has freed again count for nothing.
        """
        for tensor in (*model.parameters(), *model.buffers()):
            self._storages.pop(local(tensor).untyped_storage(), None)
        return sum(storage.nbytes() for storage in self._storages)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage: torch.UntypedStorage = tensor.untyped_storage()
        self._storages[storage] = None
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
