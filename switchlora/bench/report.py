"""Format the results of the benchmark: ratios, tables, bench.json and bench.md."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from switchlora.analysis.formats import markdown
from switchlora.bench.arms import UPDATES_FOR_PEAK
from switchlora.bench.memory import MIB
from switchlora.bench.rounds import refuse_difference

IMAGENET_IMAGES = 1_281_167
PRELORA_SPEEDUP = 3.0  # reported for ViT-Large (arXiv 2509.21619)
RESULTS, TABLES = "bench.json", "bench.md"
PARTS = ("forward", "backward", "optimizer")
MEASURED = (
    f"Peak memory: fresh processes, {UPDATES_FOR_PEAK} updates; allocated on a GPU, on a CPU "
    "resident beyond what torch itself takes, with glibc told to return what is freed "
    "(MALLOC_MMAP_THRESHOLD_=65536)."
)
REFERENCES = {
    "full": "vs full",
    "frozen": "of the limit",
    "peft": "vs PEFT",
    "adapter": "vs adapter",
}
Result = dict[str, Any]  # the results of one cell, as bench.json stores them


@dataclass(frozen=True)
class Ratio:
    """Speed relative to a reference: the ratio of medians, and quartiles of each round's ratio."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


def paired_ratio(reference: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """Return the speed of updates that took ``seconds``, relative to those of ``reference``.

    Both lists hold one entry per round.
    """
    value = median(reference) / median(seconds)
    ratios = [slow / fast for slow, fast in zip(reference, seconds, strict=True)]
    if len(ratios) == 1:
        return Ratio(value, ratios[0], ratios[0])
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return Ratio(value, low, high)


def ratio_to(result: Result, reference: str, name: str) -> Ratio | None:
    """Return the speed of an arm relative to another arm of its cell.

    Return None when either was not timed.
    """
    slow = times(result, reference)
    fast = times(result, name)
    return paired_ratio(slow, fast) if slow and fast else None


def times(result: Result, name: str, part: str = "total") -> list[float]:
    """Return the seconds of one arm by round; an empty list when it was not timed."""
    return result["arms"].get(name, {}).get("seconds", {}).get(part, [])


def predicted_ratio(result: Result, name: str) -> float | None:
    """Return the predicted speed of an arm relative to full training, or None if unknown."""
    full = result["arms"].get("full", {}).get("predicted")
    arm = result["arms"].get(name, {}).get("predicted")
    return full["total"] / arm["total"] if full and arm else None


def append(folder: Path, result: Result) -> list[Result]:
    """Add the result of a cell to those in ``folder``, rewrite the tables, return all results."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [*read(folder / RESULTS), result]
    _replace(folder / RESULTS, json.dumps({"cells": results}, indent=1) + "\n")
    sections = ["# Benchmark", *map(section, results)]
    _replace(folder / TABLES, "\n\n".join(sections) + "\n")
    return results


def read(path: Path) -> list[Result]:
    """Return the cells of a results file; an empty list when there is no file."""
    return json.loads(path.read_text())["cells"] if path.exists() else []


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def earlier_cell(path: Path, conditions: Mapping[str, Any]) -> Result:
    """Return the last cell of an earlier results file that has these ``conditions``.

    When there is none, raise ValueError with the first difference from the nearest cell.
    """
    cells = read(path)
    if not cells:
        raise ValueError(f"--against {path} holds no results: give the bench.json of a run")
    nearest = max(reversed(cells), key=partial(_alike, conditions))
    refuse_difference({"this run": conditions, path.name: nearest["conditions"]})
    return nearest


def _alike(conditions: Mapping[str, Any], cell: Result) -> int:
    """Count the ``conditions`` that ``cell`` shares."""
    return sum(cell["conditions"].get(key) == value for key, value in conditions.items())


def against_lines(result: Result, earlier: Result) -> list[str]:
    """Return a line per arm: its speed relative to an ``earlier`` cell of the same conditions."""
    git = earlier["environment"]["git"]
    lines = []
    for name in result["arms"]:
        before, now = times(earlier, name), times(result, name)
        if before and now:
            lines.append(
                f"{name}: {median(before) / median(now):.2f}x the speed it had at {git}, in "
                "another process: the machine's own drift is in it"
            )
    return lines


def arm_line(result: Result, name: str) -> str:
    """Return one line about an arm of a cell, for the terminal."""
    arm = result["arms"][name]
    parts = []
    if times(result, name):
        shown = ", ".join(f"{part} {_median_milliseconds(result, name, part)}" for part in PARTS)
        parts.append(f"{_median_milliseconds(result, name, 'total')} ms an update ({shown})")
    if "peak_bytes" in arm:
        parts.append(f"peak {_mebibytes(arm['peak_bytes'])} MiB")
    return f"{name}: {', '.join(parts)}"


def section(result: Result) -> str:
    """Return one cell as Markdown: conditions, tables, remarks, and the environment."""
    c = result["conditions"]
    residual = c["residual_dtype"].replace("none", "float32")
    head = (
        f"## {c['model']}, {c['precision']}, rank {c['rank']}\n\n"
        f"Batch {c['batch']} over {c['processes']} process(es) in {c['accumulation']} "
        f"micro-batch(es), {c['image_size']} pixels, dropout {c['dropout']}, frozen weights in "
        f"{residual}; model options {c['model_options']}."
    )
    remarks = [*_remarks(result), _provenance(result["environment"])]
    listed = "\n".join(f"- {remark}" for remark in remarks)
    return "\n\n".join([head, *tables(result), listed])


def _remarks(result: Result) -> list[str]:
    """Return the notes of the arms, how peaks were measured, and the comparison with earlier."""
    remarks = []
    for name, arm in result["arms"].items():
        for note in arm["notes"]:
            remarks.append(f"{name}: {note}")
    if any("peak_bytes" in arm for arm in result["arms"].values()):
        remarks.append(MEASURED)
    return remarks + result.get("against", [])


def _provenance(environment: Mapping[str, Any]) -> str:
    versions = environment["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "peft"))
    return (
        f"{environment['device']}, {environment['threads']} thread(s), Python "
        f"{environment['python']}, {packages}, commit {environment['git']}: "
        f"`{environment['command']}`"
    )


def tables(result: Result) -> list[str]:
    """Return the tables of a cell: speed if it was timed, cost, and the predictions by layer."""
    found = []
    if any(times(result, name) for name in result["arms"]):
        found.append(speed_table(result))
    found.append(cost_table(result))
    if "layers" in result:
        found.append(layer_table(result))
        found.append(speedup_line(result))
    return found


def layer_table(result: Result) -> str:
    """Return a table of the predicted seconds and the break-even ranks of each family of linears.

    Up to its break-even rank an adapter is predicted to save time.
    """
    arms = result["layers"][0]["seconds"]
    predicted = [f"{arm} ms, predicted" for arm in arms]
    head = ["layers", "tokens, in, out", *predicted, "break-even rank", "break-even rank, B alone"]
    rows = [head]
    for layer in result["layers"]:
        shape = ", ".join(map(str, layer["shape"]))
        seconds = map(_milliseconds, layer["seconds"].values())
        ranks = map(str, layer["break_even_ranks"])
        rows.append([layer["family"], shape, *seconds, *ranks])
    return markdown(rows)


def speedup_line(result: Result) -> str:
    """Return a line with the predicted speed-up of the adapter and its factors.

    With several processes the line adds the bandwidth needed for ``PRELORA_SPEEDUP``.
    """
    speedup = result["speedup"]
    whole = prod(speedup.values())
    parts = " x ".join(f"{name} {ratio:.2f}" for name, ratio in speedup.items())
    line = f"Predicted speed of the adapter's update: {whole:.2f} = {parts}"
    if result["conditions"]["processes"] == 1:
        return line
    here = result["machine"]["all_reduce"]
    arms = result["arms"]
    wanted = bandwidth_for(PRELORA_SPEEDUP, arms["full"], arms["adapter"], here)
    return (
        f"{line}. Gradients are averaged at {here / 1e6:,.0f} MB/s here; at "
        f"{wanted / 1e6:,.0f} MB/s the adapter would be {PRELORA_SPEEDUP:g} times as fast."
    )


def bandwidth_for(
    speedup: float,
    full: Mapping[str, Any],
    adapter: Mapping[str, Any],
    all_reduce: float,
) -> float:
    """Return the bytes/s of the exchange at which ``adapter`` is ``speedup`` times as fast.

    Each arm takes c seconds without the exchange and exchanges n bytes. The bandwidth x solves
    (c_f + n_f / x) = s (c_a + n_a / x), so x = (n_f - s n_a) / (s c_a - c_f). ``all_reduce`` is
    the bandwidth, in bytes/s, that the predictions used. Return inf when the adapter is predicted
    that fast without any exchange.
    """
    full_seconds, full_bytes = _without_exchange(full["predicted"], all_reduce)
    adapter_seconds, adapter_bytes = _without_exchange(adapter["predicted"], all_reduce)
    missing = speedup * adapter_seconds - full_seconds
    if missing <= 0:
        return inf
    return (full_bytes - speedup * adapter_bytes) / missing


def _without_exchange(predicted: Mapping[str, float], all_reduce: float) -> tuple[float, float]:
    """Return the seconds of an update without its exchange, and the bytes that it exchanges."""
    exchange = predicted["communication"]
    return predicted["total"] - exchange, exchange * all_reduce


def speed_table(result: Result) -> str:
    """Return a table of throughput, speed ratios with quartiles, and the parts of an update.

    Throughput is a median over the rounds. Parts are medians over rounds of their own, in which
    each part waits for the device.
    """
    rounds = max(len(times(result, name)) for name in result["arms"])
    parts = [f"{part} ms" for part in PARTS]
    epoch = f"s per ImageNet-1k epoch ({rounds} rounds)"
    rows = [["arm", "images/s", *REFERENCES.values(), *parts, epoch]]
    for name in result["arms"]:
        if times(result, name):
            rows.append(_speed_row(result, name))
    return markdown(rows)


def _speed_row(result: Result, name: str) -> list[str]:
    speed = result["conditions"]["batch"] / median(times(result, name))
    row = [name, f"{speed:.1f}"]
    for reference in REFERENCES:
        ratio = ratio_to(result, reference, name)
        row.append("-" if ratio is None else str(ratio))
    for part in PARTS:
        row.append(_median_milliseconds(result, name, part))
    row.append(f"{IMAGENET_IMAGES / speed:,.0f}")
    return row


def cost_table(result: Result) -> str:
    """Return a table of trained parameters and peak memory, with the cost model's predictions.

    The deviation of a prediction from the measurement stands beside it.
    """
    head = ["arm", "trained parameters", "peak MiB", "of full", "predicted MiB", "predicted speed"]
    rows = [head]
    for name in result["arms"]:
        rows.append(_cost_row(result, name))
    return markdown(rows)


def _cost_row(result: Result, name: str) -> list[str]:
    arm = result["arms"][name]
    peak = arm.get("peak_bytes")
    full_peak = result["arms"].get("full", {}).get("peak_bytes")
    predicted_peak = arm.get("predicted", {}).get("peak_bytes")
    ratio = ratio_to(result, "full", name)
    speed = None if ratio is None else ratio.value
    return [
        name,
        f"{arm['trained']:,}",
        _mebibytes(peak) if peak else "-",
        f"{100 * peak / full_peak:.0f} %" if peak and full_peak else "-",
        _beside(predicted_peak, peak, _mebibytes),
        _beside(predicted_ratio(result, name), speed, "{:.2f}".format),
    ]


def _beside(predicted: float | None, measured: float | None, form: Any) -> str:
    """Return a prediction with its deviation from the measurement in %."""
    if predicted is None:
        return "-"
    if not measured:
        return form(predicted)
    return f"{form(predicted)} ({100 * (predicted / measured - 1):+.0f} %)"


def _median_milliseconds(result: Result, name: str, part: str) -> str:
    seconds = times(result, name, part)
    return _milliseconds(median(seconds)) if seconds else "-"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _mebibytes(size: float) -> str:
    return f"{size / MIB:,.0f}" if size >= 100 * MIB else f"{size / MIB:.1f}"
