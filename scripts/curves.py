"""How the weights of runs moved: ``python scripts/curves.py RUN... [--out FOLDER]``.

Draws update norms and stable ranks by family: one run's layers, or the medians of several runs on
one axis of optimizer updates; and of each run a map of layers by time. Every picture is a PNG for
the screen and a PDF for print, and can be read in grey. A RUN may be a sweep.
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

from switchlora.exits import USER_ERRORS, one_line
from switchlora.figures import (
    STATISTICS,
    Event,
    family_panels,
    heat_map,
    layer_figures,
    number,
    run_labels,
    run_styles,
    switch_update,
    targets_of,
)
from switchlora.identity import leaves
from switchlora.records import Record, find_records
from switchlora.surgery import family

QUARTILES = (25, 75)
MOST_RUNS = 12  # that one picture tells apart
LEGEND_COLUMNS = 3
KEY = "lines: median of the layers; bands: quartiles; vertical lines and large markers: switch"
FORMATS = {"png": {"dpi": 150}, "pdf": {"metadata": {"CreationDate": None}}}


@dataclass(frozen=True)
class Curves:
    """What the monitor of one run measured."""

    label: str
    events: Sequence[Event]

    @property
    def measured(self) -> list[Event]:
        """The 'measure' events."""
        return [event for event in self.events if event["event"] == "measure"]

    @property
    def window(self) -> int:
        """Updates of one window."""
        return self.measured[0]["num_updates"]


def main() -> None:
    """Draw what the command line asks for; one clear line for a mistake in it."""
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
    """The curves of runs, and the names of those that measured nothing.

    ValueError where no run measured anything, or where they are of several models.
    """
    labels = run_labels([record.folder for record in records])
    curves = [
        Curves(label, list(record.events())) for label, record in zip(labels, records, strict=True)
    ]
    told = [(c, record) for c, record in zip(curves, records, strict=True) if c.measured]
    if not told:
        raise ValueError(f"nothing was measured in {', '.join(labels)}: there is nothing to draw")
    for other, record in told[1:]:
        refuse_other_model(told[0], (other, record))
    return [c for c, _ in told], [c.label for c in curves if not c.measured]


def refuse_other_model(first: tuple[Curves, Record], other: tuple[Curves, Record]) -> None:
    """ValueError unless both runs trained the same model and measured the same targets."""
    models = [dict(leaves(record.config["model"])) for _, record in (first, other)]
    names = f"{first[0].label} and {other[0].label}"
    for key in sorted(models[0].keys() | models[1].keys()):
        one, two = (model.get(key) for model in models)
        if one != two:
            raise ValueError(
                f"{names} are of different models, model.{key} is {one} and {two}: draw them apart"
            )
    key = STATISTICS["update_norms"][0]
    targets = [set(targets_of(curves.measured[0], key)) for curves, _ in (first, other)]
    if alone := sorted(targets[0] ^ targets[1]):
        raise ValueError(
            f"{names} measured different targets, only one has {alone[0]}: draw them apart"
        )


def draw(runs: Sequence[Curves]) -> dict[str, Figure]:
    """Pictures by file name: all of one run; of several, overlays and a map each."""
    if len(runs) == 1:
        return layer_figures(runs[0].events)
    if len(runs) > MOST_RUNS:
        raise ValueError(f"{len(runs)} runs cannot be told apart: give at most {MOST_RUNS}")
    together = {
        name: overlay(runs, key, label, unit) for name, (key, label, unit) in STATISTICS.items()
    }
    key = STATISTICS["update_norms"][0]
    maps = {
        f"update_norm_map-{run.label.replace('/', '-')}": heat_map(
            run.measured, key, switch_update(run.events)
        )
        for run in runs
    }
    return together | maps


def overlay(runs: Sequence[Curves], key: str, label: str, unit: float = 1.0) -> Figure:
    """One panel per family; a line per run for the median of its layers, a band for quartiles.

    The larger marker at the end of a line is the run's switch.
    """
    names = targets_of(runs[0].measured[0], key)
    families = list(dict.fromkeys(family(name) for name in names))
    figure, axes = family_panels(families)
    for run, style in zip(runs, run_styles(len(runs)), strict=True):
        for name, axis in zip(families, axes.flat, strict=False):
            members = [n for n in names if family(n) == name]
            values = [[unit * number(e.get(f"{key}/{n}")) for n in members] for e in run.measured]
            draw_line(axis, run, np.array(values), style)
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
    figure.supxlabel("\n".join(["optimizer updates", KEY, *window_note(runs)]), fontsize=9)
    return figure


def draw_line(axis: Axes, run: Curves, values: np.ndarray, style: dict[str, Any]) -> None:
    """Median and quartiles of ``values`` (windows, layers) over the run's updates."""
    updates = [event["num_updates"] for event in run.measured]
    low, high = np.nanpercentile(values, QUARTILES, axis=1)
    axis.fill_between(updates, low, high, color=style["color"], alpha=0.13, linewidth=0)
    median = np.nanmedian(values, axis=1)
    every = max(len(updates) // 6, 1)
    axis.plot(
        updates, median, markersize=3.5, markevery=every, linewidth=1.4, label=run.label, **style
    )
    if (switch := switch_update(run.events)) is not None:
        axis.axvline(switch, color=style["color"], linestyle=style["linestyle"], linewidth=0.7)
        marker = {"marker": style["marker"], "color": style["color"], "markeredgecolor": "black"}
        axis.plot(switch, median[-1], markersize=7, zorder=3, **marker)


def window_note(runs: Sequence[Curves]) -> list[str]:
    """A line for runs whose updates, over other windows, cannot be compared as they stand."""
    windows = sorted({run.window for run in runs})
    if len(windows) == 1:
        return []
    told = " and ".join(map(str, windows))
    return [f"windows of {told} updates: a longer one holds a larger update"]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure in each format; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, options in FORMATS.items():
        figure.savefig(folder / f"{name}.{ending}", **options)
    return [folder / f"{name}.{ending}" for ending in FORMATS]


if __name__ == "__main__":
    main()
