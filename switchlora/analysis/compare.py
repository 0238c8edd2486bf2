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
from safetensors.torch import load_file
from torch import Tensor

from switchlora.storage import METRICS, SUMMARY, find_all, read

TIMED = {
    *(
        "config",
        "stopwatch",
        "log",
        "seconds",
        *(f"{kind}/seconds" for kind in ("switch", "settle", "restart", "grow", "take_back")),
        "monitor/time_share",
        "time_share",
    ),
    *("train_seconds", "trunk", "reused", "branched_from"),
    *("images_per_second", "images_per_second_quartiles", "train/images_per_second"),
    *("speedup/arithmetic", "speedup/optimizer", "speedup/communication", "predicted_speedup"),
    *("epoch_seconds", "train/epoch_seconds", "peak_memory_bytes", "memory/peak_bytes"),
}


def main() -> None:
    """Compare two runs. Exit with the first difference, if any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs=2)
    if (difference := told(differences(*parser.parse_args().runs))) is not None:
        sys.exit(difference)
    print("bit-equal, but for times and configuration")


def differences(first: Path, second: Path) -> list[str]:
    """Return a line for each difference between two finished runs, except those in times.

    Values are compared bit for bit.
    """
    contents = [content(folder) for folder in (first, second)]
    found = []
    for what in contents[0].keys() | contents[1].keys():
        parts = [dict(leaves(each.get(what, {}))) for each in contents]
        for name in sorted(parts[0].keys() | parts[1].keys()):
            if not all(name in part for part in parts):
                which = first.name if name in parts[0] else second.name
                found.append(f"{what}: only {which} has {name}")
            elif not same(parts[0][name], parts[1][name]):
                found.append(f"{what}: {name} differs{shown(parts[0][name], parts[1][name])}")
    return sorted(found)


def told(found: Sequence[str]) -> str | None:
    """Return one line with the first difference and how many more there are, or None for none."""
    more = f", and {len(found) - 1} more differences" if len(found) > 1 else ""
    return f"{found[0]}{more}" if found else None


def content(folder: Path) -> dict[str, Any]:
    """Return everything of a finished run that is compared, by file."""
    return {
        **{
            str(path.relative_to(folder)): load_file(path)
            for path in folder.rglob("*.safetensors")
        },
        "the last checkpoint": read(find_all(folder)[0]),
        METRICS: {f"line {number:03}": event for number, event in lines_of(folder / METRICS)},
        SUMMARY: {
            key: value
            for key, value in json.loads((folder / SUMMARY).read_text()).items()
            if key != "environment"
        },
        "wandb": {"offline runs": len(list(folder.glob("wandb/offline-run-*")))},
    }


def lines_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the event of each line. A line that is not JSON is given as text."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            yield number, json.loads(line)
        except ValueError:
            yield number, line


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of each leaf of nested dicts and lists, without keys in ``TIMED``."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key not in TIMED:
                yield from leaves(value, f"{path} {key}".strip())
    elif isinstance(tree, list | tuple) and tree:
        for number, value in enumerate(tree):
            yield from leaves(value, f"{path} {number}")
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
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def shown(first: Any, second: Any) -> str:
    """Return two values as text, or nothing for tensors."""
    return "" if isinstance(first, Tensor) else f" ({first} and {second})"
