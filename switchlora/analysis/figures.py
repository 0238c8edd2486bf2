"""Draw the pictures of one run from its metrics.jsonl.

The styles and labels that pictures of several runs share are here too.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from switchlora.analysis.counterparts import Counterpart, find_counterparts
from switchlora.analysis.marks import (
    BLUE,
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
from switchlora.analysis.output import add_formats, save
from switchlora.analysis.rule import Rule, crossing, over_own_peak, rule_of
from switchlora.analysis.timeline import (
    UPDATE_NORM,
    Event,
    Timeline,
    Window,
    by_family,
    measured_targets,
    number,
    read_timeline,
    series,
)
from switchlora.errors import ODD
from switchlora.names import family
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import is_run, read_events, read_record, warn

UNMEASURED = "#eeeeee"
RULE = "#000000"
CROSSING: dict[str, Any] = {
    "marker": "o",
    "markersize": 5,
    "markeredgecolor": "black",
    "markeredgewidth": 0.6,
    "zorder": 3,
}
"""the dot where a target crosses the rule's line"""
SMOOTHED_OVER = 15  # the smoothed training loss is a mean over this part of a run's logged losses
FULL_LINE: dict[str, Any] = {"color": "#000000", "linestyle": (0, (5, 2)), "linewidth": 1.2}
"""how full training is drawn beside a run"""
LATE_MARGIN = 0.03  # share of a run before its later part that is shown too
SHORTENED_DASHES = ((0, (1, 1.2)), (0, (4, 1, 1, 1)), (0, (2, 2)))
RUN_COLORS = (BLUE, ORANGE, "#000000", "#cc79a7", "#009e73", "#e69f00", "#56b4e9")
"""the colour-blind-safe palette of Okabe and Ito"""
RUN_DASHES = ("-", "--", "-.", (0, (1, 1.2)))
RUN_MARKERS = ("o", "s", "^", "D", "v")
STATISTICS = {
    "update_norms": (UPDATE_NORM, "relative update norm, %", 100.0),
    "stable_ranks": ("update_stable_rank", "stable rank of the update", 1.0),
    "weight_stable_ranks": ("weight_stable_rank", "stable rank of the weight", 1.0),
}
"""by picture: the key of the events, the label, and the factor for the values"""
Style = dict[str, Any]
"""colour, linestyle and marker of a line, for matplotlib"""
ABOVE: dict[str, Any] = {"loc": "outside upper center", "fontsize": 8, "frameon": False}
"""how the legend of a whole figure is drawn"""
Points = tuple[list[int], list[float]]
"""updates and values"""


def draw_figures(folder: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw the measurements of the run in ``folder`` into ``folder/figures``; return the files.

    Full training of the same setting is drawn beside it where such a run is found.
    """
    events = list(read_events(folder))
    rule = rule_of(read_record(folder).config) if is_run(folder) else None
    pictures = layer_figures(events, rule)
    kinds = {event["event"] for event in events}
    if "train" in kinds or "eval" in kinds:
        pictures["training"] = training_curves(events, find_counterparts(folder))
    paths = []
    for name, figure in pictures.items():
        paths += save(figure, folder / "figures", name, formats)
    return paths


def layer_figures(events: Sequence[Event], rule: Rule | None = None) -> dict[str, Figure]:
    """Return, by name, the pictures of the monitor's measurements of each layer.

    The dictionary is empty when nothing was measured.
    """
    course = read_timeline(events)
    return statistics_figures(course, rule) if course.windows else {}


def statistics_figures(course: Timeline, rule: Rule | None = None) -> dict[str, Figure]:
    """Return, by name, a picture of each statistic and the map of layers by time.

    With the ``rule`` of a criterion, update norms are drawn as it judges them.
    """
    pictures = {}
    for name, (key, label, unit) in STATISTICS.items():
        pictures[name] = small_multiples(course, key, label, unit)
    if rule is not None:
        pictures["update_norms"] = judged_norms(course, rule)
    pictures["update_norm_map"] = heat_map(course, UPDATE_NORM)
    return pictures


def judged_norms(course: Timeline, rule: Rule) -> Figure:
    """Draw update norms over their own peaks, the rule's line, and where each target crosses it.

    A dot is where a target goes to the line or under it and stays there.
    """
    label = "update norm / its own peak so far"
    figure = small_multiples(course, UPDATE_NORM, label, by_peak=True)
    told = f"at or under {rule.fraction:g} of the own peak for {rule.patience} windows"
    families = by_family(measured_targets(course, UPDATE_NORM))
    for members, axis in zip(families.values(), figure.axes, strict=False):
        for line in axis.get_lines()[: len(members)]:
            _mark_crossing(axis, line, rule.fraction)
        axis.axhline(rule.fraction, color=RULE, linewidth=1.1, zorder=2.5)
    figure.axes[0].set_ylim(0, 1.05)
    meaning = f"line: {told}; dots: a target comes to it and stays"
    figure.supxlabel(f"{figure.get_supxlabel()}\n{meaning}", fontsize=9)
    return figure


def _mark_crossing(axis: Axes, line: Line2D, fraction: float) -> None:
    """Draw a dot on the ``line`` where it goes under ``fraction`` for good."""
    updates, shares = np.asarray(line.get_data(orig=True), dtype=float)
    place = crossing(shares, fraction)
    if place is not None:
        color = line.get_color()
        axis.plot(updates[place], shares[place], color=color, gid="crossing", **CROSSING)


def small_multiples(
    course: Timeline, key: str, label: str, unit: float = 1.0, by_peak: bool = False
) -> Figure:
    """Draw one panel per family with a line per layer.

    The line of the first block is dark, that of the last block is light. A line ends where its
    layer switches, unless the layer is measured between restarts. ``by_peak`` divides each value
    by the largest of its layer so far.
    """
    names = measured_targets(course, key)
    families = by_family(names)
    figure, axes = family_panels(list(families))
    for members, axis in zip(families.values(), axes.flat, strict=False):
        _draw_layers(axis, course, key, members, unit, by_peak)
        _mark(axis, course)
    if not course.ends_at_switch:
        handles = keys(course, course.last_measured)
        figure.legend(handles=handles, ncols=5, **ABOVE)
    _label_blocks(figure, axes, len(names) // len(families))
    figure.supylabel(label, fontsize=10)
    lines = ["optimizer updates", *window_note(course.windows)]
    figure.supxlabel("\n".join(lines), fontsize=10)
    return figure


def _draw_layers(
    axis: Axes, course: Timeline, key: str, members: Sequence[str], unit: float, by_peak: bool
) -> None:
    shades = colormaps["viridis"]
    last = max(len(members) - 1, 1)
    for place, member in enumerate(members):
        updates, values = series(course.windows, [f"{key}/{member}"], unit)
        if by_peak:
            values = over_own_peak(values)
        color = shades(0.9 * place / last)
        axis.plot(updates, values[:, 0], color=color, linewidth=1.4)


def window_note(windows: Iterable[Window]) -> list[str]:
    """Return a line of warning when windows have several lengths; otherwise an empty list.

    Updates over windows of different lengths cannot be compared.
    """
    lengths = sorted({window.length for window in windows})
    if len(lengths) < 2:
        return []
    told = " and ".join(map(str, lengths))
    return [f"windows of {told} updates: a longer one holds a larger update"]


def family_panels(families: Sequence[str]) -> tuple[Figure, np.ndarray]:
    """Create a figure with one titled panel per family, in two columns with common axes."""
    columns = min(len(families), 2)
    rows = math.ceil(len(families) / columns)
    size = (4.2 * columns, 2.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, families, strict=False):
        axis.set_title(name, fontsize=10)
        tidy(axis)
    for axis in list(axes.flat)[len(families) :]:
        axis.set_visible(False)
    return figure, axes


def run_styles(count: int) -> list[Style]:
    """Return the colour, dashes and marker of each of ``count`` runs.

    Up to 20 runs differ in dashes or marker, so that they can be told apart in grey.
    """
    kinds = zip(cycle(RUN_COLORS), cycle(RUN_DASHES), cycle(RUN_MARKERS), strict=False)
    styles: list[Style] = []
    for color, dashes, marker in islice(kinds, count):
        styles.append({"color": color, "linestyle": dashes, "marker": marker})
    return styles


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Return the names of run folders, with as much of their path as makes them distinct."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts), default=1)
    for depth in range(1, longest + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def results_folder(runs: Sequence[Path], name: str) -> Path:
    """Return the folder ``name`` for results: in the only run or sweep, or here for several."""
    place = runs[0] if len(runs) == 1 else Path()
    return place / name


def heat_map(course: Timeline, key: str) -> Figure:
    """Draw a map of layers by time: each target's norm over its own largest, and its switch."""
    names = sorted(measured_targets(course, key), key=_family_and_depth)
    columns = [f"{key}/{name}" for name in names]
    updates, values = series(course.windows, columns)
    height = 1.2 + 0.16 * len(names)
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axis = figure.subplots()
    axis.set_facecolor(UNMEASURED)
    edges = [course.windows[0].begin, *updates]
    rows = np.arange(len(names) + 1)
    mesh = axis.pcolormesh(
        edges,
        rows,
        over_largest(values).T,
        vmin=0,
        vmax=1,
        cmap="viridis",
        rasterized=True,
    )
    axis.set_yticks(rows[:-1] + 0.5, names, fontsize=6)
    axis.set_ylim(len(names), 0)
    axis.set_xlabel("optimizer updates")
    axis.set_title(_mark_map(axis, course, names), fontsize=10)
    figure.colorbar(mesh, label="update norm / its largest in the row")
    return figure


def over_largest(values: np.ndarray) -> np.ndarray:
    """Return values (windows, targets) over the largest of each target; NaN stays."""
    largest = np.fmax.reduce(values, axis=0)
    return values / np.where(largest > 0, largest, np.nan)


def _family_and_depth(name: str) -> tuple[str, list[int]]:
    """Return what orders the rows of a map: the family of a target, then its numbers."""
    numbers = filter(str.isdigit, name.split("."))
    return family(name), list(map(int, numbers))


def _mark_map(axis: Axes, course: Timeline, names: Sequence[str]) -> str:
    """Mark the changes of the run on a map of layers, and return what the marks mean."""
    if course.ends_at_switch:
        return "" if course.switch is None else f"until the switch at update {course.switch:,}"
    for name, update in course.switched:
        if name in names and update <= course.last_measured:
            row = names.index(name)
            edges = [row, row + 1]
            axis.plot([update, update], edges, color=ORANGE, linewidth=2, clip_on=False)
    return "; ".join(["orange: a target switches", *_mark_other_changes(axis, course)])


def _mark_other_changes(axis: Axes, course: Timeline) -> list[str]:
    """Mark restarts and named changes on a map of layers, and return what the marks mean."""
    restarted = False
    lines: dict[str, None] = {}
    for kind, update in course.changes:
        if update > course.last_measured:
            continue
        if kind == "restart":
            tick(axis, update)
            restarted = True
        elif kind in NAMES:
            axis.axvline(update, color=GREY, linestyle="--", linewidth=1.2)
            lines[NAMES[kind]] = None
    told = ["ticks: restarts"] if restarted else []
    if lines:
        told.append(f"grey: {', '.join(lines)}")
    return told


def training_curves(events: Sequence[Event], beside: Sequence[Counterpart] = ()) -> Figure:
    """Draw train and validation loss, and top1, with the phases shaded.

    The training loss is smoothed, and its logged values lie behind it. The axis of top1 shows the
    later part of training, where small differences matter. Full training ``beside`` it is drawn in
    black.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, top1 = figure.subplots(1, 2)
    _draw_train_loss(loss, _points(events, "train", "train/loss"))
    _draw_validation(loss, _points(events, "eval", "val/loss"))
    _draw_validation(top1, _points(events, "eval", "val/top1"))
    averaged = _points(events, "eval", "val/ema_top1")
    if averaged[0]:
        _draw_validation(top1, averaged, ORANGE, "validation, EMA")
    _draw_counterparts(loss, beside, "val/loss")
    _draw_counterparts(top1, beside, "val/top1")
    course = read_timeline(events)
    last = max(event["num_updates"] for event in events)
    _finish_panel(loss, "loss", course, last)
    _finish_panel(top1, "top1, %", course, last)
    _focus(top1, course, last)
    return figure


def _draw_train_loss(axis: Axes, points: Points) -> None:
    """Draw the logged training losses faintly, and their running mean."""
    updates, losses = points
    axis.plot(updates, losses, color=GREY, linewidth=0.5, alpha=0.4)
    axis.plot(updates, smoothed(losses), color=GREY, linewidth=1.2, label="train, smoothed")


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Return the running mean over a part of the values; at the ends over what is there.

    Values that are not finite are left out of the means.
    """
    found = np.asarray(values, dtype=float)
    half = len(found) // (2 * SMOOTHED_OVER)
    means = np.full(len(found), math.nan)
    for place in range(len(found)):
        near = found[max(place - half, 0) : place + half + 1]
        finite = near[np.isfinite(near)]
        if finite.size:
            means[place] = finite.mean()
    return means


def _draw_counterparts(axis: Axes, beside: Sequence[Counterpart], key: str) -> None:
    """Draw the validations of full training and of shortened full training."""
    dashes = cycle(SHORTENED_DASHES)
    for counterpart in beside:
        updates, values = counterpart.points(key)
        look = {**FULL_LINE, "label": counterpart.label}
        if counterpart.shortened:
            look |= {"linestyle": next(dashes), "color": GREY}
        if len(updates) == 1:
            look |= {"linestyle": "", "marker": "D", "markersize": 5, "clip_on": False}
        axis.plot(updates, values, zorder=2.2, **look)


def _focus(axis: Axes, course: Timeline, last: int) -> None:
    """Limit both axes to the later part of training.

    That is from half of the run on, or from the switch on when that comes earlier, but never the
    first quarter.
    """
    begin = last / 2 if course.switch is None else min(last / 2, course.switch)
    begin = max(begin, last / 4)
    late: list[float] = []
    for line in axis.get_lines():
        updates, values = np.asarray(line.get_data(orig=True), dtype=float)
        if line.get_transform() == axis.transData:
            late += values[(updates >= begin) & np.isfinite(values)].tolist()
    if late and min(late) < max(late):
        margin = 0.12 * (max(late) - min(late))
        axis.set_ylim(min(late) - margin, max(late) + margin)
        axis.set_xlim(begin - LATE_MARGIN * last, last)
        axis.set_title(f"{axis.get_title()}, later part of training", fontsize=10)


def _points(events: Sequence[Event], kind: str, key: str) -> Points:
    """Return the updates and the values of ``key`` in events of a ``kind`` that have it."""
    updates = []
    values = []
    for event in events:
        if event["event"] == kind and key in event:
            updates.append(event["num_updates"])
            values.append(number(event[key]))
    return updates, values


def _draw_validation(
    axis: Axes, points: Points, color: str = BLUE, label: str = "validation"
) -> None:
    axis.plot(*points, "o-", color=color, markersize=3, label=label)


def _finish_panel(axis: Axes, title: str, course: Timeline, last: int) -> None:
    """Shade the phases until update ``last``, mark several changes, and add title and legend."""
    shade(axis, course.spans, last)
    if len(course.changes) > 1:
        mark_changes(axis, course.changes, last)
    axis.set_xlabel("optimizer updates")
    axis.set_title(title, fontsize=10)
    handles, _ = axis.get_legend_handles_labels()
    handles += restart_key(course.changes, last)
    axis.legend(handles=handles, fontsize=7, framealpha=0.85, edgecolor="none")
    tidy(axis)


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


def tidy(axis: Axes) -> None:
    """Remove the frame on top and right, and make the tick labels small."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def main() -> None:
    """Draw the pictures of each run into its ``figures`` folder and print the files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    add_formats(parser)
    options = parser.parse_args()
    for folder in options.runs:
        if not (folder / "metrics.jsonl").is_file():
            sys.exit(f"{folder} holds no metrics.jsonl: give the folder of a run")
        try:
            written = draw_figures(folder, options.formats)
        except (*USER_ERRORS, *ODD) as error:
            warn(f"left out: {folder}: {one_line(error)}")
            continue
        print(*written, sep="\n")
