"""The benchmark's picture: relative speed and peak memory of each arm, measured and predicted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchlora.bench.arms import ARMS, ON_DEMAND
from switchlora.bench.memory import MIB
from switchlora.bench.report import Result, predicted_ratio, ratio_to

PICTURE = "bench"
RANKLESS = {"full": "full", "frozen": "frozen limit"}
"""labels of the arms without a rank"""
COLORS = {"full": "#999999", "adapter": "#56b4e9", "peft": "#e69f00", "frozen": "#eeeeee"}
HATCHES = {
    "adapter-merged": "//",
    "adapter-split": "..",
    "adapter-B": "xx",
    "adapter-gelu": "--",
    "adapter-B-blocks": "++",
    "peft-nocast": "//",
}
ORDER = (*ARMS, *ON_DEMAND)
BAR_INCHES = 0.24
TITLE_LETTERS = 52  # on a line
SPEED = "speed relative to full training (whiskers: quartiles)"
PEAK = "peak memory, MiB"
FORMS = {SPEED: "{:.2f}", PEAK: "{:,.0f}"}
MARKER: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": 4.5}
USUAL = {
    "accumulation": 1,
    "image_size": 224,
    "dropout": "none",
    "residual_dtype": "none",
    "processes": 1,
    "model_options": {},
}


@dataclass(frozen=True)
class Bar:
    """The bar of one arm at one rank."""

    arm: str
    rank: int
    value: float
    low: float
    high: float
    """``low`` and ``high`` are the quartiles; without quartiles, both are ``value``"""
    predicted: float | None

    @property
    def label(self) -> str:
        """The name of the arm, with its rank if it has one."""
        if self.arm in RANKLESS:
            return RANKLESS[self.arm]
        return f"{self.arm} r{self.rank}"


def draw(results: Sequence[Result]) -> Figure | None:
    """Draw a row of panels for each set of conditions other than the rank.

    One column shows the speed, another the peak memory. A column without any measurement is left
    out. Return None when nothing was measured.
    """
    panels: dict[str, list[Result]] = {}
    for result in results:
        panels.setdefault(_title(result), []).append(result)
    columns = {}
    for label, bar in ((SPEED, speed_bar), (PEAK, peak_bar)):
        column_bars = [bars(cells, bar) for cells in panels.values()]
        if any(column_bars):
            columns[label] = column_bars
    if not columns:
        return None

    heights = [_panel_height(row) for row in zip(*columns.values(), strict=True)]
    size = (4.6 * len(columns), sum(heights) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), len(columns), squeeze=False, height_ratios=heights)
    for column, label in zip(axes.T, columns, strict=True):
        for axis, found in zip(column, columns[label], strict=True):
            _draw_bars(axis, found, FORMS[label])
        column[-1].set_xlabel(label, fontsize=9)
        if label == SPEED:
            _mark_full(column)
    for axis, title in zip(axes[:, 0], panels, strict=True):
        axis.set_title(fill(title, TITLE_LETTERS), fontsize=9, loc="left")
    figure.legend(
        axes[0][0].plot([], [], "D", **MARKER),
        ["predicted by the cost model"],
        loc="outside lower right",
        fontsize=8,
        frameon=False,
    )
    return figure


def _panel_height(row: Sequence[Sequence[Bar]]) -> float:
    """Return the inches of a row of panels, with room for at least 3 bars."""
    most = max(3, *map(len, row))
    return BAR_INCHES * most + 0.7


def _mark_full(column: Sequence[Axes]) -> None:
    """Give all panels of a column one scale, and draw a line at 1."""
    end = max(axis.get_xlim()[1] for axis in column)
    for axis in column:
        axis.set_xlim(0, end)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":", zorder=3)


def bars(cells: Sequence[Result], bar: Callable[[Result, str], Bar | None]) -> list[Bar]:
    """Return a bar for each arm and rank, in the order of arms.

    Of several results for one arm and rank, the latest counts.
    """
    found: dict[str, Bar] = {}
    for cell in cells:
        for name in cell["arms"]:
            made = bar(cell, name)
            if made is not None:
                found[made.label] = made
    return sorted(found.values(), key=_place)


def _place(bar: Bar) -> tuple[int, int]:
    return ORDER.index(bar.arm), bar.rank


def speed_bar(result: Result, name: str) -> Bar | None:
    """Return the bar of an arm's speed relative to full training, or None if not measured."""
    ratio = ratio_to(result, "full", name)
    if ratio is None:
        return None
    predicted = None if name == "full" else predicted_ratio(result, name)
    rank = result["conditions"]["rank"]
    return Bar(name, rank, ratio.value, ratio.low, ratio.high, predicted)


def peak_bar(result: Result, name: str) -> Bar | None:
    """Return the bar of an arm's peak memory in MiB, or None if not measured."""
    arm = result["arms"][name]
    if "peak_bytes" not in arm:
        return None
    peak = arm["peak_bytes"] / MIB
    predicted = arm["predicted"]["peak_bytes"] / MIB if "predicted" in arm else None
    rank = result["conditions"]["rank"]
    return Bar(name, rank, peak, peak, peak, predicted)


def _title(result: Result) -> str:
    """Return the title of a panel: model, precision, batch, and every unusual condition.

    Results with the same title share a panel. Their ranks may differ.
    """
    c = result["conditions"]
    parts = [c["model"], c["precision"], f"batch {c['batch']}"]
    for key, usual in USUAL.items():
        if c[key] != usual:
            parts.append(f"{key.replace('_', ' ')} {c[key]}")
    return ", ".join(parts)


def _draw_bars(axis: Axes, found: Sequence[Bar], form: str) -> None:
    """Draw horizontal bars from top to bottom, with the value beside each."""
    style: dict[str, Any] = {"height": 0.72, "edgecolor": "black", "linewidth": 0.6}
    for place, bar in enumerate(found):
        color = COLORS[bar.arm.split("-")[0]]
        hatch = HATCHES.get(bar.arm, "")
        axis.barh(place, bar.value, color=color, hatch=hatch, **style)
        if bar.low < bar.high:
            below = max(0.0, bar.value - bar.low)
            above = max(0.0, bar.high - bar.value)
            axis.errorbar(bar.value, place, xerr=[[below], [above]], color="black", capsize=2.5)
        if bar.predicted is not None:
            axis.plot(bar.predicted, place, "D", zorder=4, **MARKER)
        end = max(bar.value, bar.high, bar.predicted or 0)
        value = form.format(bar.value)
        axis.annotate(
            value, (end, place), (7, 0), textcoords="offset points", va="center", fontsize=8
        )
    if not found:
        axis.text(0.04, 0.5, "not measured", fontsize=8, transform=axis.transAxes)
        axis.set_xticks([])
    labels = [bar.label for bar in found]
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.16)
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
