"""A device that is not there: CPU tensors with its label, which refuse to meet those without it.

``with on_pretended(): run.train()`` runs a whole training on ``DEVICE``. An operation on tensors
of two devices raises ``TwoDevices``, as it would on CUDA. Everything else computes as on the CPU.
"""

from collections import Counter
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("mtia", 0)
CPU = torch.device("cpu")
CROSSING = ("copy_", "__set__", "set_", "_has_compatible_shallow_copy_type")
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero")


class TwoDevices(RuntimeError):
    """An operation had operands on two devices."""


class Pretended(TorchFunctionMode):
    """Tell the label of a tensor's storage as its device, and check operands."""

    def __init__(self):
        self.placed = {}
        self.crossings = Counter()

    def device_of(self, tensor):
        key = tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
        return self.placed[key][0] if key in self.placed else CPU

    def place(self, tensor, device):
        storage = tensor.untyped_storage()
        if device == CPU:
            self.placed.pop(storage._cdata, None)
        else:
            self.placed[storage._cdata] = (device, storage)  # keeps the address taken

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        if name == "__get__":
            return self._property(function, args)
        if name in ("to", "cpu"):
            return self._moved(name, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = DEVICE in map(self.device_of, tensors)
        if len({self.device_of(t) for t in tensors if t.dim()}) > 1:
            self._refuse(name, tensors)
        if on_device and name in READS:
            self.crossings[name] += 1
        wanted = self._wanted(kwargs)
        result = function(*args, **kwargs)
        if wanted == DEVICE or on_device and wanted is None:
            for found in tree_leaves(result):
                if isinstance(found, Tensor):
                    self.place(found, DEVICE)
        return result

    def _refuse(self, name, tensors):
        in_backward = torch._C._current_graph_task_id() != -1  # where gradients have no label
        if name not in CROSSING and not in_backward:
            found = [(tuple(t.shape), self.device_of(t).type) for t in tensors]
            raise TwoDevices(f"{name}: {found}")

    def _wanted(self, kwargs):
        device = kwargs.get("device")
        if device is None:
            return None
        kwargs["device"] = CPU
        return self._known(torch.device(device))

    def _moved(self, name, args, kwargs):
        (tensor, *rest) = args
        here = self.device_of(tensor)
        target = CPU if name == "cpu" else here
        words = []
        for word in [*rest, kwargs.pop("device", None), kwargs.pop("other", None)]:
            if isinstance(word, Tensor):
                target = self.device_of(word)
                words.append(word.dtype)
            elif isinstance(word, (str, torch.device)):
                target = torch.device(word)
            elif word is not None:
                words.append(word)
        target = self._known(target)
        if words and isinstance(words[0], bool):  # .to(device, non_blocking)
            words.insert(0, tensor.dtype)
        if target != here:
            waits = not (kwargs.get("non_blocking") or words[1:2] == [True])
            self.crossings["waiting" if waits else "async"] += 1
            kwargs["copy"] = True
            words = words[:1]
        if not words and "dtype" not in kwargs:
            words = [tensor.dtype]
        result = Tensor.to(tensor, *words, **kwargs)
        self.place(result, target)
        return result

    def _known(self, device):
        return DEVICE if device.type == DEVICE.type else CPU

    def _property(self, function, args):
        (tensor, *_) = args
        owner = getattr(function, "__self__", None)
        which = getattr(owner, "__name__", "")
        if which == "device":
            return self.device_of(tensor)
        if which == "is_cpu":
            return self.device_of(tensor) == CPU
        result = function(*args)
        if which == "grad" and result is not None:
            self.place(result, self.device_of(tensor))
        return result


@contextmanager
def on_pretended():
    mode = Pretended()
    with mode:
        yield mode
