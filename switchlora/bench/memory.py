"""Measure the peak memory of one arm in a process of its own.

``peak_in_fresh_process`` starts this file as that process.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from switchlora.bench.arms import UPDATES_FOR_PEAK, Cell, base_model, device_of_benchmark, make_arm
from switchlora.learner import STATUS, peak_memory, reset_peak_memory
from switchlora.process import distributed

MIB = 2**20
FOREIGN_LIMIT = 256 * MIB  # most bytes that other processes may hold on a GPU
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
TINY = {"depth": 1, "embed_dim": 32, "num_heads": 1, "num_classes": 2}
ASK_GPU = "import torch; print(*torch.cuda.mem_get_info({}))"


def main() -> None:
    """Measure the arm of the JSON request in ``sys.argv[1]`` and print its peak as JSON.

    With several ranks it is the largest of their peaks.
    """
    request = json.loads(sys.argv[1])
    distributed.join()
    torch.set_num_threads(request["threads"])
    cell = Cell(**request["cell"])
    peaks = distributed.gather(peak_of_arm(request["arm"], cell))
    if distributed.is_primary():
        print(json.dumps({"peak_bytes": max(peaks)}))
    distributed.leave()


def peak_of_arm(name: str, cell: Cell) -> int:
    """Return the peak bytes of this rank over ``UPDATES_FOR_PEAK`` updates.

    - On CUDA: the allocated bytes.
    - On a CPU: the resident bytes beyond those that torch itself takes.
    """
    device = device_of_benchmark()
    before = bytes_of_torch(name, cell)
    arm = make_arm(name, base_model(cell), cell)
    gc.collect()
    reset_peak_memory(device)
    for _ in range(UPDATES_FOR_PEAK):
        arm.lap()
    peak = peak_memory(device)
    assert peak is not None
    return peak - before


def bytes_of_torch(name: str, cell: Cell) -> int:
    """Return the resident bytes that torch itself takes on a CPU; 0 on CUDA.

    The arm ``name`` of a tiny model makes one update first, so that torch has loaded everything.
    """
    tiny = Cell("vit_tiny_patch16_224", cell.precision, 1, cell.batch, image_size=32, options=TINY)
    make_arm(name, base_model(tiny), tiny).lap()
    gc.collect()
    if device_of_benchmark().type == "cuda":
        return 0
    return proc_bytes(STATUS, "VmRSS")


def peak_in_fresh_process(name: str, cell: Cell) -> int:
    """Run ``peak_of_arm`` in as many fresh processes as there are ranks; return the largest peak.

    glibc normally keeps freed memory for later use. How much it keeps depends on the order of
    allocations and says nothing about the arm: PEFT's ViT-S was 70 % over its live tensors, full
    training 18 %. The fresh processes therefore tell glibc to return freed memory (``ALLOCATOR``).

    Raise ValueError when the process fails.
    """
    threads = torch.get_num_threads()
    request = {"arm": name, "cell": asdict(cell), "threads": threads}
    command = [*_launcher(), str(Path(__file__)), json.dumps(request)]
    done = subprocess.run(
        command, env=_fresh_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it was killed"]
        raise ValueError(f"the process that measures the memory of '{name}' failed: {said[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["peak_bytes"]


def _fresh_environment() -> dict[str, str]:
    """Return this process's environment with ``ALLOCATOR``, and without torchrun's variables."""
    found = {}
    for name, value in os.environ.items():
        if not name.startswith(LAUNCHED):
            found[name] = value
    return found | ALLOCATOR


def _launcher() -> Sequence[str]:
    ranks = distributed.world_size()
    if ranks == 1:
        return [sys.executable]
    if os.environ.get("LOCAL_WORLD_SIZE") != str(ranks):
        raise ValueError("--memory works with the processes of one machine: leave it out")
    processes = f"--nproc-per-node={ranks}"
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", processes]


def refuse_full_memory(name: str, predicted: int) -> None:
    """Raise ValueError when the free main memory cannot hold ``predicted`` bytes for each rank."""
    needed = predicted * distributed.world_size()
    free = proc_bytes("/proc/meminfo", "MemAvailable")
    if free < needed:
        raise ValueError(
            f"the memory of '{name}' cannot be measured: it needs about {needed // MIB:,} MiB and "
            f"{free // MIB:,} MiB are free; end other programs or lower --batch"
        )


def refuse_used_gpu(device: torch.device) -> None:
    """Raise ValueError when other processes hold more than ``FOREIGN_LIMIT`` bytes of the GPU.

    Call it before this process puts anything on the GPU.
    """
    free, total = torch.cuda.mem_get_info(device)
    asked = [sys.executable, "-c", ASK_GPU.format(device.index)]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True)
    free_beside_both = int(answer.stdout.split()[0])
    used_by_both = total - free_beside_both
    held = held_by_others(total - free, used_by_both)
    if held > FOREIGN_LIMIT:
        raise ValueError(
            f"memory is not measured on a GPU in use: other processes hold {held // MIB:,} MiB of "
            f"{device}; wait, or leave out --memory"
        )


def held_by_others(used: int, used_by_both: int) -> int:
    """Return the bytes that other programs hold on the GPU.

    ``used`` are the bytes in use when only this process has a context there. ``used_by_both`` are
    the bytes in use while a second process has one too. Both contexts have the same size, so the
    difference of the two readings is one context. What ``used`` exceeds it by belongs to others.
    """
    context = used_by_both - used
    return used - context


def proc_bytes(path: str, key: str) -> int:
    """Return the value in bytes of a line of a Linux status file, such as 'VmRSS:  1234 kB'."""
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    kibibytes, _ = lines[key].split()
    return int(kibibytes) * 1024


if __name__ == "__main__":
    main()
