"""Several processes: join the group once, sum over ranks, let the primary rank decide.

In a single process the functions here return what they were given.
"""

import gc
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from switchlora.errors import OtherRankFailed, RanksDisagree

T = TypeVar("T")
PATIENCE = timedelta(minutes=15)
BROKEN = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")


def join() -> None:
    """Join the group that torchrun or submitit describes in the environment, once per process.

    NCCL carries tensors on GPUs. gloo carries tensors on CPUs and all plain values.
    """
    if dist.is_initialized() or not _launched_as_one_of_several():
        return
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=PATIENCE)
        return
    own = torch.device("cuda", local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE, device_id=own)


def leave() -> None:
    """Leave the group, if one was joined.

    What still holds the group, such as DDP, must be gone by then: with torch 2.10 the last holder
    may wait for ever when it is freed.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Return how many processes work on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_primary() -> bool:
    """Return whether this is the primary rank, the process that decides, writes and prints."""
    return rank() == 0


def total(values: Sequence[float]) -> list[float]:
    """Return the sum of each value over all ranks, in float64."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def mean_of_ranks(value: Tensor) -> Tensor:
    """Return the mean of a number () over all ranks, in float64 on its device; nobody reads it."""
    value = value.double()
    if world_size() > 1:
        dist.all_reduce(value)
    return value / world_size()


def any_rank(*flags: bool) -> list[bool]:
    """Return whether each flag is set on at least one rank."""
    counts = total(list(map(float, flags)))
    return [count > 0 for count in counts]


@dataclass
class Question:
    """Flags about which ranks ask each other now and then: once a second, not at every update.

    How many calls lie between two exchanges follows from the time that they took on the mean, so
    that all ranks ask at the same calls.
    """

    seconds: float = 1.0
    every: int = 1
    """calls from one exchange to the next"""
    _calls: int = 0
    _since: float = field(default_factory=time.monotonic)

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return whether each flag is set on some rank; all are False between two exchanges.

        All ranks must call it equally often. A single process gets its own flags each time.
        """
        if world_size() == 1:
            return list(flags)
        self._calls += 1
        if self._calls < self.every:
            return [False] * len(flags)
        now = time.monotonic()
        *counts, passed = total([*map(float, flags), now - self._since])
        wanted = self.seconds * self._calls * world_size() / max(passed, 1e-9)
        self.every = max(1, min(int(wanted), 2 * self.every))
        self._calls, self._since = 0, now
        return [count > 0 for count in counts]


def gather(value: T) -> list[T]:
    """Return the picklable ``value`` of every rank, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def from_primary(compute: Callable[[], T]) -> T:
    """Return the primary rank's ``compute()`` on every rank; no other rank calls it.

    If it raises, every other rank raises OtherRankFailed.
    """
    if world_size() == 1:
        return compute()
    value: Any = None
    error = None
    if is_primary():
        try:
            value = compute()
        except Exception as caught:
            error = caught
    sent = [value, _told(error)]
    dist.broadcast_object_list(sent)
    if error is not None:
        raise error
    value, message = sent
    if message is not None:
        raise OtherRankFailed(message)
    return value


@contextmanager
def together() -> Iterator[None]:
    """Let all ranks get through the block, or raise an exception on all of them.

    A rank that succeeded raises OtherRankFailed. The block must not talk to other ranks: a rank
    that fails in it would leave them waiting.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = gather(_told(error))
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise OtherRankFailed(f"rank {number}: {message}")


def _told(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the first 16 hexadecimal digits of SHA-256 over names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def agreed_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of ``tensors``; RanksDisagree unless it is the same on all ranks."""
    sums = gather(checksum(tensors))
    if len(set(sums)) > 1:
        raise RanksDisagree(f"ranks hold different tensors: checksums {', '.join(sums)}")
    return sums[0]


def agreement_line(agreed: str) -> str:
    """Return a line for the user on what an agreed checksum means."""
    return f"all {world_size()} ranks train the same tensors (SHA-256 {agreed}...)"


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, on every rank; return any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return ``tensor`` on the device of ``model``, sharded like it if their shapes agree."""
    tensor = tensor.to(model.device)
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def lost_rank(error: BaseException) -> str | None:
    """Return a line on an error that comes from another rank's end; None for any other error."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return None
    message = str(error)
    broken = any(words in message for words in BROKEN)
    if not broken and not isinstance(error, dist.DistError):
        return None
    without_places = re.sub(r"\[[^]]*\]:?\S*", "", message)
    reason = without_places.strip().split(". ")[0]
    return f"another process of this run is gone ({reason})"


def _launched_as_one_of_several() -> bool:
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return "RANK" in os.environ and "MASTER_ADDR" in os.environ
    from submitit.helpers import TorchDistributedEnvironment

    environment = TorchDistributedEnvironment()
    if environment.world_size > 1:
        environment.export(set_cuda_visible_devices=False, overwrite=True)
    return environment.world_size > 1
