"""Compare two finished runs bit for bit: ``switchlora-runs compare RUN OTHER``.

These must be the same, except for times, memory and configuration:
- the weights, their average and the adapter,
- the last checkpoint with moments, random generators and history,
- every line of metrics.jsonl,
- the summary.

If they are not, one line names the first difference and the exit status is 1.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import BEFORE, METRICS, SUMMARY, find_all, read, read_record

TIMED = {
    "config",
    "stopwatch",
    "log",
    "seconds",
    "train_seconds",
    "switch/seconds",
    "settle/seconds",
    "restart/seconds",
    "grow/seconds",
    "take_back/seconds",
    "epoch_seconds",
    "train/epoch_seconds",
    "time_share",
    "monitor/time_share",
    "images_per_second",
    "images_per_second_quartiles",
    "train/images_per_second",
    "speedup/arithmetic",
    "speedup/optimizer",
    "speedup/communication",
    "predicted_speedup",
    "peak_memory_bytes",
    "memory/peak_bytes",
    "trunk",
    "reused",
    "branched_from",
}
"""keys that may differ: times, memory, configuration, and what came from a trunk"""


def main() -> None:
    """Compare two runs. Exit with the first difference, if any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs=2)
    first, second = parser.parse_args().runs
    try:
        difference = first_difference(differences(first, second))
    except (*USER_ERRORS, SafetensorError) as error:
        sys.exit(f"compare: {one_line(error)}")
    if difference is not None:
        sys.exit(difference)
    print("bit-equal, but for times and configuration")


def differences(first: Path, second: Path) -> list[str]:
    """Return a line for each difference between two finished runs, except those in times.

    Values are compared bit for bit.
    """
    one = content(first)
    other = content(second)
    found = []
    for what in one.keys() | other.keys():
        if what == BEFORE and not (what in one and what in other):
            continue  # a run that began after the switch has none
        mine = dict(compared_leaves(one.get(what, {})))
        theirs = dict(compared_leaves(other.get(what, {})))
        for name in mine.keys() | theirs.keys():
            if name not in theirs:
                found.append(f"{what}: only {first.name} has {name}")
            elif name not in mine:
                found.append(f"{what}: only {second.name} has {name}")
            elif not same(mine[name], theirs[name]):
                found.append(f"{what}: {name} differs{shown(mine[name], theirs[name])}")
    return sorted(found)


def first_difference(found: Sequence[str]) -> str | None:
    """Return one line with the first difference and how many more there are, or None for none."""
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    return f"{found[0]}, and {len(found) - 1} more differences"


def content(folder: Path) -> dict[str, Any]:
    """Return everything of a finished run that is compared, by file."""
    summary = dict(read_record(folder).summary or {})
    checkpoints = find_all(folder)
    if not summary or not checkpoints:
        raise ValueError(f"{folder} has no {SUMMARY} or no checkpoint: give finished runs")
    summary.pop("environment", None)
    found: dict[str, Any] = {
        "the last checkpoint": read(checkpoints[0]),
        METRICS: lines_of(folder / METRICS),
        SUMMARY: summary,
        "wandb": {"offline runs": len(list(folder.glob("wandb/offline-run-*")))},
    }
    for path in folder.rglob("*.safetensors"):
        found[str(path.relative_to(folder))] = load_file(path)
    return found


def lines_of(path: Path) -> dict[str, Any]:
    """Return the event on each line. A line that is not JSON is given as text."""
    found = {}
    text = path.read_text(errors="backslashreplace")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = line
        found[f"line {number:03}"] = event
    return found


def compared_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of each leaf of nested dicts and lists, without keys in ``TIMED``."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key not in TIMED:
                yield from compared_leaves(value, f"{path} {key}".strip())
    elif isinstance(tree, list | tuple) and tree:
        for number, value in enumerate(tree):
            yield from compared_leaves(value, f"{path} {number}")
    else:
        yield path, tree


def same(first: Any, second: Any) -> bool:
    """Return whether two values have the same type and the same bits."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        alike = first.dtype == second.dtype and first.shape == second.shape
        return alike and torch.equal(bits(first), bits(second))
    return type(first) is type(second) and repr(first) == repr(second)


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor as a flat uint8 tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def shown(first: Any, second: Any) -> str:
    """Return two values as text, or nothing for tensors."""
    return "" if isinstance(first, Tensor) else f" ({first} and {second})"
