"""Draw accuracy against training cost: kinds of methods, the Pareto front, full training."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from switchlora.analysis.marks import BLUE, GREY, ORANGE
from switchlora.analysis.output import save
from switchlora.analysis.tables.columns import Cell
from switchlora.analysis.tables.rows import (
    CRITERION,
    FULL_TRAINING,
    METHOD,
    Row,
    Table,
    short_names,
)
from switchlora.analysis.tables.systems import has_switched

COST_KEY = "cost_flops"
ACCURACY_KEY = "val_top1"
BOTH = {COST_KEY, ACCURACY_KEY}
FULL, SWITCH, LOW_RANK, LORA = FULL_TRAINING, "switch", "low rank", "LoRA"
SMALLER_STATE = "smaller optimizer state"
KINDS: dict[str, dict[str, Any]] = {
    FULL: {"marker": "*", "color": "#111111", "markersize": 12.0},
    SWITCH: {"marker": "o", "color": BLUE},
    LOW_RANK: {"marker": "s", "color": "#009e73"},
    LORA: {"marker": "^", "color": ORANGE},
    SMALLER_STATE: {"marker": "D", "color": "#cc79a7"},
}
"""the look of each kind of row"""
FACTORIZED = ("factorized_linear", "guided_linear", "cola_linear", "sltrain_linear")
"""what makes layers of factors instead of weights"""
MARKER = 6.0  # points
DISTANCES = (8, 15, 24, 36, 50, 66, 84, 104, 130, 160, 200)  # points from a point to its name
ANGLES = (0, 180, 90, 270, 45, 135, 315, 225)  # degrees
FEW_NAMES = 8  # up to so many names fit into a small picture
STEPS: dict[str, Any] = {
    "color": GREY,
    "linewidth": 1,
    "linestyle": (0, (1, 1.5)),
    "zorder": 1,
}
NOISE: dict[str, Any] = {"color": GREY, "alpha": 0.15, "linewidth": 0, "zorder": 0}
"""the band of the seeds' noise"""
LENGTH_KEYS = {"epochs", "length", "max_updates"}
SHORTENED: dict[str, Any] = {
    "label": "full training, shortened",
    "color": "#111111",
    "linewidth": 1.2,
    "linestyle": (0, (5, 2)),
    "zorder": 1.5,
}
LEAD: dict[str, Any] = {
    "arrowstyle": "-",
    "color": GREY,
    "linewidth": 0.6,
    "shrinkA": 0,
    "shrinkB": 3,
}
"""the line from a point to its name"""
AWAY = 12  # a name farther than so many points from its point gets a line
PIECES = 50  # boxes that cover a slanted line
Point = tuple[float, float]
Line = tuple[Point, Point]


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the (cost, accuracy) points that no other point dominates, by cost.

    Lower cost and higher accuracy are better. A point dominates another when it is no
    worse in both and better in one. Equal points do not dominate each other.
    """

    def cheapest_first(index: int) -> Point:
        cost, accuracy = points[index]
        return cost, -accuracy

    front: list[int] = []
    last = None
    for index in sorted(range(len(points)), key=cheapest_first):
        point = points[index]
        if last is None or point[1] > last[1] or point == last:
            front.append(index)
            last = point
    return front


def draw_pareto(table: Table, path: Path) -> Path:
    """Draw val top1 against FLOPs, mean and standard deviation over seeds; return ``path``.

    Raise ValueError when no row has both numbers.
    """
    rows = [row for row in table.rows if row.cells.keys() >= BOTH]
    if not rows:
        raise ValueError("no row has both FLOPs and val top1: there is no Pareto front to draw")
    figure = pareto_figure(rows)
    save(figure, path.parent, path.stem, [path.suffix.removeprefix(".")], dpi=200)
    return path


def kind_of(row: Row) -> str:
    """Return the kind of a row: full training, switch, low rank, LoRA or smaller optimizer state.

    - smaller optimizer state: full training with the moments of matrices in a subspace.
    - full training: no run ever switched.
    - low rank: factors stand instead of weights.
    - LoRA: adapters beside frozen weights from the first update on.
    """
    if not row.records:
        return SWITCH
    if row.has_smaller_state and not any(map(has_switched, row.records)):
        return SMALLER_STATE
    if row.trains_in_full or not any(map(has_switched, row.records)):
        return FULL
    switch = row.records[0].config["switch"]
    if _built(switch.get("adapter")) in FACTORIZED:
        return LOW_RANK
    return LORA if _built(switch["criterion"]) == "at_start" else SWITCH


def _built(section: Any) -> str:
    """Return the name of what a section of a configuration builds; '' if it builds nothing."""
    if not isinstance(section, Mapping):
        return ""
    where = section.get("path", section.get("_target_", ""))
    return str(where).rpartition(".")[2]


def pareto_figure(rows: Sequence[Row]) -> Figure:
    """Draw the rows as named points, coloured by kind, with error bars.

    Points on the front are filled and joined by steps; dominated ones are open. Full training has
    a band of its seeds' noise, and a line through its shortened runs.
    """
    rows = sorted(rows, key=lambda row: _cost(row).mean)
    points = list(map(_point, rows))
    front = pareto_front(points)
    steps = [points[index] for index in front]
    figure = Figure(figsize=_size(len(rows)), layout="constrained")
    axes = _empty_axes(figure)
    for index, row in enumerate(rows):
        _draw_point(axes, row, index in front)
    costs, accuracies = zip(*steps, strict=True)
    axes.step(costs, accuracies, where="post", **STEPS)
    shortened = _draw_full_training(axes, rows)
    _draw_legend(axes, rows, has_dominated=len(front) < len(rows))
    place_names(axes, rows, short_names(list(map(_name, rows))), steps, shortened)
    return figure


def _name(row: Row) -> str:
    """Return a row's label; that of full training when nothing else distinguishes it."""
    is_plain = row.settings.keys() <= {CRITERION, METHOD}
    return FULL_TRAINING if is_plain and kind_of(row) == FULL else row.label


def _size(count: int) -> tuple[float, float]:
    """Return the width and height in inches of a picture of ``count`` rows."""
    if count <= FEW_NAMES:
        return 7.2, 4.4
    return 9.6, max(5.4, 1.6 + 0.22 * count)


def _empty_axes(figure: Figure) -> Axes:
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlabel("training cost, FLOPs")
    axes.set_ylabel("val top1, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.16, 0.16)
    return axes


def _draw_full_training(axes: Axes, rows: Sequence[Row]) -> Sequence[Point]:
    """Draw the noise of the longest full training, and the line through shortened ones.

    Return the points of that line; of a single length there is none.
    """
    full = [row for row in rows if kind_of(row) == FULL]
    if not full:
        return []
    accuracy = _accuracy(full[-1])
    if accuracy.std is not None:
        label = f"full training ± std of {accuracy.n} seeds"
        low, high = accuracy.mean - accuracy.std, accuracy.mean + accuracy.std
        axes.axhspan(low, high, label=label, gid="noise", **NOISE)
    shortened = [_point(row) for row in full if _differs_in_length(row)]
    if len(shortened) < 2:
        return []
    axes.plot(*zip(*shortened, strict=True), gid="shortened", **SHORTENED)
    return shortened


def _differs_in_length(row: Row) -> bool:
    """Return whether only its length distinguishes a row of full training."""
    return row.settings.keys() <= {CRITERION, METHOD, *LENGTH_KEYS}


def _point(row: Row) -> Point:
    return _cost(row).mean, _accuracy(row).mean


def _cost(row: Row) -> Cell:
    return row.cells[COST_KEY]


def _accuracy(row: Row) -> Cell:
    return row.cells[ACCURACY_KEY]


def _draw_point(axes: Axes, row: Row, on_front: bool) -> None:
    look = {"markersize": MARKER, **KINDS[kind_of(row)]}
    axes.errorbar(
        *_point(row),
        xerr=_cost(row).std,
        yerr=_accuracy(row).std,
        linestyle="",
        markerfacecolor=look["color"] if on_front else "white",
        elinewidth=0.7,
        capsize=0,
        zorder=3 if on_front else 2,
        **look,
    )


def _draw_legend(axes: Axes, rows: Sequence[Row], has_dominated: bool) -> None:
    """Draw a legend of what colours, marks and lines mean."""
    kinds = set(map(kind_of, rows))
    handles: list[Artist] = []
    for kind, look in KINDS.items():
        if kind in kinds:
            style = {**look, "markersize": MARKER, "linestyle": ""}
            handles += axes.plot([], [], label=kind, **style)
    plain: dict[str, Any] = {"marker": "o", "color": GREY, "markersize": MARKER}
    handles += axes.plot([], [], label="Pareto front", **STEPS | plain)
    if has_dominated:
        open_mark = {**plain, "markerfacecolor": "white", "linestyle": ""}
        handles += axes.plot([], [], label="dominated", **open_mark)
    handles += [artist for artist in (*axes.patches, *axes.lines) if _is_of_full(artist)]
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)


def _is_of_full(artist: Artist) -> bool:
    """Return whether an artist is the noise or the line of full training."""
    return artist.get_gid() in ("noise", "shortened")


def place_names(
    axes: Axes,
    rows: Sequence[Row],
    names: Sequence[str],
    steps: Sequence[Point],
    shortened: Sequence[Point],
) -> None:
    """Place each name where no other name, point, error bar or line lies.

    A thin line leads to a name that is far from its point.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    lines: list[Line] = []
    for row in rows:
        lines += _error_bars(row)
    for point, after in pairwise(steps):
        corner = (after[0], point[1])
        lines += [(point, corner), (corner, after)]
    for ends in pairwise(shortened):
        pieces = np.linspace(*ends, PIECES)
        lines += pairwise(pieces)
    half = figure.dpi / 72 * MARKER / 2
    taken = [_box(axes, line).padded(half) for line in lines]
    for row, name in zip(rows, names, strict=True):
        point = _point(row)
        look: dict[str, Any] = {"fontsize": 8, "color": KINDS[kind_of(row)]["color"]}
        note = axes.annotate(name, point, (0, 0), textcoords="offset points", **look)
        size = np.asarray(note.get_window_extent().size)
        pixel = axes.transData.transform(point)
        offset, box = _free_place(axes, pixel, size, taken)
        note.set_position(tuple(offset))
        note.set(ha="center", va="center")
        taken.append(box)
        _lead(axes, point, box)


def _error_bars(row: Row) -> list[Line]:
    """Return both ends of a row's error bars. Without an error bar both ends are the point."""
    x, y = _point(row)
    dx = _cost(row).std or 0
    dy = _accuracy(row).std or 0
    across = ((x - dx, y), (x + dx, y))
    upright = ((x, y - dy), (x, y + dy))
    return [across, upright]


def _box(axes: Axes, ends: Line) -> Bbox:
    """Return the box in pixels of a line along an axis."""
    pixels = axes.transData.transform(ends)
    return Bbox(np.sort(pixels, axis=0))


def _free_place(
    axes: Axes, pixel: np.ndarray, size: np.ndarray, taken: Sequence[Bbox]
) -> tuple[np.ndarray, Bbox]:
    """Return the offset in points of a label's middle, and the label's box in pixels.

    The first free place is taken, or the last one tried when none is free.
    """
    scale = axes.figure.dpi / 72
    for distance, angle in product(DISTANCES, ANGLES):
        radians = math.radians(angle)
        direction = np.array([math.cos(radians), math.sin(radians)])
        nearest_edge = np.sign(direction.round(6)) * size / 2
        offset = direction * distance * scale + nearest_edge
        middle = pixel + offset
        box = Bbox([middle - size / 2, middle + size / 2])
        is_covered = any(map(box.overlaps, taken))
        if _within(box, axes) and not is_covered:
            break
    return offset / scale, box


def _within(box: Bbox, axes: Axes) -> bool:
    """Return whether a box lies inside the axes, or right of them but on the page."""
    page = axes.figure.bbox.padded(-2)
    fits_across = axes.bbox.x0 < box.x0 and box.x1 < page.x1
    fits_upright = axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
    return fits_across and fits_upright


def _lead(axes: Axes, point: Point, box: Bbox) -> None:
    """Draw a line from a point to the nearest edge of a name that is far from it."""
    pixel = axes.transData.transform(point)
    way = np.clip(pixel, box.min, box.max) - pixel
    if np.hypot(*way) <= AWAY * axes.figure.dpi / 72:
        return
    offset = way * 72 / axes.figure.dpi
    axes.annotate("", point, offset, textcoords="offset points", arrowprops=LEAD)
