"""Fit loss against training FLOPs: ``switchlora-runs scaling RUN... --out FOLDER``.

A RUN may be a sweep. L = a C^-b is fitted to the final validation losses of dense, low-rank and
self-guided runs of several widths. C is the FLOPs of the whole training in products and attention,
forward and backward. Causal attention counts like full attention. The results are written to
scaling.json, scaling.md and scaling.png.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from switchlora.analysis.output import add_formats, save
from switchlora.analysis.scaling_fit import LEAST_RUNS, PowerLaw, fit_power_law, verdict
from switchlora.analysis.scaling_picture import draw
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import Record, check_alike, find_records, output_folder, warn

DENSE = "dense"
KINDS = {"factorized_linear": "low rank", "guided_linear": "self-guided"}
CURVE_POINTS = 10
Laws = Mapping[str, PowerLaw]
"""the power law of each label"""


@dataclass(frozen=True)
class Point:
    """One finished run."""

    label: str
    """'dense', or the kind of factors and their share of the weights' parameters"""
    width: int
    seed: int
    flops: float
    """FLOPs of the whole training"""
    loss: float
    """loss of the last validation, in nats"""
    curve: Sequence[tuple[float, float]]
    """pairs (FLOPs, mean of the logged training losses since the pair before)"""


def main() -> None:
    """Fit and write what the command line asks for. Exit with one line on a mistake in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=output_folder, required=True)
    add_formats(parser)
    options = parser.parse_args()
    try:
        records = find_records(options.runs, warn, attempt)
        points = read_points(records)
        laws = fit(points)
        write(points, laws, options.out, options.formats)
    except USER_ERRORS as error:
        sys.exit(f"scaling: {one_line(error)}")
    if len(points) < len(records):
        print(f"left out, since they have not finished: {len(records) - len(points)} run(s)")
    print("\n".join(sentences(laws)))
    pictures = " ".join(f"scaling.{ending}" for ending in options.formats)
    print(f"written to {options.out}: scaling.json scaling.md {pictures}")


def attempt(record: Record) -> None:
    """Make the point of a finished run alone."""
    if record.finished:
        point_of(record)


def read_points(records: Sequence[Record]) -> list[Point]:
    """Return the points of the finished runs, dense ones first.

    Raise ValueError when none has finished, or when they differ in data or epochs.
    """
    finished = [record for record in records if record.finished]
    if not finished:
        raise ValueError(f"none of {len(records)} run(s) has finished: there is nothing to fit")
    check_alike(finished, ("data", "epochs", "length"), "runs that saw the same data")
    return sorted(map(point_of, finished), key=_sort_key)


def _sort_key(point: Point) -> tuple[bool, str, int, int]:
    """Return what orders points: dense ones first, then by label, width and seed."""
    return point.label != DENSE, point.label, point.width, point.seed


def point_of(record: Record) -> Point:
    """Return the point of a finished run.

    Raise ValueError when its FLOPs are unknown or its model has no width.
    """
    summary = record.result
    model = record.config["model"]
    flops = summary["cost"]["train_flops"]
    if flops is None:
        raise ValueError(f"{record.folder}: its FLOPs are not known, as with torch.compile")
    if "embed_dim" not in model:
        raise ValueError(f"{record.folder}: its model has no model.embed_dim, the width")
    return Point(
        label=label_of(record),
        width=model["embed_dim"],
        seed=record.config["seed"],
        flops=flops,
        loss=summary["val"]["loss"],
        curve=curve_of(record),
    )


def label_of(record: Record) -> str:
    """Return the label of a run, such as 'dense', 'low rank, 62.5 %' or 'self-guided, 62.5 %'.

    Raise ValueError for other adapters, or when the run did not end with its factors alone.
    """
    switch = record.config["switch"]
    if switch["criterion"].get("path", "").endswith(".never"):
        return DENSE
    adapter = switch.get("adapter", {})
    maker = adapter.get("path", adapter.get("_target_", ""))
    _, _, made_by = maker.rpartition(".")
    by_parameters = switch["rank"]["_target_"].endswith(".ParameterRatio")
    if made_by not in KINDS or not by_parameters:
        raise ValueError(
            f"{record.folder} is neither dense nor low-rank: give runs with switch/criterion=never"
            ", or with switch/adapter=factorized or guided and switch/rank=parameter_ratio"
        )
    if record.result["segments"][-1]["phase"] != "adapter":
        raise ValueError(f"{record.folder} did not end with its factors alone: see its log")
    return f"{KINDS[made_by]}, {100 * switch['rank']['ratio']:.4g} %"


def curve_of(record: Record) -> list[tuple[float, float]]:
    """Return about ten points (FLOPs, mean training loss) along a run."""
    events = [event for event in record.events("train") if event["train/loss"] is not None]
    size = max(len(events) // CURVE_POINTS, 1)
    curve = []
    for end in range(size, len(events) + 1, size):
        part = events[end - size : end]
        mean = sum(event["train/loss"] for event in part) / size
        flops = flops_until(part[-1]["num_updates"], record.result)
        curve.append((flops, mean))
    return curve


def flops_until(num_updates: int, summary: Mapping[str, Any]) -> float:
    """Return the FLOPs of the first ``num_updates`` updates of a run.

    The summary tells the FLOPs of the whole training only. A point on the way gets its share of
    them: the updates until there, each at the FLOPs of an update of its phase, over all updates.
    What guided layers skipped is thereby spread over the run.
    """
    total = summary["cost"]["train_flops"]
    until = 0.0
    whole = 0.0
    left = num_updates
    for phase in summary["phases"].values():  # in run order
        each = phase["flops_per_update"] or 0
        made = min(left, phase["num_updates"])
        until += made * each
        whole += phase["num_updates"] * each
        left -= made
    return until * (total / whole)


def fit(points: Sequence[Point]) -> dict[str, PowerLaw]:
    """Fit the power law of each label.

    Raise ValueError for a label with fewer than ``LEAST_RUNS`` runs or with only one width.
    """
    by_label: dict[str, list[Point]] = {}
    for point in points:
        by_label.setdefault(point.label, []).append(point)
    laws = {}
    for label, members in by_label.items():
        widths = sorted({point.width for point in members})
        if len(widths) < 2 or len(members) < LEAST_RUNS:
            raise ValueError(
                f"{label}: {len(members)} run(s) of width {', '.join(map(str, widths))} give no "
                f"exponent: give at least {LEAST_RUNS} runs, of two widths or more"
            )
        flops = [point.flops for point in members]
        losses = [point.loss for point in members]
        laws[label] = fit_power_law(flops, losses)
    return laws


def sentences(laws: Laws) -> list[str]:
    """Return a sentence for each label other than dense: whether it is steeper than dense."""
    if DENSE not in laws:
        return ["There are no dense runs to compare with."]
    found = []
    for label, law in laws.items():
        if label != DENSE:
            found.append(verdict(label, law, DENSE, laws[DENSE]))
    return found or ["There are no low-rank runs to compare with."]


def write(
    points: Sequence[Point], laws: Laws, folder: Path, formats: Sequence[str] = ("png",)
) -> None:
    """Write scaling.json, scaling.md and the picture into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "fits": {label: asdict(law) for label, law in laws.items()},
        "verdict": sentences(laws),
        "runs": list(map(asdict, points)),
    }
    (folder / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(report(points, laws))
    (folder / "scaling.md").write_text(text + "\n")
    save(draw(points, laws), folder, "scaling", formats)


def report(points: Sequence[Point], laws: Laws) -> list[str]:
    """Return lines of Markdown with the fits, the sentences about them, and all runs."""
    lines = ["L = a C^-b: L is the last validation loss in nats, C the training FLOPs.", ""]
    lines += ["| | b | 95 % interval | runs |", "|:--|--:|--:|--:|"]
    for label, law in laws.items():
        interval = f"{law.low:.3f} to {law.high:.3f}"
        lines.append(f"| {label} | {law.exponent:.3f} | {interval} | {law.runs} |")
    lines += ["", *sentences(laws), ""]
    lines += ["| | width | seed | FLOPs | loss |", "|:--|--:|--:|--:|--:|"]
    for point in points:
        run = f"{point.label} | {point.width} | {point.seed}"
        lines.append(f"| {run} | {point.flops:.3g} | {point.loss:.4f} |")
    return lines
