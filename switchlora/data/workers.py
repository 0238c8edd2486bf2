"""A loader that raises LoaderDied whenever one of its processes dies, however torch shows it."""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import ProcessError
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from switchlora.data.shipping import Move
from switchlora.errors import DataUnusable, LoaderDied
from switchlora.process import SIGNALS

HAND_OVER_ERRORS = (OSError, EOFError, RuntimeError, UnpicklingError, ProcessError)
DIED = (
    "a process that loads images died (too little memory or shared memory, or too many "
    "system.workers?)"
)
NO_ROOM = "a batch finds no room in shared memory"
WORKER_RAISED = "in DataLoader worker process"


class Loader(DataLoader):
    """A DataLoader of whole batches of tensors that raises LoaderDied if a worker has died.

    torch shows a worker's death in many ways, depending on the moment: a message of its own, a
    reset or refused connection, an end of file, half a pickle. An exception that the data set
    raised passes through; DataUnusable without the traceback that torch puts into its message.

    torch's handler of SIGCHLD is not used. It would raise between any two lines of the program,
    once for each dead worker, and also after the first has ended the run. Without it a death is
    noticed where the next batch is missed.

    After ``to`` batches come on a device.
    """

    def __init__(self, dataset: Dataset, *, num_workers: int = 0, **options: Any) -> None:
        if num_workers:
            options |= {"worker_init_fn": ignore_signals, "collate_fn": in_shared_memory}
        super().__init__(dataset, batch_size=None, num_workers=num_workers, **options)
        self.finish: Callable[[Any], Any] | None = None
        self.stream: torch.cuda.Stream | None = None

    def to(self, device: torch.device) -> None:
        """Let batches come on ``device``; a data set that knows how may be kept there.

        On CUDA a batch travels in a stream of its own, while the device works on the one before.
        """
        if device.type == "cpu":
            return
        move = getattr(self.dataset, "to", lambda device: Move(device))
        self.finish = move(device)
        is_there = getattr(self.dataset, "device", None) == device
        self.pin_memory = self.pin_memory and device.type == "cuda" and not is_there
        if device.type == "cuda" and not is_there:
            self.stream = torch.cuda.Stream(device)

    def __iter__(self) -> Iterator:  # type: ignore[override]
        for item in self._items():
            yield self.finished(item)

    def finished(self, item: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the batch that an item of the data set becomes, on the device."""
        if self.finish is None:
            return item
        if self.stream is None:
            return self.finish(item)
        with torch.cuda.stream(self.stream):
            batch = self.finish(item)
        present = torch.cuda.current_stream(self.stream.device)
        present.wait_stream(self.stream)
        for tensor in batch:
            tensor.record_stream(present)
        return batch

    def _items(self) -> Iterator:
        try:
            with handler_kept(signal.SIGCHLD):
                batches = super().__iter__()
            atexit.unregister(kill_workers)
            atexit.register(kill_workers)  # the last to be registered is the first to be called
            yield from batches
        except DataUnusable as error:
            if self.num_workers:
                raise type(error)(last_line(error)) from error
            raise
        except HAND_OVER_ERRORS as error:
            if self.num_workers and not raised_by_the_data(error):
                said = f"{type(error).__name__}: {error}".strip().splitlines()
                raise LoaderDied(f"{DIED}: {said[-1]}") from error
            raise


@contextmanager
def handler_kept(number: signal.Signals) -> Iterator[None]:
    """Put the handler of a signal back at the end; only the main thread may set one."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and handler is not None:
            signal.signal(number, handler)


def raised_by_the_data(error: Exception) -> bool:
    """Return whether a living worker passed on an error that its data set raised.

    False for a batch that finds no room in shared memory: that is no fault of the data set.
    """
    message = str(error)
    return WORKER_RAISED in message and NO_ROOM not in message


def last_line(error: Exception) -> str:
    """Return what an error said in a worker, the last line of the traceback in its message."""
    return str(error).strip().splitlines()[-1].partition(": ")[2]


def in_shared_memory(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Move a batch to shared memory in the worker's main thread.

    torch would do it in a helper thread. A failure there is printed and the batch is lost, so the
    run would wait for it for ever.
    """
    try:
        return tuple(tensor.share_memory_() for tensor in batch)
    except RuntimeError as error:
        raise RuntimeError(f"{NO_ROOM}: {error}") from error


def ignore_signals(worker: int) -> None:
    """Let a worker survive a signal to all processes: the run still needs it until it has saved.

    A worker ends with the run: see ``kill_workers``.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Kill the workers that are left when the program ends.

    Python would send them SIGTERM, which they ignore, and wait for them for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
