"""Draw the replay: a row per setting, with its deciding margin over updates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchlora.analysis.figures import ABOVE, Style, run_styles, tidy
from switchlora.analysis.marks import GREY

TOLD_APART = 3  # most outcomes named one by one above a row; more are summed up
FEW_SETTINGS = 8  # up to so many settings have high rows
LEGEND_COLUMNS = 4
EARLY_PEAK = 50  # a margin above this many medians would flatten the rest on a linear axis


def draw(answers: Sequence[Any]) -> Figure:
    """Draw one row per setting, with a line and a marker per run, over a common axis of updates.

    ``answers`` are ``replay.Answer`` objects. A marker has one of these meanings:
    - filled: the setting fires here.
    - open: the history ends here, and the setting has not fired.

    A marker that lies on the axis of updates has no margin.
    """
    rows: dict[str, list[Any]] = {}
    for answer in answers:
        rows.setdefault(answer.setting, []).append(answer)
    runs = list(dict.fromkeys(answer.run for answer in answers))
    styles = dict(zip(runs, run_styles(len(runs)), strict=True))
    size = _size(len(rows), len(runs))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False)
    axes = grid[:, 0]
    for axis, (setting, found) in zip(axes, rows.items(), strict=True):
        _draw_row(axis, setting, found, styles)
    axes[-1].set_xlim(left=0)
    axes[-1].set_xlabel("optimizer updates", fontsize=9)
    figure.supylabel("margin of the deciding target, in the criterion's unit", fontsize=9)
    handles = _samples(axes[0], styles)
    figure.legend(handles=handles, ncols=LEGEND_COLUMNS, **ABOVE)
    return figure


def _size(rows: int, runs: int) -> tuple[float, float]:
    """Return width and height of the figure in inches."""
    height = 1.15 if rows <= FEW_SETTINGS else 0.72
    legend_height = 0.22 * (1 + runs // LEGEND_COLUMNS)
    return 7.2, height * rows + 0.6 + legend_height


def _samples(axis: Axes, styles: Mapping[str, Style]) -> list[Artist]:
    """Return the legend entries: each run's style, a filled and an open marker."""
    handles: list[Artist] = []
    for run, style in styles.items():
        handles += axis.plot([], [], markersize=5, label=run, **style)
    marker: Style = {"linestyle": "none", "marker": "o", "color": GREY}
    handles += axis.plot([], [], markerfacecolor=GREY, label="fires", **marker)
    end = "the history ends without"
    handles += axis.plot([], [], markerfacecolor="none", label=end, **marker)
    return handles


def _draw_row(
    axis: Axes, setting: str, answers: Sequence[Any], styles: Mapping[str, Style]
) -> None:
    margins: list[float] = []
    for answer in answers:
        style = styles[answer.run]
        if answer.curve:
            updates, own = zip(*answer.curve, strict=True)
            color = style["color"]
            axis.plot(updates, own, color=color, linestyle=style["linestyle"], linewidth=1.3)
            margins += own
        _draw_end(axis, answer, style)
    _scale(axis, margins)
    axis.set_title(setting, fontsize=9, loc="left")
    axis.set_title(_outcomes(answers), fontsize=8, loc="right", color=GREY)
    tidy(axis)


def _draw_end(axis: Axes, answer: Any, style: Style) -> None:
    """Draw the marker where an answer fires or its history ends."""
    fires = answer.fires_at is not None
    update = answer.fires_at if fires else answer.measured_until
    if answer.curve:
        _, height = answer.curve[-1]
        place = axis.transData
    else:
        height = 0.0
        place = axis.get_xaxis_transform()
    axis.plot(
        update,
        height,
        marker=style["marker"],
        markersize=6,
        color=style["color"],
        markerfacecolor=style["color"] if fires else "white",
        transform=place,
        clip_on=False,
        zorder=3,
    )


def _scale(axis: Axes, margins: Sequence[float]) -> None:
    """Make the axis linear, or symmetric logarithmic when some margins dwarf the others."""
    sizes = np.abs(margins)
    if not sizes.size:
        axis.set_yticks([])
        return
    if sizes.max() > EARLY_PEAK * np.median(sizes) > 0:
        axis.set_yscale("symlog", linthresh=float(np.median(sizes)))
    else:
        axis.locator_params(axis="y", nbins=3)
    axis.margins(y=0.15)
    axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")


def _outcomes(answers: Sequence[Any]) -> str:
    if len(answers) <= TOLD_APART:
        return "; ".join(map(_outcome, answers))
    fired = [answer.fires_at for answer in answers if answer.fires_at is not None]
    if not fired:
        return f"fires in none of {len(answers)} runs"
    first = min(fired)
    last = max(fired)
    span = f"{first} to {last}" if first < last else str(first)
    return f"fires in {len(fired)} of {len(answers)} runs, at {span}"


def _outcome(answer: Any) -> str:
    return f"fires at {answer.outcome}" if answer.fires_at is not None else answer.outcome
