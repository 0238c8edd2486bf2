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
from switchlora.analysis.tables.rows import Row, Table

COST_KEY, ACCURACY_KEY = "cost_flops", "val_top1"
MARKER = 6.0  # points
DISTANCES = (6, 14, 24, 36, 50, 66, 84, 104)  # points from a point to its name
ANGLES = (0, 180, 90, 270, 45, 135, 315, 225)  # degrees
MOST_NAMES = 8
ON_FRONT: dict[str, Any] = {"marker": "o", "linestyle": "", "color": BLUE, "markersize": MARKER}
BEATEN: dict[str, Any] = {**ON_FRONT, "marker": "s", "color": GREY, "markerfacecolor": "white"}
STEPS: dict[str, Any] = {"color": BLUE, "linewidth": 1, "linestyle": (0, (1, 1.5)), "zorder": 1}
AWAY = 12  # a name farther than so many points from its point gets a line
Point = tuple[float, float]


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the (cost, accuracy) points that no other point beats, by cost.

    Lower cost and higher accuracy are better. A point beats another when it is no worse in both
    and better in one. Equal points do not beat each other.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def draw_pareto(table: Table, path: Path) -> Path:
    """Draw val top1 against FLOPs, mean and standard deviation over seeds; return ``path``.

    Raise ValueError when no row has both numbers.
    """
    rows = [row for row in table.rows if {COST_KEY, ACCURACY_KEY} <= row.cells.keys()]
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
    rows = sorted(rows, key=lambda row: _point(row)[0])
    points = [_point(row) for row in rows]
    front = pareto_front(points)
    numbered = len(rows) > MOST_NAMES
    height = max(4.4, 1.2 + 0.165 * len(rows)) if numbered else 4.4
    figure = Figure(figsize=(9.6 if numbered else 7.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        _draw_point(axes, row, points[i], i in front)
    steps = [points[i] for i in front]
    axes.step(*zip(*steps, strict=True), where="post", **STEPS)
    axes.set_xlabel("training cost, FLOPs")
    axes.set_ylabel("val top1, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.16, 0.16)
    _draw_legend(axes, beaten=len(front) < len(rows))
    names = [str(i + 1) if numbered else row.label for i, row in enumerate(rows)]
    if numbered:
        _draw_key(axes, [f"{i + 1}: {row.label}" for i, row in enumerate(rows)])
    place_names(axes, rows, names, steps)
    return figure


def _point(row: Row) -> Point:
    return row.cells[COST_KEY].mean, row.cells[ACCURACY_KEY].mean


def _draw_point(axes: Axes, row: Row, point: Point, on_front: bool) -> None:
    axes.errorbar(
        *point,
        xerr=row.cells[COST_KEY].std,
        yerr=row.cells[ACCURACY_KEY].std,
        **(ON_FRONT if on_front else BEATEN),
        elinewidth=0.9,
        capsize=2.5,
        zorder=3 if on_front else 2,
    )


def _draw_legend(axes: Axes, beaten: bool) -> None:
    """Draw a legend of what the marks mean."""
    handles = axes.plot([], [], label="Pareto front", **{**ON_FRONT, **STEPS})
    if beaten:
        handles += axes.plot([], [], label="beaten", **BEATEN)
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)


def _draw_key(axes: Axes, lines: Sequence[str]) -> None:
    """Draw the key right of the picture: each row's number and its label."""
    handles = [axes.plot([], [], " ", label=line)[0] for line in lines]
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
    ink = [ends for row in rows for ends in _spread(row)]
    for (x, y), after in pairwise(steps):
        ink += [((x, y), (after[0], y)), ((after[0], y), after)]
    half = figure.dpi / 72 * MARKER / 2
    taken = [_box(axes, ends).padded(half) for ends in ink]
    for row, name in zip(rows, names, strict=True):
        point = _point(row)
        note = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8)
        size = np.asarray(note.get_window_extent().size)
        offset, box = _free_place(axes, axes.transData.transform(point), size, taken)
        note.set_position(tuple(offset))
        note.set(ha="center", va="center")
        taken.append(box)
        _lead(axes, point, box)


def _spread(row: Row) -> list[tuple[Point, Point]]:
    """Return both ends of a row's error bars. Without an error bar both ends are the point."""
    (x, y), dx, dy = _point(row), *(row.cells[key].std or 0 for key in (COST_KEY, ACCURACY_KEY))
    return [((x - dx, y), (x + dx, y)), ((x, y - dy), (x, y + dy))]


def _box(axes: Axes, ends: tuple[Point, Point]) -> Bbox:
    """Return the box in pixels of a line along an axis."""
    return Bbox(np.sort(axes.transData.transform(ends), axis=0))


def _free_place(
    axes: Axes, pixel: np.ndarray, size: np.ndarray, taken: Sequence[Bbox]
) -> tuple[np.ndarray, Bbox]:
    """Return the offset in points of a label's middle, and the label's box in pixels.

    The first free place is taken, or the last one tried when none is free.
    """
    scale = axes.figure.dpi / 72
    for distance, angle in product(DISTANCES, ANGLES):
        direction = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
        offset = direction * distance * scale + np.sign(direction.round(6)) * size / 2
        box = Bbox([pixel + offset - size / 2, pixel + offset + size / 2])
        if _within(box, axes) and not any(box.overlaps(other) for other in taken):
            break
    return offset / scale, box


def _within(box: Bbox, axes: Axes) -> bool:
    """Return whether a box lies inside the axes, or right of them but on the page."""
    page = axes.figure.bbox.padded(-2)
    inside = axes.bbox.x0 < box.x0 and box.x1 < page.x1
    return inside and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1


def _lead(axes: Axes, point: Point, box: Bbox) -> None:
    """Draw a line from a point to the nearest edge of a name that is far from it."""
    pixel = axes.transData.transform(point)
    end = np.clip(pixel, box.min, box.max)
    if np.hypot(*(end - pixel)) > AWAY * axes.figure.dpi / 72:
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        offset = (end - pixel) * 72 / axes.figure.dpi
        axes.annotate("", point, offset, textcoords="offset points", arrowprops=line)
