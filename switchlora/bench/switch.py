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
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn
from tqdm import tqdm

from switchlora.bench.arms import (
    TOTAL_UPDATES,
    Cell,
    base_model,
    bench_recipe,
    device_of_benchmark,
    make_arm,
)
from switchlora.bench.memory import MIB, bytes_of_torch
from switchlora.cost import clock_of, seconds_of
from switchlora.criteria import at_start
from switchlora.errors import check_range
from switchlora.initializers import UpdateSVD
from switchlora.learner import Learner, build_learner, peak_memory, reset_peak_memory
from switchlora.monitor import UpdateMonitor
from switchlora.policy import SwitchPolicy
from switchlora.ranks import Fixed
from switchlora.storage import environment, output_file
from switchlora.switching import Scene, switch


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
    add("--out", type=output_file, default=Path("runs/bench/switch.jsonl"))
    return parser.parse_args()


def measure(cell: Cell, updates: int, window: int) -> dict[str, Any]:
    """Return the seconds and peak bytes of updates, of a measurement and of the switch."""
    device = device_of_benchmark()
    clock = clock_of(device)
    before = bytes_of_torch("full", cell)
    arm = make_arm("full", base_model(cell), cell)
    policy = SwitchPolicy(at_start, Fixed(cell.rank), UpdateSVD())
    monitor = UpdateMonitor(arm.model, policy.find_targets(arm.model), window)

    reset_peak_memory(device)
    laps = [arm.lap()["total"] for _ in tqdm(range(updates), desc=f"{cell} updates", leave=False)]
    training_peak = peak_memory(device)
    update_seconds = laps[1:]

    arm.update()
    measured = partial(monitor.measure, num_updates=window, epoch=1.0)
    first_measurement, *measurements = [seconds_of(measured, clock) for _ in range(4)]
    new_window = seconds_of(partial(monitor.start_window, window), clock)
    monitor_seconds = median(measurements) + new_window
    history = [measured()]

    arm.update()
    gc.collect()
    reset_peak_memory(device)

    def rebuild(model: nn.Module) -> Learner:
        return build_learner(model, bench_recipe(cell), TOTAL_UPDATES)

    scene = Scene(arm.learner, policy, monitor, arm.images[:8], rebuild)
    begin = clock()
    _, outcome = switch(scene, history)
    switch_seconds = clock() - begin
    switch_peak = peak_memory(device)
    assert training_peak is not None and switch_peak is not None
    return {
        "cell": {**vars(cell), "options": dict(cell.options)},
        "targets": len(outcome.ranks),
        "update_seconds": update_seconds,
        "measurement_seconds": measurements,
        "first_measurement_seconds": first_measurement,
        "new_window_seconds": new_window,
        "monitor_share": monitor_seconds / (window * median(update_seconds)),
        "window": window,
        "switch_seconds": switch_seconds,
        "training_peak_bytes": training_peak - before,
        "switch_peak_bytes": switch_peak - before,
        "drift": outcome.drift,
        "environment": environment(device, seed=0),
    }


def lines(cell: Cell, record: dict[str, Any]) -> list[str]:
    """Return three lines on the costs of an update, of the monitor and of the switch."""
    update = median(record["update_seconds"])
    measurement = median(record["measurement_seconds"])
    switched = record["switch_seconds"]
    training_peak = record["training_peak_bytes"] / MIB
    switch_peak = record["switch_peak_bytes"] / MIB
    return [
        f"{cell}, batch {cell.batch}: an update takes {update:.2f} s",
        f"monitor: {measurement:.2f} s a measurement of "
        f"{record['targets']} targets, {record['monitor_share']:.2%} of the training time with a "
        f"window of {record['window']} updates",
        f"switch: {switched:.1f} s, as long as {switched / update:.1f} updates; peak memory "
        f"{switch_peak:,.0f} MiB, {switch_peak / training_peak:.2f} of training's; drift "
        f"{record['drift']:.1e}",
    ]
