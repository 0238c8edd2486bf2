"""Draw how the weights of runs moved: ``switchlora-runs curves RUN... [--out FOLDER]``.

A RUN may be a sweep. The pictures are:
- update norms and stable ranks by family, over optimizer updates. One run shows all its layers,
  several runs show their medians.
- a map of layers by time for each run.

Every picture is a PNG for the screen and a PDF for print, and can be read in grey.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchlora.analysis.figures import (
    STATISTICS,
    family_panels,
    heat_map,
    run_labels,
    run_styles,
    statistics_figures,
    window_note,
)
from switchlora.analysis.marks import tick
from switchlora.analysis.timeline import Timeline, measured_targets, read_timeline, series
from switchlora.config import leaves
from switchlora.names import family
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import Record, find_records

QUARTILES = (25, 50, 75)
MOST_RUNS = 12  # most runs that can be told apart in one picture
LEGEND_COLUMNS = 3
LAYERS = "lines: median of the layers; bands: quartiles"
SWITCH = "vertical lines and large markers: switch"
CHANGES = "large markers: switches; vertical lines: all changes but restarts, which are ticks"
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 150},
    "pdf": {"metadata": {"CreationDate": None}},
}


@dataclass(frozen=True)
class Curves:
    """The label and the measurements of one run."""

    label: str
    course: Timeline


def main() -> None:
    """Draw what the command line asks for. Exit with one line on a mistake in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, help="curves/ in the run or sweep by default")
    options = parser.parse_args()
    folder = options.out or (options.runs[0] if len(options.runs) == 1 else Path()) / "curves"
    try:
        records = find_records(options.runs)
        runs, silent = read(records)
        pictures = draw(runs)
        written = [
            path for name, figure in pictures.items() for path in save(figure, folder, name)
        ]
    except USER_ERRORS as error:
        sys.exit(f"curves: {one_line(error)}")
    if silent:
        print(f"left out, since nothing was measured before the switch: {', '.join(silent)}")
    print(f"written to {folder}: {' '.join(path.name for path in written)}")


def read(records: Sequence[Record]) -> tuple[list[Curves], list[str]]:
    """Return the curves of runs, and the names of the runs that measured nothing.

    Raise ValueError when no run measured anything, or when the runs trained different models.
    """
    labels = run_labels([record.folder for record in records])
    curves = [
        Curves(label, read_timeline(list(record.events())))
        for label, record in zip(labels, records, strict=True)
    ]
    told = [(c, record) for c, record in zip(curves, records, strict=True) if c.course.windows]
    if not told:
        raise ValueError(f"nothing was measured in {', '.join(labels)}: there is nothing to draw")
    for other, record in told[1:]:
        refuse_other_model(told[0], (other, record))
    return [c for c, _ in told], [c.label for c in curves if not c.course.windows]


def refuse_other_model(first: tuple[Curves, Record], other: tuple[Curves, Record]) -> None:
    """Raise ValueError unless both runs trained the same model and measured the same targets."""
    models = [dict(leaves(record.config["model"])) for _, record in (first, other)]
    names = f"{first[0].label} and {other[0].label}"
    for key in sorted(models[0].keys() | models[1].keys()):
        one, two = (model.get(key) for model in models)
        if one != two:
            raise ValueError(
                f"{names} are of different models, model.{key} is {one} and {two}: draw them apart"
            )
    key = STATISTICS["update_norms"][0]
    targets = [set(measured_targets(curves.course, key)) for curves, _ in (first, other)]
    if alone := sorted(targets[0] ^ targets[1]):
        raise ValueError(
            f"{names} measured different targets, only one has {alone[0]}: draw them apart"
        )


def draw(runs: Sequence[Curves]) -> dict[str, Figure]:
    """Return the pictures by file name.

    - For one run: all its pictures.
    - For several runs: an overlay of each statistic, and a map for each run.

    Raise ValueError for more than ``MOST_RUNS`` runs.
    """
    if len(runs) == 1:
        return statistics_figures(runs[0].course)
    if len(runs) > MOST_RUNS:
        raise ValueError(f"{len(runs)} runs cannot be told apart: give at most {MOST_RUNS}")
    together = {
        name: overlay(runs, key, label, unit) for name, (key, label, unit) in STATISTICS.items()
    }
    key = STATISTICS["update_norms"][0]
    maps = {
        f"update_norm_map-{run.label.replace('/', '-')}": heat_map(run.course, key) for run in runs
    }
    return together | maps


def overlay(runs: Sequence[Curves], key: str, label: str, unit: float = 1.0) -> Figure:
    """Draw one panel per family, with a line and a band per run.

    The line is the median of the run's layers, the band their quartiles. A larger marker on a line
    is a switch or a stage of its run.
    """
    names = measured_targets(runs[0].course, key)
    families = list(dict.fromkeys(family(name) for name in names))
    figure, axes = family_panels(families)
    for run, style in zip(runs, run_styles(len(runs)), strict=True):
        for name, axis in zip(families, axes.flat, strict=False):
            members = [f"{key}/{n}" for n in names if family(n) == name]
            draw_line(axis, run, *series(run.course.windows, members, unit), style)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=LEGEND_COLUMNS,
        fontsize=8,
        frameon=False,
    )
    figure.supylabel(label, fontsize=10)
    figure.supxlabel("\n".join(["optimizer updates", key_of(runs), *windows(runs)]), fontsize=9)
    return figure


def key_of(runs: Sequence[Curves]) -> str:
    """Return a line that says what lines, bands and markers mean."""
    kinds = {kind for run in runs for kind, _ in run.course.changes}
    return f"{LAYERS}; {SWITCH if kinds <= {'switch'} else CHANGES}"


def windows(runs: Sequence[Curves]) -> list[str]:
    """Return a line of warning when the runs' windows differ in length; else an empty list."""
    return window_note({w.end - w.begin for run in runs for w in run.course.windows})


def draw_line(
    axis: Axes, run: Curves, updates: Sequence[int], values: np.ndarray, style: dict[str, Any]
) -> None:
    """Draw median and quartiles of ``values`` (windows, layers) over the run's updates."""
    low, median, high = quartiles(values)
    axis.fill_between(updates, low, high, color=style["color"], alpha=0.13, linewidth=0)
    every = max(len(updates) // 6, 1)
    axis.plot(
        updates, median, markersize=3.5, markevery=every, linewidth=1.4, label=run.label, **style
    )
    seen = np.isfinite(median)
    measured = np.array(updates)[seen]
    for kind, update in run.course.changes:
        if kind == "restart":
            tick(axis, update, style["color"])
            continue
        axis.axvline(update, color=style["color"], linestyle=style["linestyle"], linewidth=0.7)
        if kind in ("switch", "stage") and update <= max(measured, default=0):
            marker = {"marker": style["marker"], "color": style["color"], "markersize": 7}
            height = np.interp(update, measured, median[seen])
            axis.plot(update, height, markeredgecolor="black", zorder=3, **marker)


def quartiles(values: np.ndarray) -> np.ndarray:
    """Return quartiles (3, windows) over the measured layers; NaN when no layer was measured."""
    found = np.full((len(QUARTILES), len(values)), np.nan)
    seen = np.isfinite(values).any(axis=1)
    found[:, seen] = np.nanpercentile(values[seen], QUARTILES, axis=1)
    return found


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure in each format, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, options in FORMATS.items():
        figure.savefig(folder / f"{name}.{ending}", **options)
    return [folder / f"{name}.{ending}" for ending in FORMATS]
