"""Format the results of the benchmark: ratios, tables, bench.json and bench.md."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from switchlora.analysis.formats import markdown
from switchlora.bench.arms import UPDATES_FOR_PEAK, refuse_difference

IMAGENET_IMAGES = 1_281_167
MIB = 2**20
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
    rounds = [slow / fast for slow, fast in zip(reference, seconds, strict=True)]
    low, _, high = quantiles(rounds, n=4, method="inclusive") if rounds[1:] else rounds * 3
    return Ratio(median(reference) / median(seconds), low, high)


def ratio_to(result: Result, reference: str, name: str) -> Ratio | None:
    """Return the speed of an arm relative to another arm of its cell.

    Return None when either was not timed.
    """
    slow, fast = times(result, reference), times(result, name)
    return paired_ratio(slow, fast) if slow and fast else None


def times(result: Result, name: str, part: str = "total") -> list[float]:
    """Return the seconds of one arm by round; an empty list when it was not timed."""
    return result["arms"].get(name, {}).get("seconds", {}).get(part, [])


def predicted_ratio(result: Result, name: str) -> float | None:
    """Return the predicted speed of an arm relative to full training, or None if unknown."""
    full, arm = (result["arms"].get(each, {}).get("predicted") for each in ("full", name))
    return full["total"] / arm["total"] if full and arm else None


def append(folder: Path, result: Result) -> list[Result]:
    """Add the result of a cell to those in ``folder``, rewrite the tables, return all results."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [*read(folder / RESULTS), result]
    _replace(folder / RESULTS, json.dumps({"cells": results}, indent=1) + "\n")
    _replace(folder / TABLES, "\n\n".join(["# Benchmark", *map(section, results)]) + "\n")
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
    alike = [sum(c["conditions"].get(k) == v for k, v in conditions.items()) for c in cells]
    nearest = max(range(len(cells)), key=lambda number: (alike[number], number))
    refuse_difference({"this run": conditions, path.name: cells[nearest]["conditions"]})
    return cells[nearest]


def against_lines(result: Result, earlier: Result) -> list[str]:
    """Return a line per arm: its speed relative to an ``earlier`` cell of the same conditions."""
    git = earlier["environment"]["git"]
    return [
        f"{name}: {median(times(earlier, name)) / median(times(result, name)):.2f}x the speed it "
        f"had at {git}, in another process: the machine's own drift is in it"
        for name in result["arms"]
        if times(earlier, name) and times(result, name)
    ]


def arm_line(result: Result, name: str) -> str:
    """Return one line about an arm of a cell, for the terminal."""
    arm, parts = result["arms"][name], []
    if times(result, name):
        shown = ", ".join(f"{part} {_milliseconds(result, name, part)}" for part in PARTS)
        parts.append(f"{_milliseconds(result, name, 'total')} ms an update ({shown})")
    if "peak_bytes" in arm:
        parts.append(f"peak {_mebibytes(arm['peak_bytes'])} MiB")
    return f"{name}: {', '.join(parts)}"


def section(result: Result) -> str:
    """Return one cell as Markdown: conditions, tables, remarks, and the environment."""
    c, environment = result["conditions"], result["environment"]
    notes = [f"{name}: {note}" for name, arm in result["arms"].items() for note in arm["notes"]]
    head = (
        f"## {c['model']}, {c['precision']}, rank {c['rank']}\n\n"
        f"Batch {c['batch']} over {c['processes']} process(es) in {c['accumulation']} "
        f"micro-batch(es), {c['image_size']} pixels, dropout {c['dropout']}, frozen weights in "
        f"{c['residual_dtype'].replace('none', 'float32')}; model options {c['model_options']}."
    )
    if any("peak_bytes" in arm for arm in result["arms"].values()):
        notes.append(MEASURED)
    lines = [*notes, *result.get("against", []), _provenance(environment)]
    return "\n\n".join([head, *tables(result), "\n".join(f"- {line}" for line in lines)])


def _provenance(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{k} {environment['versions'][k]}" for k in ("torch", "timm", "peft"))
    return (
        f"{environment['device']}, {environment['threads']} thread(s), Python "
        f"{environment['python']}, {versions}, commit {environment['git']}: "
        f"`{environment['command']}`"
    )


def tables(result: Result) -> list[str]:
    """Return the tables of a cell: speed if it was timed, cost, and the predictions by layer."""
    timed = any(times(result, name) for name in result["arms"])
    foreseen = [layer_table(result), speedup_line(result)] if "layers" in result else []
    return [*([speed_table(result)] if timed else []), cost_table(result), *foreseen]


def layer_table(result: Result) -> str:
    """Return a table of the predicted seconds and the break-even ranks of each family of linears.

    Up to its break-even rank an adapter is predicted to save time.
    """
    arms = list(result["layers"][0]["seconds"])
    head = ("layers", "tokens, in, out", *(f"{arm} ms, predicted" for arm in arms))
    rows = []
    for layer in result["layers"]:
        seconds = [f"{1000 * layer['seconds'][arm]:,.1f}" for arm in arms]
        ranks = [str(rank) for rank in layer["break_even_ranks"]]
        rows.append([layer["family"], ", ".join(map(str, layer["shape"])), *seconds, *ranks])
    return markdown([[*head, "break-even rank", "break-even rank, B alone"], *rows])


def speedup_line(result: Result) -> str:
    """Return a line with the predicted speed-up of the adapter and its factors.

    With several processes the line adds the bandwidth needed for ``PRELORA_SPEEDUP``.
    """
    whole = prod(result["speedup"].values())
    parts = " x ".join(f"{name} {ratio:.2f}" for name, ratio in result["speedup"].items())
    line = f"Predicted speed of the adapter's update: {whole:.2f} = {parts}"
    if result["conditions"]["processes"] == 1:
        return line
    here, arms = result["machine"]["all_reduce"], result["arms"]
    wanted = bandwidth_for(PRELORA_SPEEDUP, arms["full"], arms["adapter"], here)
    return (
        f"{line}. Gradients are averaged at {here / 1e6:,.0f} MB/s here; at "
        f"{wanted / 1e6:,.0f} MB/s the adapter would be {PRELORA_SPEEDUP:g} times as fast."
    )


def bandwidth_for(
    speedup: float, full: Mapping[str, Any], adapter: Mapping[str, Any], all_reduce: float
) -> float:
    """Return the bytes/s of the exchange at which ``adapter`` is ``speedup`` times as fast.

    Each arm takes c seconds without the exchange and exchanges n bytes. The bandwidth x solves
    (c_f + n_f / x) = s (c_a + n_a / x), so x = (n_f - s n_a) / (s c_a - c_f). ``all_reduce`` is
    the bandwidth, in bytes/s, that the predictions used. Return inf when the adapter is predicted
    that fast without any exchange.
    """
    seconds, sizes = [], []
    for arm in (full, adapter):
        exchange = arm["predicted"]["communication"]
        seconds.append(arm["predicted"]["total"] - exchange)
        sizes.append(exchange * all_reduce)
    missing = speedup * seconds[1] - seconds[0]
    return (sizes[0] - speedup * sizes[1]) / missing if missing > 0 else inf


def speed_table(result: Result) -> str:
    """Return a table of throughput, speed ratios with quartiles, and the parts of an update.

    Throughput and parts are medians over the rounds.
    """
    rounds = max(len(times(result, name)) for name in result["arms"])
    head = ["arm", "images/s", *REFERENCES.values(), *(f"{part} ms" for part in PARTS)]
    rows = []
    for name in (name for name in result["arms"] if times(result, name)):
        speed = result["conditions"]["batch"] / median(times(result, name))
        ratios = [ratio_to(result, reference, name) for reference in REFERENCES]
        parts = [_milliseconds(result, name, part) for part in PARTS]
        epoch = f"{IMAGENET_IMAGES / speed:,.0f}"
        rows.append([name, f"{speed:.1f}", *(_shown(r) for r in ratios), *parts, epoch])
    return markdown([[*head, f"s per ImageNet-1k epoch ({rounds} rounds)"], *rows])


def cost_table(result: Result) -> str:
    """Return a table of trained parameters and peak memory, with the cost model's predictions.

    The deviation of a prediction from the measurement stands beside it.
    """
    head = ("arm", "trained parameters", "peak MiB", "of full", "predicted MiB", "predicted speed")
    full, rows = result["arms"].get("full", {}).get("peak_bytes"), []
    for name, arm in result["arms"].items():
        peak, ratio = arm.get("peak_bytes"), ratio_to(result, "full", name)
        share = f"{100 * peak / full:.0f} %" if peak and full else "-"
        bytes_told = arm.get("predicted", {}).get("peak_bytes")
        predicted = _beside(bytes_told, peak, _mebibytes)
        faster = None if ratio is None else ratio.value
        speed = _beside(predicted_ratio(result, name), faster, "{:.2f}".format)
        trained = f"{arm['trained']:,}"
        rows.append([name, trained, _mebibytes(peak) if peak else "-", share, predicted, speed])
    return markdown([head, *rows])


def _beside(predicted: float | None, measured: float | None, form: Any) -> str:
    """Return a prediction with its deviation from the measurement in %."""
    if predicted is None:
        return "-"
    if not measured:
        return form(predicted)
    return f"{form(predicted)} ({100 * (predicted / measured - 1):+.0f} %)"


def _shown(value: Ratio | None) -> str:
    return "-" if value is None else str(value)


def _milliseconds(result: Result, name: str, part: str) -> str:
    return f"{1000 * median(times(result, name, part)):,.1f}"


def _mebibytes(size: float) -> str:
    return f"{size / MIB:,.0f}" if size >= 100 * MIB else f"{size / MIB:.1f}"
