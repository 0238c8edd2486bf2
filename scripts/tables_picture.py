"""Accuracy against training cost, with the Pareto front."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from tables_rows import Row, Table

from switchlora.figures import BLUE, GREY, ORANGE

COST_KEY, ACCURACY_KEY = "cost_flops", "val_top1"
MARKER = 6.0  # points
RADII = (9, 18, 30, 44, 60, 80, 104)  # points from a label to its point
ANGLES = (0, 180, 90, 270, 45, 135, 315, 225)  # degrees
AWAY = 12  # points from which on a line leads to the label


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, accuracy) points that none beats: lower cost, higher accuracy.

    A point is beaten by one that is no worse in both and better in one; equal points stand
    together. In order of cost.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def draw_pareto(table: Table, path: Path) -> Path:
    """Draw val top1 against FLOPs, mean and standard deviation over seeds; return ``path``.

    ValueError where no row has both numbers.
    """
    rows = [row for row in table.rows if {COST_KEY, ACCURACY_KEY} <= row.cells.keys()]
    if not rows:
        raise ValueError("no row has both FLOPs and val top1: there is no Pareto front to draw")
    figure = pareto_figure(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    return path


def pareto_figure(rows: Sequence[Row]) -> Figure:
    """Rows as points with error bars and names; the front is filled and joined by steps."""
    points = [(row.cells[COST_KEY].mean, row.cells[ACCURACY_KEY].mean) for row in rows]
    front = pareto_front(points)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        _draw_point(axes, row, points[i], i in front)
    steps = [points[i] for i in front]
    axes.step(*zip(*steps, strict=True), where="post", color=BLUE, linewidth=1, zorder=1)
    axes.set_xlabel("training cost, FLOPs")
    axes.set_ylabel("val top1, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.16, 0.16)
    _draw_legend(axes)
    place_labels(axes, points, [row.label for row in rows])
    return figure


def _draw_point(axes: Axes, row: Row, point: tuple[float, float], on_front: bool) -> None:
    color, face = (BLUE, BLUE) if on_front else (GREY, "white")
    axes.errorbar(
        *point,
        xerr=row.cells[COST_KEY].std,
        yerr=row.cells[ACCURACY_KEY].std,
        fmt="o" if on_front else "s",
        color=color,
        markerfacecolor=face,
        markersize=MARKER,
        elinewidth=0.9,
        capsize=2.5,
        zorder=3 if on_front else 2,
    )


def _draw_legend(axes: Axes) -> None:
    handles = [
        axes.plot([], [], "o-", color=BLUE, linewidth=1, label="Pareto front")[0],
        axes.plot([], [], "s", color=GREY, markerfacecolor="white", label="beaten")[0],
    ]
    axes.figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]
) -> list[Annotation]:
    """Name every point where no other name and no point lies; a thin line leads to far names."""
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pixels = [axes.transData.transform(point) for point in points]
    half = figure.dpi / 72 * MARKER / 2 + 1
    taken = [Bbox([pixel - half, pixel + half]) for pixel in pixels]
    placed = []
    for point, label in zip(points, labels, strict=True):
        note = _place(axes, point, label, taken)
        taken.append(note.get_window_extent())
        placed.append(note)
    return placed


def _place(
    axes: Axes, point: tuple[float, float], label: str, taken: Sequence[Bbox]
) -> Annotation:
    """The label at the first place that is free, or at the last where none is."""
    for radius, angle in _places():
        x, y = radius * math.cos(angle), radius * math.sin(angle)
        note = axes.annotate(
            label,
            point,
            (x, y),
            textcoords="offset points",
            fontsize=8,
            ha="left" if x > 1 else "right" if x < -1 else "center",
            va="bottom" if y > 1 else "top" if y < -1 else "center",
        )
        box = note.get_window_extent()
        if _within(box, axes) and not any(box.overlaps(other) for other in taken):
            if radius > AWAY:
                _lead(axes, point, (x, y))
            return note
        note.remove()
    return axes.annotate(label, point, (x, y), textcoords="offset points", fontsize=8)


def _within(box: Bbox, axes: Axes) -> bool:
    """Whether a box lies in the axes, or right of them but on the page."""
    page = axes.figure.bbox.padded(-2)
    inside = axes.bbox.x0 < box.x0 and box.x1 < page.x1
    return inside and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1


def _places() -> Iterator[tuple[float, float]]:
    return ((radius, math.radians(angle)) for radius in RADII for angle in ANGLES)


def _lead(axes: Axes, point: tuple[float, float], offset: tuple[float, float]) -> None:
    line = {"arrowstyle": "-", "color": ORANGE, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    axes.annotate("", point, offset, textcoords="offset points", arrowprops=line)
