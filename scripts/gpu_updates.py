"""Time updates on the device at hand: arms by model, batch, precision, eager and compiled.

``python scripts/gpu_updates.py --out FOLDER --seconds 150`` appends a line to
FOLDER/updates.jsonl for each cell, the most telling first, until the time is over. ``--table``
makes FOLDER/updates.md of what is there, with the speed of full training of the same kind as 1.
``--kernels`` writes which kernels an update launches, and the time that each takes.

The arm 'bare' is a loop of a few lines on tensors in the device's memory. It reads no loss and
writes no file, so it is what a training loop can reach at best.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from switchlora.bench.arms import Cell, base_model, become, bench_recipe, device_of_benchmark
from switchlora.learner import CUDA_GRAPHS, autocast, build_learner, release_memory

VIT = "vit_{}_patch16_224"
BATCHES = {"base": (64, 128), "small": (128, 512), "large": (32, 64)}
ARMS = ("full", "frozen", "adapter", "adapter-B", "peft", "peft-nocast", "bare")
NO_CASTS = "peft-nocast"
"""PEFT without its casts of activations to the type of the factors"""
TIMED = 5
"""measurements of ``EACH`` updates; the median counts"""
EACH = 6
WARM_UP = 3
FORKS = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Asked:
    """One cell of the table."""

    model: str
    batch: int
    arm: str
    precision: str
    """fp32, tf32 or bf16"""
    compiled: bool
    graphs: bool = False
    """whether compiled code is launched as CUDA graphs: full.compile=graphs"""


def cells(models: Sequence[str]) -> Iterator[Asked]:
    """Yield the cells, the most telling first."""
    for number in range(2):
        for model in models:
            for compiled in (False, True):
                for arm in ARMS:
                    batch = BATCHES[model][number]
                    yield Asked(VIT.format(model), batch, arm, "bf16", compiled)
            for arm in ("full", "frozen", "adapter"):
                yield Asked(VIT.format(model), BATCHES[model][number], arm, "bf16", True, True)
        for precision in ("tf32", "fp32"):
            for arm in ("full", "adapter"):
                batch = BATCHES[models[0]][number]
                yield Asked(VIT.format(models[0]), batch, arm, precision, False)


def small_cells() -> Iterator[Asked]:
    """Yield a few cells that a CPU times in seconds."""
    for arm in ARMS:
        yield Asked(VIT.format("tiny"), 4, arm, "bf16", False)
    yield Asked(VIT.format("tiny"), 4, "full", "tf32", False)


def measure(asked: Asked, small: bool) -> dict[str, float]:
    """Return milliseconds of an update, the peak of memory and the seconds until it runs."""
    torch.set_float32_matmul_precision("high" if asked.precision == "tf32" else "highest")
    device = device_of_benchmark()
    begun = time.perf_counter()
    update = make_update(asked, small)
    for _ in range(1 if small else WARM_UP):
        update()
    wait_for(device)
    ready = time.perf_counter() - begun
    times = []
    for _ in range(1 if small else TIMED):
        times.append(seconds_of(update, device, 1 if small else EACH))
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0
    milliseconds = [1000 * each for each in times]
    return {
        "ms": round(median(milliseconds), 2),
        "ms_least": round(min(milliseconds), 2),
        "ms_largest": round(max(milliseconds), 2),
        "peak_mib": round(peak),
        "seconds_to_start": round(ready, 1),
    }


def seconds_of(update, device: torch.device, number: int) -> float:
    """Return the seconds of one update, from a ``number`` that are launched without waiting."""
    begin = time.perf_counter()
    for _ in range(number):
        update()
    wait_for(device)
    return (time.perf_counter() - begin) / number


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_update(asked: Asked, small: bool):
    """Return the function that makes one update of a cell."""
    device = device_of_benchmark()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    precision = "fp32" if asked.precision == "tf32" else asked.precision
    options = {"depth": 1} if small else {}
    size = 32 if small else 224
    cell = Cell(asked.model, precision, 16, asked.batch, image_size=size, options=options)
    model = base_model(cell)
    become({"bare": "full", NO_CASTS: "peft"}.get(asked.arm, asked.arm), model, cell)
    images = torch.randn(asked.batch, 3, size, size).to(device)
    labels = torch.randint(1000, (asked.batch,)).to(device)
    if asked.arm == "bare":
        return bare_update(model, images, labels, precision, asked.compiled)
    compiling = CUDA_GRAPHS if asked.graphs else asked.compiled
    recipe = replace(bench_recipe(cell), compile=compiling)
    learner = build_learner(model, recipe, 10_000)
    loss = nn.CrossEntropyLoss()
    counter = iter(range(10_000))

    def update() -> None:
        with without_casts(model) if asked.arm == NO_CASTS else nullcontext():
            learner.update(images, labels, loss, next(counter))

    return update


def without_casts(model: nn.Module):
    """Return PEFT's context in which its layers leave the type of activations alone."""
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)


def bare_update(model, images, labels, precision: str, compiled: bool):
    """Return an update of a loop that does nothing but train."""
    fused = images.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=fused)
    forward = torch.compile(model) if compiled else model
    loss_of = nn.CrossEntropyLoss()

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device.type, precision):
            loss = loss_of(forward(images), labels)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return update


def kernels_of(asked: Asked) -> str:
    """Return a table of what the device does in an update, the longest kernels first."""
    update = make_update(asked, small=False)
    for _ in range(WARM_UP):
        update()
    device = device_of_benchmark()
    wait_for(device)
    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=both) as profiler:
        update()
        wait_for(device)
    return profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=40)


def write_kernels(folder: Path, model: str) -> None:
    """Write FOLDER/kernels_ARM_eager.txt and FOLDER/kernels_ARM_compiled.txt."""
    for compiled in (False, True):
        for arm in ("full", "frozen", "adapter"):
            asked = Asked(VIT.format(model), BATCHES[model][1], arm, "bf16", compiled)
            how = "compiled" if compiled else "eager"
            (folder / f"kernels_{arm}_{how}.txt").write_text(kernels_of(asked))
            torch.compiler.reset()
            release_memory(device_of_benchmark())


def table(folder: Path) -> str:
    """Return the cells in Markdown."""
    rows = [json.loads(line) for line in (folder / "updates.jsonl").read_text().splitlines()]
    full = {}
    for row in rows:
        if row["arm"] == "full" and "ms" in row:
            full[kind_of(row)] = row["ms"]
    lines = [
        "| model | images | precision | | arm | ms | speed of full training | peak, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        whole = full.get(kind_of(row))
        speed = f"{whole / row['ms']:.2f}" if whole and "ms" in row else ""
        how = "graphs" if row.get("graphs") else "compiled" if row["compiled"] else "eager"
        place = f"| {row['model']} | {row['batch']} | {row['precision']} | {how} | {row['arm']} "
        found = row.get("ms", row.get("failed"))
        lines.append(f"{place}| {found} | {speed} | {row.get('peak_mib', '')} |")
    return "\n".join([*lines, *training_lines(folder / "training", rows)]) + "\n"


def training_lines(folder: Path, rows: Sequence[dict]) -> list[str]:
    """Return what the training run beside the table says of the loop and of the monitor."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError:
        return []
    share = summary["monitor"]["time_share"]
    lines = ["", f"The monitor took {share:.2%} of the time of training."]
    for row in rows:
        if kind_of(row)[:4] == (VIT.format("small"), 128, "bf16", False) and row["arm"] == "bare":
            speed = (
                summary["phases"]["full"]["images_per_second"] * row["ms"] / 1000 / row["batch"]
            )
            lines.append(f"The run's full phase has {speed:.2f} of the bare loop's speed.")
    return lines


def kind_of(row: dict) -> tuple:
    """Return what the arms of one comparison share."""
    return *(row[key] for key in ("model", "batch", "precision", "compiled")), row.get("graphs")


def measured(asked: Asked, small: bool) -> dict:
    """Return a cell's numbers, or why there are none."""
    try:
        found = measure(asked, small)
        torch.compiler.reset()
        release_memory(device_of_benchmark())
        return found
    except Exception as error:
        return {"failed": str(error).splitlines()[0][:200] if str(error) else type(error).__name__}


def measure_all(options: argparse.Namespace) -> None:
    """Measure cells until the time is over. Each is written as soon as it is known.

    A process of its own measures them, since CUDA does nothing more in one that has met an illegal
    access. A new one begins behind each cell that failed.
    """
    end = time.monotonic() + options.seconds
    todo = list(small_cells() if options.small else cells(options.models))
    if options.only:
        todo = [asked for asked in todo if asked.compiled == (options.only == "compiled")]
    path = options.out / "updates.jsonl"
    path.touch()
    before = number_of_lines(path)
    while (left := todo[number_of_lines(path) - before :]) and time.monotonic() < end:
        worker = FORKS.Process(target=measure_some, args=(left, options.small, end, path))
        worker.start()
        worker.join()
        done = number_of_lines(path) - before
        if worker.exitcode and done < len(todo):
            why = {"failed": f"its process ended with status {worker.exitcode}"}
            write_cell(todo[done], why, path)
    for asked in left[:1]:
        print(f"time is over before {asked}", flush=True)


def measure_some(asked_for: Sequence[Asked], small: bool, end: float, path: Path) -> None:
    """Measure cells until one fails, or until the time is over."""
    for asked in asked_for:
        if time.monotonic() > end:
            return
        found = measured(asked, small)
        write_cell(asked, found, path)
        if "failed" in found:
            return


def write_cell(asked: Asked, found: dict, path: Path) -> None:
    """Append a cell to a file, and print it."""
    line = json.dumps({**asdict(asked), **found})
    print(line, flush=True)
    with path.open("a") as file:
        print(line, file=file)


def number_of_lines(path: Path) -> int:
    """Return how many cells are written."""
    return len(path.read_text().splitlines())


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--models", nargs="+", default=["base", "small", "large"])
    parser.add_argument("--only", choices=["eager", "compiled"])
    parser.add_argument("--small", action="store_true", help="a tiny model, for a CPU")
    parser.add_argument("--kernels", action="store_true", help="only write the kernels")
    parser.add_argument("--table", action="store_true", help="only make the table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.kernels:
        write_kernels(options.out, options.models[0])
        return
    if not options.table:
        measure_all(options)
    (options.out / "updates.md").write_text(table(options.out))


if __name__ == "__main__":
    main()
