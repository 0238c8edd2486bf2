"""Draw how the weights of runs moved: ``switchlora-runs curves RUN... [--out FOLDER]``.

A RUN may be a sweep. The pictures are:
- update norms and stable ranks by family, over optimizer updates. One run shows all its layers,
  several runs show their medians.
- a map of layers by time for each run.

Every picture is a PNG for the screen and a PDF for print, and can be read in grey. ``--formats``
chooses others.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchlora.analysis.figures import (
    ABOVE,
    STATISTICS,
    Style,
    family_panels,
    heat_map,
    results_folder,
    run_styles,
    statistics_figures,
    window_note,
)
from switchlora.analysis.marks import tick
from switchlora.analysis.output import add_formats, save
from switchlora.analysis.rule import Rule, rule_of
from switchlora.analysis.tables.rows import run_names
from switchlora.analysis.timeline import (
    UPDATE_NORM,
    Timeline,
    Window,
    by_family,
    measured_targets,
    read_timeline,
    series,
)
from switchlora.config import leaves
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import Record, find_records, output_folder, warn

QUARTILES = (25, 50, 75)
MOST_RUNS = 12  # most runs that can be told apart in one picture
LEGEND_COLUMNS = 3
LAYERS = "lines: median of the layers; bands: quartiles"
SWITCH = "vertical lines and large markers: switch"
CHANGES = "large markers: switches; vertical lines: all changes but restarts, which are ticks"


@dataclass(frozen=True)
class Curves:
    """The label and the measurements of one run."""

    label: str
    course: Timeline
    rule: Rule | None = None
    """of its criterion, when that judges update norms"""


def main() -> None:
    """Draw what the command line asks for. Exit with one line on a mistake in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=output_folder, help="curves/ in the run or sweep by default")
    add_formats(parser, "png,pdf")
    options = parser.parse_args()
    folder = options.out or results_folder(options.runs, "curves")
    written = []
    try:
        runs, silent = read_curves(
            find_records(options.runs, warn, lambda record: read_curves([record]))
        )
        for name, figure in draw(runs).items():
            written += save(figure, folder, name, options.formats)
    except USER_ERRORS as error:
        sys.exit(f"curves: {one_line(error)}")
    if silent:
        print(f"left out, since nothing was measured before the switch: {', '.join(silent)}")
    print(f"written to {folder}: {' '.join(path.name for path in written)}")


def read_curves(records: Sequence[Record]) -> tuple[list[Curves], list[str]]:
    """Return the curves of runs, and the names of the runs that measured nothing.

    Raise ValueError when no run measured anything, or when the runs trained different models.
    """
    labels = run_names(records)
    measured: list[tuple[Curves, Record]] = []
    silent = []
    for label, record in zip(labels, records, strict=True):
        course = read_timeline(list(record.events()))
        if course.windows:
            measured.append((Curves(label, course, rule_of(record.config)), record))
        else:
            silent.append(label)
    if not measured:
        raise ValueError(f"nothing was measured in {', '.join(labels)}: there is nothing to draw")
    for other in measured[1:]:
        refuse_other_model(measured[0], other)
    return [curves for curves, _ in measured], silent


def refuse_other_model(first: tuple[Curves, Record], other: tuple[Curves, Record]) -> None:
    """Raise ValueError unless both runs trained the same model and measured the same targets."""
    curves, record = first
    other_curves, other_record = other
    names = f"{curves.label} and {other_curves.label}"
    model = dict(leaves(record.config["model"]))
    other_model = dict(leaves(other_record.config["model"]))
    for key in sorted(model.keys() | other_model.keys()):
        one = model.get(key)
        two = other_model.get(key)
        if one != two:
            raise ValueError(
                f"{names} are of different models, model.{key} is {one} and {two}: draw them apart"
            )
    targets = set(measured_targets(curves.course, UPDATE_NORM))
    other_targets = set(measured_targets(other_curves.course, UPDATE_NORM))
    alone = sorted(targets ^ other_targets)
    if alone:
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
        return statistics_figures(runs[0].course, runs[0].rule)
    if len(runs) > MOST_RUNS:
        raise ValueError(f"{len(runs)} runs cannot be told apart: give at most {MOST_RUNS}")
    pictures = {}
    for name, (key, label, unit) in STATISTICS.items():
        pictures[name] = overlay(runs, key, label, unit)
    for run in runs:
        name = re.sub(r"[^\w.=+-]+", "-", run.label)
        pictures[f"update_norm_map-{name}"] = heat_map(run.course, UPDATE_NORM)
    return pictures


def overlay(runs: Sequence[Curves], key: str, label: str, unit: float = 1.0) -> Figure:
    """Draw one panel per family, with a line and a band per run.

    The line is the median of the run's layers, the band their quartiles. A larger marker on a line
    is a switch or a stage of its run.
    """
    families = by_family(measured_targets(runs[0].course, key))
    figure, axes = family_panels(list(families))
    for run, style in zip(runs, run_styles(len(runs)), strict=True):
        for members, axis in zip(families.values(), axes.flat, strict=False):
            keys = [f"{key}/{name}" for name in members]
            updates, values = series(run.course.windows, keys, unit)
            draw_line(axis, run, updates, values, style)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=LEGEND_COLUMNS, **ABOVE)
    figure.supylabel(label, fontsize=10)
    notes = ["optimizer updates", key_of(runs), *windows(runs)]
    figure.supxlabel("\n".join(notes), fontsize=9)
    return figure


def key_of(runs: Sequence[Curves]) -> str:
    """Return a line that says what lines, bands and markers mean."""
    kinds = set()
    for run in runs:
        kinds |= {change.kind for change in run.course.changes}
    marks = SWITCH if kinds <= {"switch"} else CHANGES
    return f"{LAYERS}; {marks}"


def windows(runs: Sequence[Curves]) -> list[str]:
    """Return a line of warning when the runs' windows differ in length; else an empty list."""
    found: list[Window] = []
    for run in runs:
        found += run.course.windows
    return window_note(found)


def draw_line(
    axis: Axes, run: Curves, updates: Sequence[int], values: np.ndarray, style: Style
) -> None:
    """Draw median and quartiles of ``values`` (windows, layers) over the run's updates."""
    low, median, high = quartiles(values)
    axis.fill_between(
        updates,
        low,
        high,
        color=style["color"],
        alpha=0.13,
        linewidth=0,
    )
    every = max(len(updates) // 6, 1)
    axis.plot(
        updates,
        median,
        label=run.label,
        linewidth=1.4,
        markersize=3.5,
        markevery=every,
        **style,
    )
    seen = np.isfinite(median)
    mark_run(axis, run, np.array(updates)[seen], median[seen], style)


def mark_run(
    axis: Axes, run: Curves, updates: np.ndarray, medians: np.ndarray, style: Style
) -> None:
    """Mark the changes of a run, and its switch or stages on the line of its ``medians``."""
    color = style["color"]
    for kind, update in run.course.changes:
        if kind == "restart":
            tick(axis, update, color)
            continue
        axis.axvline(update, color=color, linestyle=style["linestyle"], linewidth=0.7)
        if kind in ("switch", "stage") and update <= max(updates, default=0):
            axis.plot(
                update,
                np.interp(update, updates, medians),
                marker=style["marker"],
                color=color,
                markersize=7,
                markeredgecolor="black",
                zorder=3,
            )


def quartiles(values: np.ndarray) -> np.ndarray:
    """Return quartiles (3, windows) over the measured layers; NaN when no layer was measured."""
    found = np.full((len(QUARTILES), len(values)), np.nan)
    seen = np.isfinite(values).any(axis=1)
    found[:, seen] = np.nanpercentile(values[seen], QUARTILES, axis=1)
    return found
