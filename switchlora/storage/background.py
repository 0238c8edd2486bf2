"""Write in a thread while training goes on: tensors are copied first, one write at a time."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

THREAD = "writes a checkpoint"


class Background:
    """Runs one action at a time in a thread. What it raises comes out of the next call."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def start(self, action: Callable[[], Any]) -> None:
        """Start ``action``, after the one before has ended."""
        self.wait()
        self._thread = Thread(target=self._run, args=(action,), name=THREAD)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the action that runs, if any, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._error = error


def staged(content: Any) -> Any:
    """Return ``content`` with copies of its tensors on the CPU; training may change the originals.

    Copies from a GPU lie in pinned memory, which is used again for the next ones.
    """
    copies = tree_map_only(Tensor, _copied, content)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copies


def _copied(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.cpu().clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
