"""GPUs for the jobs of a sweep: each job that runs at the same time gets one of its own.

A slot is a locked file in the sweep's folder. The job's process holds the lock too, so the system
frees the slot when the job has ended, however it ends.
"""

import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from switchlora.storage import NoLocks, locked

VISIBLE = "CUDA_VISIBLE_DEVICES"
SLOTS = ".gpus"
POLL_SECONDS = 1.0
ANY_GPU = ("auto", "cuda")
"""values of ``system.device`` that leave the choice of the GPU open"""


class Slot(NamedTuple):
    """A GPU, by its name in ``CUDA_VISIBLE_DEVICES``, and the lock that keeps it."""

    gpu: str
    lock: TextIO


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, by their names in ``CUDA_VISIBLE_DEVICES``.

    CUDA is not started: the GPU of this process can still be chosen.
    """
    count = torch.cuda.device_count()
    given = os.environ.get(VISIBLE)
    names = map(str, range(count)) if given is None else map(str.strip, given.split(","))
    return list(names)[:count]


@contextmanager
def gpu_slot(
    sweep: Path, gpus: Sequence[str], jobs_per_gpu: int, tell: Callable[[str], object]
) -> Iterator[Slot | None]:
    """Yield a slot of the ``sweep`` for one job, after waiting for a free one; None without GPUs.

    The GPU with the fewest jobs is taken. A wait is told by one line.
    """
    slot = None
    with suppress(NoLocks):
        slot = _free_slot(sweep, gpus, jobs_per_gpu)
        if gpus and slot is None:
            tell(f"waits for a GPU: {jobs_per_gpu} a GPU (system.jobs_per_gpu) run already")
        while gpus and slot is None:
            time.sleep(POLL_SECONDS)
            slot = _free_slot(sweep, gpus, jobs_per_gpu)
    try:
        yield slot
    finally:
        if slot is not None:
            slot.lock.close()


def _free_slot(sweep: Path, gpus: Sequence[str], jobs_per_gpu: int) -> Slot | None:
    for place, gpu in product(range(jobs_per_gpu), gpus):
        name = re.sub(r"[^\w-]", "_", f"{platform.node()}-{gpu}-{place}")
        lock = locked(sweep / SLOTS / name)
        if lock is not None:
            return Slot(gpu, lock)
    return None
