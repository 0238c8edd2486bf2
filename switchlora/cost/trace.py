"""Trace one training update on fake tensors: its operations, and the bytes that it holds.

Fake tensors have shapes, types and a device, but no content. Nothing is computed or allocated.
"""

import copy
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from switchlora.learner import (
    Recipe,
    SavedTensors,
    autocast,
    build_optimizer,
    flops_of,
    held_bytes,
    loss_of,
    operands_within_update,
)

LossFunction = Callable[[Tensor, Tensor], Tensor]
Moved = tuple[tuple[int, int], ...]
PARTS = ("forward", "backward", "optimizer")
MOVES_NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
ONLY_WRITES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}


@dataclass(frozen=True)
class Operation:
    """One operation of an update."""

    name: str
    """name of the operator, such as 'aten.addmm'"""
    module: str
    """innermost module that it belongs to, in forward and backward pass; '' outside of all"""
    part: str
    """'forward', 'backward' or 'optimizer'"""
    flops: int
    """flops of products and attention, two for a multiply-add; 0 for element-wise operations"""
    bytes: int
    """bytes of the tensors read and written; 0 for views"""
    width: int = 0
    """shortest side (of M, N and K) of a product; 0 for other operations"""
    reads: Moved = field(default=(), compare=False)
    """(number of a storage, bytes) of each tensor read; numbers are given in order of creation"""
    writes: Moved = field(default=(), compare=False)
    """the same of each tensor written anew"""


@dataclass(frozen=True)
class Trace:
    """The operations of one update on one rank, and the memory that it holds."""

    operations: tuple[Operation, ...]
    memory: Mapping[str, int]
    """bytes of 'parameters' (with buffers), 'gradients', 'optimizer_state' and 'activations'.
    Activations are what autograd keeps from the forward to the backward pass of one micro-batch,
    without the parameters"""
    peak_bytes: int
    """largest sum of all live tensors; a C allocator that keeps freed memory holds more"""
    trainable_bytes: int
    """bytes of the gradients that ranks exchange"""
    num_parameters: int = 0
    """number of tensors that are parameters of the model, trained or frozen"""


class Recorder(TorchDispatchMode):
    """Record the operations that run inside, and follow the bytes of live storages.

    A backward operation belongs to the module whose forward pass created its autograd node.
    autograd numbers its nodes in creation order. We store the current number and the current
    module as a mark whenever a module is entered or left. A backward node belongs to the module of
    the last mark whose number is at or below its own.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.part = "forward"
        self.live = 0
        self.peak = 0
        self._device = device
        self._held = WeakIdKeyDictionary()
        self._numbers = WeakIdKeyDictionary()
        self._next_number = count()
        self._inside = [""]
        self._marks = [(0, "")]
        self._owners: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            module_name, _, _ = name.rpartition(".")
            self._owners[id(parameter)] = module_name
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave, always_call=True)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, record its flops and bytes, and follow the tensors that it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":
            return result
        read, made = _tensors((args, kwargs)), _tensors(result)
        moved = _bytes_moved(func, args, read, made)
        flops = flops_of(func, args, kwargs, result)
        operation = Operation(
            name=str(func.overloadpacket),
            module=self._module(),
            part=self.part,
            flops=flops,
            bytes=moved,
            width=_width(read, made) if func.overloadpacket.__name__ in PRODUCTS else 0,
            reads=self._numbered(read) if moved else (),
            writes=self._numbered(made) if moved else (),
        )
        self.operations.append(operation)
        self.hold(made)
        return result

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors`` as live until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device == self._device and storage not in self._held:
                self._held[storage] = None
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage.nbytes())

    def _numbered(self, tensors: Iterable[Tensor]) -> Moved:
        found = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._numbers:
                self._numbers[storage] = next(self._next_number)
            found.append((self._numbers[storage], _extent(tensor)))
        return tuple(found)

    def _release(self, size: int) -> None:
        self.live -= size

    def _enter(self, name: str, *_: Any) -> None:
        self._inside.append(name)
        self._mark()

    def _leave(self, *_: Any) -> None:
        self._inside.pop()
        self._mark()

    def _mark(self) -> None:
        self._marks.append((torch.autograd._get_sequence_nr(), self._inside[-1]))

    def _module(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None or len(self._inside) > 1:  # a checkpoint recomputes inside a module
            return self._inside[-1]
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self._owners.get(id(variable), "")
        later = bisect_right(self._marks, node._sequence_nr(), key=itemgetter(0))
        _, name = self._marks[later - 1]
        return name


def trace_update(
    model: nn.Module,
    recipe: Recipe,
    images: Sequence[int],
    num_classes: int,
) -> Trace:
    """Call ``trace_batch`` on images of shape ``images`` = (B, C, H, W), with soft labels."""
    inputs = torch.empty(*images, device="meta")
    labels = torch.empty(images[0], num_classes, device="meta")
    return trace_batch(model, recipe, inputs, labels, F.cross_entropy)


def trace_batch(
    model: nn.Module,
    recipe: Recipe,
    inputs: Tensor,
    labels: Tensor,
    loss_fn: LossFunction,
) -> Trace:
    """Trace one update of the plain ``model`` on one rank's batch.

    Only the shapes and types of ``inputs`` and ``labels`` are read. The batch is split into
    ``recipe.accumulation`` micro-batches. Nothing is computed or allocated: the model, its
    gradients and all random generators stay as they are. A compiled model is traced as an eager
    one, with its setting of activation checkpointing. The loss scaling of fp16 is left out.
    """
    device = next(model.parameters()).device
    if device.type == "meta":  # no operation runs there; on fake tensors the device is a name
        device = torch.device("cpu")
    with without_content(model, device) as model:
        optimizer = stepped(model, recipe)
        recorder = Recorder(model, device)
        state = _tensors(list(optimizer.state.values()))
        recorder.hold([*model.parameters(), *model.buffers(), *state])
        with recorder, operands_within_update(model, recipe):
            activations = _passes(model, recipe, inputs, labels, loss_fn, recorder)
            recorder.part = "optimizer"
            _step(model, recipe, optimizer)
    gradients = held_bytes(_gradients(model))
    memory = {
        "parameters": held_bytes([*model.parameters(), *model.buffers()]),
        "gradients": gradients,
        "optimizer_state": held_bytes(state),
        "activations": activations,
    }
    num_parameters = len(list(model.parameters()))
    operations = tuple(recorder.operations)
    return Trace(operations, memory, recorder.peak, gradients, num_parameters)


@contextmanager
def without_content(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Yield a copy of ``model`` on fake tensors; tensors made inside the context are fake too."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        hollow: dict[int, Tensor] = {}
        for buffer in model.buffers():
            hollow[id(buffer)] = torch.empty_like(buffer, device=device)
        for parameter in model.parameters():
            empty = torch.empty_like(parameter, device=device)
            hollow[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    with FakeCopyMode(fake):
        model = copy.deepcopy(model, hollow)
    with fake:
        yield model


def stepped(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Return the recipe's optimizer after one step: with its moments, and without gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer = build_optimizer(model, recipe)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _passes(
    model: nn.Module,
    recipe: Recipe,
    inputs: Tensor,
    labels: Tensor,
    loss_fn: LossFunction,
    recorder: Recorder,
) -> int:
    """Run the passes of all micro-batches; return the bytes that the first one's graph keeps."""
    device = next(model.parameters()).device
    inputs = torch.empty_like(inputs, device="cpu")
    labels = torch.empty_like(labels, device="cpu")
    parts = zip(inputs.chunk(recipe.accumulation), labels.chunk(recipe.accumulation), strict=True)
    activations = None
    for inputs_part, labels_part in parts:
        recorder.part = "forward"
        saved = SavedTensors()
        with autocast(device.type, recipe.precision), saved:
            loss = loss_of(loss_fn, model(inputs_part.to(device)), labels_part.to(device))
        if activations is None:
            activations = saved.bytes_beside(model)
        recorder.part = "backward"
        (loss * (len(inputs_part) / len(inputs))).backward()
    assert activations is not None
    return activations


def _step(model: nn.Module, recipe: Recipe, optimizer: Optimizer) -> None:
    gradients = _gradients(model)
    norm = get_total_norm(gradients)
    if recipe.clip_grad is not None:
        trained = [p for p in model.parameters() if p.grad is not None]
        clip_grads_with_norm_(trained, recipe.clip_grad, norm)
    optimizer.step()


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _bytes_moved(
    func: Any, args: tuple, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> int:
    """Return the bytes of the tensors that ``func`` reads and writes; 0 for a view."""
    name = func.overloadpacket.__name__
    if name in MOVES_NOTHING or func.is_view:
        return 0
    written = sum(map(_extent, outputs))
    if name in ONLY_WRITES:
        return written
    if not outputs:
        written = sum(map(_extent, _tensors(_changed(func, args))))
    return written + sum(map(_extent, inputs))


def _changed(func: Any, args: tuple) -> list[Any]:
    """Return the arguments that an operator without a result changes in place."""
    pairs = zip(func._schema.arguments, args, strict=False)
    return [value for argument, value in pairs if argument.is_write]


def _width(read: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """Return the shortest of M, N and K of a product from its two operands and its result."""
    matrices = [tensor.shape[-2:] for tensor in [*read, *made] if tensor.dim() >= 2]
    return min((min(sides) for sides in matrices), default=0)


def _extent(tensor: Tensor) -> int:
    """Return the bytes of the distinct elements of ``tensor``: expanded ones count once."""
    extent = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        expanded = stride == 0 and length > 0
        if not expanded:
            extent *= length
    return extent
