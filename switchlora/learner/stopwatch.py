"""Measure throughput, epoch time and peak memory of each phase."""

import gc
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

WARMUP_UPDATES = 5
STATUS = "/proc/self/status"


class Stopwatch:
    """Times the updates of one phase; work inside ``paused`` does not count.

    The first ``WARMUP_UPDATES`` updates of a phase are dropped, and as many after a resume,
    because allocators, caches and compilers settle in them. ``monitor_share`` compares the
    monitor's time with the time of all updates.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.monitor_seconds = 0.0
        self.train_seconds = 0.0
        self.start_phase()

    def start_phase(self) -> None:
        """Forget the laps and reset the peak of the memory counters."""
        self._laps: list[float] = []
        self._settling = WARMUP_UPDATES
        self._num_updates = 0
        self._phase_seconds = 0.0
        self._earlier_peak = 0
        reset_peak_memory(self.device)
        self.resume()

    def resume(self) -> None:
        """Start the clock here."""
        self._mark = time.perf_counter()

    def lap(self) -> None:
        """Count one finished update and its time."""
        now = time.perf_counter()
        seconds = now - self._mark
        self._mark = now
        if self._settling:
            self._settling -= 1
        else:
            self._laps.append(seconds)
        self._num_updates += 1
        self.train_seconds += seconds
        self._phase_seconds += seconds

    @contextmanager
    def paused(self, monitor: bool = False) -> Iterator[None]:
        """Leave out the time of what runs inside; ``monitor`` books it as the monitor's time."""
        self._finish_queued_work()
        begin = time.perf_counter()
        yield
        self._finish_queued_work()
        if monitor:
            self.monitor_seconds += time.perf_counter() - begin
        self.resume()

    def _finish_queued_work(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def monitor_share(self) -> float:
        """Seconds of the monitor over seconds of training."""
        return self.monitor_seconds / self.train_seconds if self.train_seconds else 0.0

    def summary(self, batch_size: int, updates_per_epoch: int) -> dict[str, Any]:
        """Return the phase's medians, and the seconds of all its updates.

        A value is None if too few updates were made for it.
        """
        speed = epoch_seconds = quartiles = None
        if self._laps:
            typical = median(self._laps)
            speed = batch_size / typical
            epoch_seconds = typical * updates_per_epoch
        if len(self._laps) > 3:
            fast, _, slow = quantiles(self._laps)
            quartiles = [batch_size / slow, batch_size / fast]
        peak = peak_memory(self.device)
        return {
            "images_per_second": speed,
            "images_per_second_quartiles": quartiles,
            "epoch_seconds": epoch_seconds,
            "peak_memory_bytes": peak and max(peak, self._earlier_peak),
            "num_updates": self._num_updates,
            "train_seconds": self._phase_seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the times and the peak of the phase so far."""
        return {
            "laps": self._laps,
            "num_updates": self._num_updates,
            "phase_seconds": self._phase_seconds,
            "peak": max(peak_memory(self.device) or 0, self._earlier_peak),
            "monitor_seconds": self.monitor_seconds,
            "train_seconds": self.train_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the times and the peak of a ``state_dict``."""
        self.start_phase()
        self._laps = list(state["laps"])
        self._num_updates = state["num_updates"]
        self._phase_seconds = state["phase_seconds"]
        self._earlier_peak = state["peak"]
        self.monitor_seconds = state["monitor_seconds"]
        self.train_seconds = state["train_seconds"]


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak: the allocator's on CUDA, the resident set's (Linux) on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def release_memory(device: torch.device) -> None:
    """Free the memory of tensors that nothing needs any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int | None:
    """Return the peak since the last reset in bytes: allocated on CUDA, resident on a CPU (Linux).

    None if the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path(STATUS).read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
