"""Time one training update of full training, adapters, PEFT and the frozen limit side by side.

Example: ``switchlora-bench update --model vit_small_patch16_224 --rank 16 64 --memory
--out FOLDER``.

The benchmark runs rounds for each combination of model, precision and rank (a cell). In a round
every arm makes one update, in an order that is shuffled each time. Other load on the machine then
slows all arms alike. Peak memory is measured in a fresh process for each arm. Under torchrun the
arms train with DDP, and ``--batch`` counts the images of all processes together. The results of
each cell are added to bench.json, bench.md and bench.png in FOLDER as soon as the cell is done.
"""

import argparse
import copy
import signal
import sys
from ast import literal_eval
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from switchlora.adapters import DEFAULT_TARGETS, count_parameters, find_targets
from switchlora.analysis.output import add_formats, save
from switchlora.bench.arms import (
    ARMS,
    ON_DEMAND,
    RESIDUAL_DTYPES,
    Arm,
    Cell,
    base_model,
    class_count,
    device_of_benchmark,
    images_shape,
    make_arm,
)
from switchlora.bench.memory import peak_in_fresh_process, refuse_full_memory, refuse_used_gpu
from switchlora.bench.picture import PICTURE, draw
from switchlora.bench.report import Result, against_lines, append, arm_line, earlier_cell, tables
from switchlora.bench.rounds import common_conditions, conditions_of, timed_rounds
from switchlora.cost import (
    Machine,
    Prediction,
    Trace,
    break_even_rank,
    measure_machine,
    predict,
    speedup_parts,
    trace_update,
)
from switchlora.errors import OtherRankFailed, check_range
from switchlora.learner import PRECISIONS, release_memory
from switchlora.models import eval_mode
from switchlora.names import family
from switchlora.process import distributed
from switchlora.storage import environment, output_folder

Shape = tuple[int, int, int]


def main() -> None:
    """Measure what the command line asks for. Exit with one line on a mistake in it."""
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is written
    distributed.join()
    try:
        bench(options)
    except (ValueError, torch.OutOfMemoryError) as error:
        why = str(error).splitlines()[0]
        sys.exit(f"bench: {why}" if distributed.is_primary() else 1)
    except OtherRankFailed:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("bench: interrupted; whole rounds and finished arms are kept")
    finally:
        distributed.leave()


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", nargs="+", action="extend", help="timm names; vit_small_patch16_224")
    add("--model-option", nargs="+", default=[], metavar="KEY=VALUE", help="depth=2 and such")
    add("--batch", type=int, default=16, help="images of one update, over all processes")
    add("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    add("--rank", type=int, nargs="+", default=[16])
    add("--arms", nargs="+", default=ARMS, metavar="ARM", help=", ".join([*ARMS, *ON_DEMAND]))
    add("--rounds", type=int, default=8)
    add("--warmup", type=int, default=2, help="rounds before those that count")
    add("--accumulation", type=int, default=1)
    add("--residual-dtype", default="none", choices=RESIDUAL_DTYPES, help="of frozen weights")
    add("--threads", type=int, help="of each process; torch's choice by default")
    add("--image-size", type=int, default=224)
    add("--memory", action="store_true", help="measure peak memory too")
    add("--no-time", action="store_true", help="do not measure times")
    add("--fit", type=float, metavar="GIB", help="the largest batch that full training fits there")
    add("--out", type=output_folder, default=Path("runs/bench"))
    add("--against", type=Path, help="bench.json of an earlier run to compare with")
    add_formats(parser)
    options = parser.parse_args(words)
    options.model = options.model or ["vit_small_patch16_224"]
    return options


def bench(options: argparse.Namespace) -> None:
    """Measure one cell after the other.

    What a cell has measured is written even when it ends with an error or an interrupt.
    """
    check_range("--rounds", options.rounds, 1)
    if options.fit is not None:
        check_range("--fit", options.fit, 0.01)
    if options.threads is not None:
        check_range("--threads", options.threads, 1)
        torch.set_num_threads(options.threads)
    device = device_of_benchmark()
    if options.memory and device.type == "cuda":
        distributed.from_primary(lambda: refuse_used_gpu(device))
    for cell in cells_of(options):
        result: Result = {"arms": {}}
        try:
            measure(cell, options, result)
        finally:
            if distributed.is_primary() and worth_keeping(result, options):
                keep(result, options.out, options.formats)
        release_memory(device)


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Return the checked cells that the options ask for."""
    cells = []
    for model, precision, rank in product(options.model, options.precision, options.rank):
        cell = Cell(
            model=model,
            precision=precision,
            rank=rank,
            batch=options.batch,
            accumulation=options.accumulation,
            image_size=options.image_size,
            residual_dtype=options.residual_dtype,
            options=model_options(options.model_option),
        )
        cells.append(cell)
    return cells


def model_options(words: Sequence[str]) -> dict[str, Any]:
    """Parse options of a model from words such as 'depth=2'."""
    found = {}
    for word in words:
        key, _, value = word.partition("=")
        if not value:
            raise ValueError(f"--model-option '{word}' is no KEY=VALUE, such as depth=2")
        try:
            found[key] = literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def measure(cell: Cell, options: argparse.Namespace, result: Result) -> None:
    """Fill ``result`` with what the options ask for.

    When this is stopped, ``result`` holds everything measured so far.
    """
    base = base_model(cell)
    if options.fit is not None:
        cell = replace(cell, batch=largest_batch(cell, base, options.fit))
    say(f"{cell}: batch {cell.batch}")
    traces = describe(cell, options.arms, base, result)
    earlier = None
    if options.against:
        earlier = earlier_cell(options.against, result["conditions"])
    foresee(cell, traces, base, result)
    if options.memory:
        measure_memory(cell, traces, result)
    if not options.no_time:
        measure_times(cell, options, base, result)
    if earlier is not None:
        result["against"] = against_lines(result, earlier)


def describe(
    cell: Cell,
    names: Sequence[str],
    base: nn.Module,
    result: Result,
) -> dict[str, Trace]:
    """Write each arm's conditions and parameter counts into ``result``; return traces by arm."""
    conditions = {}
    traces = {}
    for name in names:
        arm = make_arm(name, copy.deepcopy(base), cell)
        conditions[name] = conditions_of(arm)
        traces[name] = trace_of(arm, cell)
        result["arms"][name] = {
            "trained": count_parameters(arm.model, trainable=True),
            "notes": arm.notes,
        }
    where: dict[str, Any] = environment(device_of_benchmark(), seed=0)
    where["versions"]["peft"] = version_of("peft")
    result["environment"] = where
    result["conditions"] = {
        "model": cell.model,
        "rank": cell.rank,
        "image_size": cell.image_size,
        **asdict(common_conditions(conditions)),
        "residual_dtype": cell.residual_dtype,
        "model_options": dict(cell.options),
        "device": where["device"],
        "threads": where["threads"],
        "processes": distributed.world_size(),
    }
    return traces


def trace_of(arm: Arm, cell: Cell) -> Trace:
    """Trace one update of ``arm`` on a batch of ``cell``."""
    recipe = arm.learner.recipe
    return trace_update(arm.model, recipe, images_shape(cell), class_count(arm.model))


def foresee(cell: Cell, traces: Mapping[str, Trace], base: nn.Module, result: Result) -> None:
    """Measure the machine and write the predictions by arm and by layer into ``result``."""
    say(f"measuring the machine in {cell.precision}, if it is not yet known")
    machine = measure_machine(device_of_benchmark(), cell.precision)
    result["machine"] = asdict(machine)
    predictions = {}
    for name, trace in traces.items():
        predictions[name] = predict(trace, machine, distributed.world_size())
        result["arms"][name]["predicted"] = plain(predictions[name], trace)
    if "full" in predictions and "adapter" in predictions:
        result["speedup"] = speedup_parts(predictions["full"], predictions["adapter"])
        result["layers"] = layers_of(base, cell, machine, predictions)


def largest_batch(cell: Cell, base: nn.Module, gib: float) -> int:
    """Return the largest batch for which full training is predicted to need at most ``gib`` GiB.

    Raise ValueError when not even the smallest batch fits.
    """
    step = cell.accumulation * distributed.world_size()
    arm = make_arm("full", copy.deepcopy(base), replace(cell, batch=step))

    def peak(steps: int) -> int:
        return predicted_peak(trace_of(arm, replace(cell, batch=steps * step)))

    steps = bisect_right(range(1, 4096), gib * 2**30, key=peak)
    if not steps:
        raise ValueError(f"--fit {gib:g}: not even a batch of {step} fits there")
    return steps * step


def plain(prediction: Prediction, trace: Trace) -> dict[str, float]:
    """Return the predicted seconds and bytes as bench.json stores them."""
    return {
        "forward": prediction.forward,
        "backward": prediction.backward,
        "optimizer": prediction.optimizer,
        "communication": prediction.communication,
        "total": prediction.total,
        "peak_bytes": predicted_peak(trace),
        **trace.memory,
    }


def predicted_peak(trace: Trace) -> int:
    """Return the predicted peak in bytes.

    With several ranks, DDP's buckets keep the gradients from one update to the next. The peak is
    then at least the sum of all parts of ``trace.memory``.
    """
    if distributed.world_size() == 1:
        return trace.peak_bytes
    return max(trace.peak_bytes, sum(trace.memory.values()))


def layers_of(
    base: nn.Module,
    cell: Cell,
    machine: Machine,
    predictions: Mapping[str, Prediction],
) -> list[dict[str, Any]]:
    """Return one entry per family of targets of one shape.

    It holds the shape (tokens, in, out), the predicted seconds in each arm, and the break-even
    ranks with A and B trained and with B alone.
    """
    tokens = tokens_of(base, cell)
    groups: dict[tuple[str, Shape], list[str]] = {}
    for name in find_targets(base, DEFAULT_TARGETS):
        linear = base.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shape = (tokens[name], linear.in_features, linear.out_features)
        groups.setdefault((family(name), shape), []).append(name)
    layers = []
    for (shared, shape), names in groups.items():
        layer = {
            "family": shared,
            "shape": shape,
            "seconds": seconds_of_modules(names, predictions),
            "break_even_ranks": break_even_ranks(shape, cell.precision, machine),
        }
        layers.append(layer)
    return layers


def seconds_of_modules(
    names: Sequence[str], predictions: Mapping[str, Prediction]
) -> dict[str, float]:
    """Return, by arm, the predicted seconds of the modules ``names`` together."""
    found = {}
    for arm in ("full", "adapter", "adapter-B"):
        if arm in predictions:
            modules = predictions[arm].modules
            found[arm] = sum(modules.get(name, 0.0) for name in names)
    return found


def break_even_ranks(shape: Shape, precision: str, machine: Machine) -> list[int]:
    """Return the break-even ranks with A and B trained, and with B alone."""
    dtype = PRECISIONS[precision] or torch.float32
    ranks = distributed.world_size()
    both = break_even_rank(*shape, dtype.itemsize, machine, ("A", "B"), ranks)
    alone = break_even_rank(*shape, dtype.itemsize, machine, ("B",), ranks)
    return [both, alone]


@torch.no_grad()
def tokens_of(base: nn.Module, cell: Cell) -> dict[str, int]:
    """Return, by name of a linear, the number of tokens that it sees in one micro-batch."""
    images = cell.share // cell.accumulation
    tokens: dict[str, int] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens[name] = images * inputs[0].shape[:-1].numel()

    hooks = []
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(partial(note, name)))
    with eval_mode(base):
        base(torch.zeros(1, *images_shape(cell)[1:], device=device_of_benchmark()))
    for hook in hooks:
        hook.remove()
    return tokens


def measure_memory(cell: Cell, traces: Mapping[str, Trace], result: Result) -> None:
    """Measure the peak memory of each arm in fresh processes, and write it into ``result``."""

    def peak(name: str) -> int:
        if device_of_benchmark().type == "cpu":
            refuse_full_memory(name, predicted_peak(traces[name]))
        return peak_in_fresh_process(name, cell)

    for name in progress(traces, f"{cell} memory"):
        result["arms"][name]["peak_bytes"] = distributed.from_primary(partial(peak, name))
        say(f"  {arm_line(result, name)}")


def measure_times(
    cell: Cell,
    options: argparse.Namespace,
    base: nn.Module,
    result: Result,
) -> None:
    """Time each arm in each round, and write the seconds into ``result``."""
    arms = [make_arm(name, copy.deepcopy(base), cell) for name in options.arms]
    for laps in timed_rounds(arms, options.rounds, options.warmup, str(cell)):
        for name, lap in laps.items():
            seconds = result["arms"][name].setdefault("seconds", {})
            for part, value in lap.items():
                seconds.setdefault(part, []).append(value)
    for name in options.arms:
        say(f"  {arm_line(result, name)}")


def worth_keeping(result: Result, options: argparse.Namespace) -> bool:
    """Return whether an arm has a time or a peak, or a prediction if neither was asked for."""
    wanted = {"predicted"}
    if options.memory or not options.no_time:
        wanted = {"seconds", "peak_bytes"}
    return any(wanted & set(arm) for arm in result["arms"].values())


def keep(result: Result, folder: Path, formats: Sequence[str]) -> None:
    """Add the result to those in ``folder``, redraw the picture, and print the new result."""
    picture = draw(append(folder, result))
    if picture is not None:
        save(picture, folder, PICTURE, formats)
    paragraphs = [*tables(result), *result.get("against", []), f"written to {folder}", ""]
    say("\n\n".join(paragraphs))


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def progress(things: Iterable[str], label: str) -> Iterable[str]:
    """Return ``things`` with a progress bar on the primary rank."""
    return tqdm(list(things), desc=label, leave=False, disable=not distributed.is_primary())


def say(line: str) -> None:
    """Print a line from the primary rank, above any progress bar."""
    if distributed.is_primary():
        tqdm.write(line)
