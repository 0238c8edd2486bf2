"""Measure what the monitor and the switch cost in seconds and peak memory.

Example: ``switchlora-bench switch --model vit_large_patch16_224 --rank 64 --out FILE``.

One process makes some updates of full training, some measurements of the monitor, and the switch
of all targets. A record with their costs is added to FILE. Memory is counted as follows:
- On CUDA: the allocated bytes.
- On a CPU: the resident bytes beyond those that torch itself takes.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from switchlora.bench.arms import (
    TOTAL_UPDATES,
    Cell,
    base_model,
    bench_recipe,
    device_of_benchmark,
    make_arm,
)
from switchlora.bench.memory import TINY, proc_bytes
from switchlora.criteria import at_start
from switchlora.errors import check_range
from switchlora.initializers import UpdateSVD
from switchlora.learner import STATUS, build_learner, peak_memory, reset_peak_memory
from switchlora.monitor import UpdateMonitor
from switchlora.policy import SwitchPolicy
from switchlora.ranks import Fixed
from switchlora.storage import environment
from switchlora.switching import Scene, switch

MIB = 2**20


def main() -> None:
    """Measure, add the record to the file, and print three lines about it."""
    options = parse()
    try:
        check_range("--updates", options.updates, 2)
        check_range("--window", options.window, 1)
        cell = Cell(options.model, options.precision, options.rank, options.batch)
        record = measure(cell, options.updates, options.window)
    except ValueError as error:
        sys.exit(f"switchlora-bench switch: {error}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print("\n".join([*lines(cell, record), f"added to {options.out}"]))


def parse() -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="vit_large_patch16_224", help="a timm name")
    add("--precision", default="fp32", choices=["fp32", "bf16"])
    add("--rank", type=int, default=64)
    add("--batch", type=int, default=8)
    add("--updates", type=int, default=4, help="the first is not counted")
    add("--window", type=int, default=100, help="monitor.window, in updates")
    add("--out", type=Path, default=Path("runs/bench/switch.jsonl"))
    return parser.parse_args()


def measure(cell: Cell, updates: int, window: int) -> dict[str, Any]:
    """Return the seconds and peak bytes of updates, of a measurement and of the switch."""
    device = device_of_benchmark()
    tiny = Cell("vit_tiny_patch16_224", cell.precision, 1, image_size=32, options=TINY)
    make_arm("full", base_model(tiny), tiny).lap()
    gc.collect()
    before = 0 if device.type == "cuda" else proc_bytes(STATUS, "VmRSS")
    arm = make_arm("full", base_model(cell), cell)
    policy = SwitchPolicy(at_start, Fixed(cell.rank), UpdateSVD())
    monitor = UpdateMonitor(arm.model, policy.find_targets(arm.model), window)
    reset_peak_memory(device)
    laps = [arm.lap()["total"] for _ in tqdm(range(updates), desc=f"{cell} updates", leave=False)]
    training_peak = peak_memory(device)
    arm._update()
    measured = partial(monitor.measure, num_updates=window, epoch=1.0)
    first, *later = [seconds(measured, device) for _ in range(4)]
    restart = seconds(partial(monitor.start_window, window), device)
    history = [measured()]
    arm._update()
    gc.collect()
    reset_peak_memory(device)

    def rebuild(model):
        return build_learner(model, bench_recipe(cell), TOTAL_UPDATES)

    scene = Scene(arm.learner, policy, monitor, arm.images[:8], rebuild)
    begin = time.perf_counter()
    _, report = switch(scene, history)
    switch_seconds, switch_peak = time.perf_counter() - begin, peak_memory(device)
    assert training_peak is not None and switch_peak is not None
    return {
        "cell": {**vars(cell), "options": dict(cell.options)},
        "targets": len(report.ranks),
        "update_seconds": laps[1:],
        "measurement_seconds": later,
        "first_measurement_seconds": first,
        "new_window_seconds": restart,
        "monitor_share": (median(later) + restart) / (window * median(laps[1:])),
        "window": window,
        "switch_seconds": switch_seconds,
        "training_peak_bytes": training_peak - before,
        "switch_peak_bytes": switch_peak - before,
        "drift": report.drift,
        "environment": environment(device, seed=0),
    }


def seconds(act: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``act`` takes, including the work that it queues on the GPU."""
    begin = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def lines(cell: Cell, record: dict[str, Any]) -> list[str]:
    """Return three lines on the costs of an update, of the monitor and of the switch."""
    update = median(record["update_seconds"])
    switched, peaks = record["switch_seconds"], ("training_peak_bytes", "switch_peak_bytes")
    training, switching = (record[key] / MIB for key in peaks)
    return [
        f"{cell}, batch {cell.batch}: an update takes {update:.2f} s",
        f"monitor: {median(record['measurement_seconds']):.2f} s a measurement of "
        f"{record['targets']} targets, {record['monitor_share']:.2%} of the training time with a "
        f"window of {record['window']} updates",
        f"switch: {switched:.1f} s, as long as {switched / update:.1f} updates; peak memory "
        f"{switching:,.0f} MiB, {switching / training:.2f} of training's; drift "
        f"{record['drift']:.1e}",
    ]
