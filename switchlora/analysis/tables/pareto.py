"""Draw accuracy against training cost, with the Pareto front."""

import math
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from switchlora.analysis.figures import BLUE
from switchlora.analysis.marks import GREY
from switchlora.analysis.tables.columns import Cell
from switchlora.analysis.tables.rows import Row, Table

COST_KEY = "cost_flops"
ACCURACY_KEY = "val_top1"
BOTH = {COST_KEY, ACCURACY_KEY}
MARKER = 6.0  # points
DISTANCES = (6, 14, 24, 36, 50, 66, 84, 104)  # points from a point to its name
ANGLES = (0, 180, 90, 270, 45, 135, 315, 225)  # degrees
MOST_NAMES = 8
ON_FRONT: dict[str, Any] = {
    "marker": "o",
    "linestyle": "",
    "color": BLUE,
    "markersize": MARKER,
}
BEATEN: dict[str, Any] = {
    **ON_FRONT,
    "marker": "s",
    "color": GREY,
    "markerfacecolor": "white",
}
STEPS: dict[str, Any] = {
    "color": BLUE,
    "linewidth": 1,
    "linestyle": (0, (1, 1.5)),
    "zorder": 1,
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
Point = tuple[float, float]
Line = tuple[Point, Point]


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the (cost, accuracy) points that no other point beats, by cost.

    Lower cost and higher accuracy are better. A point beats another when it is no worse in both
    and better in one. Equal points do not beat each other.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    return path


def pareto_figure(rows: Sequence[Row]) -> Figure:
    """Draw the rows as points with error bars and names.

    Points on the front are filled and joined by steps. More than ``MOST_NAMES`` rows get numbers
    instead of names, in the order of cost, and a key beside the picture.
    """
    rows = sorted(rows, key=lambda row: _cost(row).mean)
    points = list(map(_point, rows))
    front = pareto_front(points)
    steps = [points[index] for index in front]
    names = [row.label for row in rows]
    numbered = len(rows) > MOST_NAMES
    figure = Figure(figsize=_size(len(rows), numbered), layout="constrained")
    axes = _empty_axes(figure)
    for index, row in enumerate(rows):
        _draw_point(axes, row, index in front)
    costs, accuracies = zip(*steps, strict=True)
    axes.step(costs, accuracies, where="post", **STEPS)
    _draw_legend(axes, beaten=len(front) < len(rows))
    if numbered:
        numbers = [str(index + 1) for index in range(len(rows))]
        _draw_key(axes, numbers, names)
        names = numbers
    place_names(axes, rows, names, steps)
    return figure


def _size(count: int, numbered: bool) -> tuple[float, float]:
    """Return the width and height in inches of a picture of ``count`` rows."""
    if not numbered:
        return 7.2, 4.4
    return 9.6, max(4.4, 1.2 + 0.165 * count)


def _empty_axes(figure: Figure) -> Axes:
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlabel("training cost, FLOPs")
    axes.set_ylabel("val top1, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.16, 0.16)
    return axes


def _point(row: Row) -> Point:
    return _cost(row).mean, _accuracy(row).mean


def _cost(row: Row) -> Cell:
    return row.cells[COST_KEY]


def _accuracy(row: Row) -> Cell:
    return row.cells[ACCURACY_KEY]


def _draw_point(axes: Axes, row: Row, on_front: bool) -> None:
    axes.errorbar(
        *_point(row),
        xerr=_cost(row).std,
        yerr=_accuracy(row).std,
        **(ON_FRONT if on_front else BEATEN),
        elinewidth=0.9,
        capsize=2.5,
        zorder=3 if on_front else 2,
    )


def _draw_legend(axes: Axes, beaten: bool) -> None:
    """Draw a legend of what the marks mean."""
    handles = axes.plot([], [], label="Pareto front", **ON_FRONT | STEPS)
    if beaten:
        handles += axes.plot([], [], label="beaten", **BEATEN)
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)


def _draw_key(axes: Axes, numbers: Sequence[str], labels: Sequence[str]) -> None:
    """Draw the key right of the picture: each row's number and its label."""
    handles = []
    for number, label in zip(numbers, labels, strict=True):
        handles.extend(axes.plot([], [], " ", label=f"{number}: {label}"))
    axes.figure.legend(
        handles=handles,
        loc="outside right center",
        frameon=False,
        fontsize=8,
        handlelength=0,
        handletextpad=0,
        labelspacing=0.35,
    )


def place_names(
    axes: Axes, rows: Sequence[Row], names: Sequence[str], steps: Sequence[Point]
) -> None:
    """Place each name where no other name, point, error bar or step of the front lies.

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
    half = figure.dpi / 72 * MARKER / 2
    taken = [_box(axes, line).padded(half) for line in lines]
    for row, name in zip(rows, names, strict=True):
        point = _point(row)
        note = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8)
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
