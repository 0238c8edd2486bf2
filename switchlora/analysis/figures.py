"""Draw the pictures of one run from its metrics.jsonl.

The styles and labels that pictures of several runs share are here too.
"""

import argparse
import math
import sys
from collections.abc import Callable, Collection, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from switchlora.analysis.marks import (
    GREY,
    NAMES,
    ORANGE,
    keys,
    mark_changes,
    mark_end,
    restart_key,
    shade,
    tick,
)
from switchlora.analysis.timeline import (
    Event,
    Timeline,
    measured_targets,
    number,
    read_timeline,
    series,
)
from switchlora.names import family
from switchlora.storage import read_events

BLUE = "#0072b2"
UNMEASURED = "#eeeeee"
RUN_COLORS = ("#0072b2", "#d55e00", "#000000", "#cc79a7", "#009e73", "#e69f00", "#56b4e9")
"""the colour-blind-safe palette of Okabe and Ito"""
RUN_DASHES = ("-", "--", "-.", (0, (1, 1.2)))
RUN_MARKERS = ("o", "s", "^", "D", "v")
STATISTICS = {
    "update_norms": ("relative_update_norm", "relative update norm, %", 100.0),
    "stable_ranks": ("update_stable_rank", "stable rank of the update", 1.0),
    "weight_stable_ranks": ("weight_stable_rank", "stable rank of the weight", 1.0),
}
"""by picture: the key of the events, the label, and the factor for the values"""
ABOVE: dict[str, Any] = {
    "loc": "outside upper center",
    "ncols": 5,
    "fontsize": 8,
    "frameon": False,
}


def draw_figures(folder: Path) -> list[Path]:
    """Draw the measurements of the run in ``folder`` into ``folder/figures``; return the files."""
    events = list(read_events(folder))
    pictures = layer_figures(events)
    if any(e["event"] in ("train", "eval") for e in events):
        pictures["training"] = training_curves(events)
    return [_save(figure, folder / "figures" / f"{name}.png") for name, figure in pictures.items()]


def layer_figures(events: Sequence[Event]) -> dict[str, Figure]:
    """Return, by name, the pictures of the monitor's measurements of each layer.

    The dictionary is empty when nothing was measured.
    """
    course = read_timeline(events)
    return statistics_figures(course) if course.windows else {}


def statistics_figures(course: Timeline) -> dict[str, Figure]:
    """Return, by name, a picture of each statistic and the map of layers by time."""
    pictures = {
        name: small_multiples(course, key, label, unit)
        for name, (key, label, unit) in STATISTICS.items()
    }
    return pictures | {"update_norm_map": heat_map(course, "relative_update_norm")}


def small_multiples(course: Timeline, key: str, label: str, unit: float = 1.0) -> Figure:
    """Draw one panel per family with a line per layer.

    The line of the first block is dark, that of the last block is light. A line ends where its
    layer switches, unless the layer is measured between restarts.
    """
    names = measured_targets(course, key)
    families = list(dict.fromkeys(family(name) for name in names))
    figure, axes = family_panels(families)
    for name, axis in zip(families, axes.flat, strict=False):
        members = [n for n in names if family(n) == name]
        for place, member in enumerate(members):
            color = colormaps["viridis"](0.9 * place / max(len(members) - 1, 1))
            updates, values = series(course.windows, [f"{key}/{member}"], unit)
            axis.plot(updates, values[:, 0], color=color, linewidth=1.4)
        _mark(axis, course)
    if not course.ends_at_switch:
        figure.legend(handles=keys(course, course.last_measured), **ABOVE)
    _label_blocks(figure, axes, len(names) // len(families))
    figure.supylabel(label, fontsize=10)
    note = window_note({window.end - window.begin for window in course.windows})
    figure.supxlabel("\n".join(["optimizer updates", *note]), fontsize=10)
    return figure


def window_note(lengths: Collection[int]) -> list[str]:
    """Return a line of warning when windows have several lengths; otherwise an empty list.

    Updates over windows of different lengths cannot be compared.
    """
    if len(lengths) < 2:
        return []
    told = " and ".join(map(str, sorted(lengths)))
    return [f"windows of {told} updates: a longer one holds a larger update"]


def family_panels(families: Sequence[str]) -> tuple[Figure, np.ndarray]:
    """Create a figure with one titled panel per family, in two columns with common axes."""
    columns = min(len(families), 2)
    rows = math.ceil(len(families) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, families, strict=False):
        axis.set_title(name, fontsize=10)
        tidy(axis)
    for axis in list(axes.flat)[len(families) :]:
        axis.set_visible(False)
    return figure, axes


def run_styles(count: int) -> list[dict[str, Any]]:
    """Return the colour, dashes and marker of each of ``count`` runs.

    Up to 20 runs differ in dashes or marker, so that they can be told apart in grey.
    """
    kinds = zip(cycle(RUN_COLORS), cycle(RUN_DASHES), cycle(RUN_MARKERS), strict=False)
    return [
        {"color": color, "linestyle": dashes, "marker": marker}
        for color, dashes, marker in islice(kinds, count)
    ]


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Return the names of run folders, with as much of their path as makes them distinct."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def heat_map(course: Timeline, key: str) -> Figure:
    """Draw a map of layers by time: each target's relative update norm, and where it switched."""
    names = sorted(measured_targets(course, key), key=lambda n: (family(n), _depth(n)))
    updates, values = series(course.windows, [f"{key}/{n}" for n in names], 100)
    figure = Figure(figsize=(7.2, 1.2 + 0.16 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.set_facecolor(UNMEASURED)
    edges = [course.windows[0].begin, *updates]
    mesh = axis.pcolormesh(
        edges, np.arange(len(names) + 1), values.T, vmin=0, cmap="viridis", rasterized=True
    )
    axis.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=6)
    axis.set_ylim(len(names), 0)
    axis.set_xlabel("optimizer updates")
    axis.set_title(_mark_map(axis, course, names), fontsize=10)
    figure.colorbar(mesh, label="relative update norm, %")
    return figure


def _mark_map(axis: Axes, course: Timeline, names: Sequence[str]) -> str:
    """Mark the changes of the run on a map of layers, and return what the marks mean."""
    if course.ends_at_switch:
        return "" if course.switch is None else f"until the switch at update {course.switch:,}"
    seen = [change for change in course.changes if change.num_updates <= course.last_measured]
    for name, update in course.switched:
        if name in names and update <= course.last_measured:
            row = names.index(name)
            axis.plot([update, update], [row, row + 1], color=ORANGE, linewidth=2, clip_on=False)
    for kind, update in seen:
        if kind == "restart":
            tick(axis, update)
        elif kind in NAMES:
            axis.axvline(update, color=GREY, linestyle="--", linewidth=1.2)
    told = ["orange: a target switches"]
    told += ["ticks: restarts"] if any(kind == "restart" for kind, _ in seen) else []
    lines = dict.fromkeys(NAMES[kind] for kind, _ in seen if kind in NAMES)
    return "; ".join([*told, *([f"grey: {', '.join(lines)}"] if lines else [])])


def training_curves(events: Sequence[Event]) -> Figure:
    """Draw train and validation loss, and top1, with the phases shaded."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, top1 = figure.subplots(1, 2)
    course, last = read_timeline(events), max(e["num_updates"] for e in events)
    points = _points(events)
    loss.plot(*points("train", "train/loss"), color=GREY, linewidth=0.6, label="train")
    loss.plot(*points("eval", "val/loss"), "o-", color=BLUE, markersize=3, label="validation")
    top1.plot(*points("eval", "val/top1"), "o-", color=BLUE, markersize=3, label="validation")
    updates, averaged = points("eval", "val/ema_top1")
    if updates:
        top1.plot(updates, averaged, "o-", color=ORANGE, markersize=3, label="validation, EMA")
    for axis, name in ((loss, "loss"), (top1, "top1, %")):
        shade(axis, course.spans, last)
        if len(course.changes) > 1:
            mark_changes(axis, course.changes, last)
        axis.set_xlabel("optimizer updates")
        axis.set_title(name, fontsize=10)
        handles = [*axis.get_legend_handles_labels()[0], *restart_key(course.changes, last)]
        axis.legend(handles=handles, fontsize=8, framealpha=1, edgecolor="none")
        tidy(axis)
    return figure


def _points(events: Sequence[Event]) -> Callable[[str, str], tuple[list[int], list[float]]]:
    def points(event: str, key: str) -> tuple[list[int], list[float]]:
        found = [(e["num_updates"], e[key]) for e in events if e["event"] == event and key in e]
        return [n for n, _ in found], [number(value) for _, value in found]

    return points


def _mark(axis: Axes, course: Timeline) -> None:
    """Mark the switch when curves end at it; otherwise shade the phases and mark all changes."""
    if course.ends_at_switch:
        mark_end(axis, course.switch)
    else:
        shade(axis, course.spans, course.last_measured)
        mark_changes(axis, course.changes, course.last_measured)


def _label_blocks(figure: Figure, axes: np.ndarray, layers: int) -> None:
    if layers > 1:
        scale = Normalize(0, (layers - 1) / 0.9)
        bar = ScalarMappable(norm=scale, cmap="viridis")
        shown = figure.colorbar(bar, ax=axes, shrink=0.6, ticks=[0, layers - 1])
        shown.ax.set_ylim(0, layers - 1)
        shown.set_label("block")


def _depth(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def tidy(axis: Axes) -> None:
    """Remove the frame on top and right, and make the tick labels small."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    """Draw the pictures of each run into its ``figures`` folder and print the files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    for folder in parser.parse_args().runs:
        if not (folder / "metrics.jsonl").is_file():
            sys.exit(f"{folder} holds no metrics.jsonl: give the folder of a run")
        for path in draw_figures(folder):
            print(path)
