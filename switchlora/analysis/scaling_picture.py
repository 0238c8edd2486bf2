"""Draw loss against training FLOPs: curves during training, final losses, and the fits."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    ScalarFormatter,
)

from switchlora.analysis.figures import Style, run_styles, tidy
from switchlora.analysis.scaling_fit import PowerLaw

BAND_POINTS = 50
FEW_DECADES = 20  # up to this ratio of the ends, an axis has labels at many steps
SHOWN_FROM = 0.1  # share of a run; earlier losses, of the warm-up, would flatten the rest


def draw(points: Sequence[Any], laws: Mapping[str, PowerLaw]) -> Figure:
    """Draw two panels with logarithmic axes.

    - Left: training losses during training. A line is the mean of the runs of one width.
    - Right: validation losses at the end. A marker is a run, a line is the fit, a band its 95 %
      interval.

    ``points`` are ``scaling.Point`` objects.
    """
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    way, end = figure.subplots(1, 2)
    styles = run_styles(len(laws))
    for (label, law), style in zip(laws.items(), styles, strict=True):
        members = [point for point in points if point.label == label]
        curved = [point for point in members if point.curve]
        for _, alike in groupby(curved, _width_and_length):
            draw_curve(way, list(alike), style)
        draw_ends(end, members, label, law, style)
    way.set_title("training loss on the way, mean over seeds", fontsize=10)
    end.set_title("validation loss at the end", fontsize=10)
    for axis in (way, end):
        tidy_logarithms(axis)
        axis.set_xlabel("training FLOPs", fontsize=9)
    end.legend(fontsize=8, frameon=False, loc="lower left")
    way.set_ylabel("loss, nats", fontsize=9)
    return figure


def _width_and_length(point: Any) -> tuple[int, int]:
    """Return what the points of runs have in common whose curves can be averaged."""
    return point.width, len(point.curve)


def draw_curve(axis: Axes, runs: Sequence[Any], style: Style) -> None:
    """Draw the mean training loss of alike ``runs`` over their FLOPs, without the first tenth."""
    curve = np.mean([run.curve for run in runs], axis=0)
    flops, losses = curve.T
    shown = flops >= SHOWN_FROM * runs[0].flops
    look: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"]}
    axis.plot(flops[shown], losses[shown], linewidth=0.9, alpha=0.8, **look)


def draw_ends(axis: Axes, members: Sequence[Any], label: str, law: PowerLaw, style: Style) -> None:
    """Draw the runs of one kind and the line fitted to them, with its exponent in the legend."""
    flops = [point.flops for point in members]
    losses = [point.loss for point in members]
    open_marker: dict[str, Any] = {"markersize": 5, "markerfacecolor": "none"}
    axis.plot(flops, losses, style["marker"], color=style["color"], **open_marker)
    interval = f"[{law.low:.3f}, {law.high:.3f}]"
    told = f"{label}: b = {law.exponent:.3f} {interval}, n = {law.runs}"
    ends = np.geomspace(min(flops), max(flops), BAND_POINTS)
    low, high = law.band(ends, flops)
    axis.fill_between(ends, low, high, color=style["color"], alpha=0.15, linewidth=0)
    # without markers, but for the one in the legend
    axis.plot(
        ends,
        law(ends),
        label=told,
        markevery=[],
        **open_marker,
        **style,
    )


def tidy_logarithms(axis: Axes) -> None:
    """Make both axes logarithmic, with labels at several steps of each decade of FLOPs.

    About a decade has more of them than several decades. The loss spans less than a decade, so it
    has plain numbers at even steps.
    """
    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = axis.get_xlim()
    steps = (1, 2, 3, 4, 6, 8) if high / low < FEW_DECADES else (1, 2, 5)
    axis.xaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.xaxis.set_major_formatter(FuncFormatter(flops_text))
    axis.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()
    tidy(axis)


def flops_text(flops: float, _: int | None = None) -> str:
    """Return FLOPs as on a label: 2e+12 is '2e12'."""
    return f"{flops:.0e}".replace("e+", "e")
