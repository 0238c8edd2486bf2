"""Draw the replay: a row per setting, with its deciding margin over updates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchlora.analysis.figures import run_styles, tidy
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
    runs = list(dict.fromkeys(a.run for a in answers))
    styles = dict(zip(runs, run_styles(len(runs)), strict=True))
    height = 1.15 if len(rows) <= FEW_SETTINGS else 0.72
    legend_height = 0.22 * (1 + len(runs) // LEGEND_COLUMNS)
    size = (7.2, height * len(rows) + 0.6 + legend_height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (setting, found) in zip(axes, rows.items(), strict=True):
        _draw_row(axis, setting, found, styles)
    axes[-1].set_xlim(left=0)
    axes[-1].set_xlabel("optimizer updates", fontsize=9)
    figure.supylabel("margin of the deciding target, in the criterion's unit", fontsize=9)
    handles = [axes[0].plot([], [], markersize=5, **style)[0] for style in styles.values()]
    handles += [
        _sample(axes[0], GREY, "fires"),
        _sample(axes[0], "none", "the history ends without"),
    ]
    figure.legend(
        handles,
        [*runs, *(handle.get_label() for handle in handles[-2:])],
        loc="outside upper center",
        ncols=LEGEND_COLUMNS,
        fontsize=8,
        frameon=False,
    )
    return figure


def _draw_row(
    axis: Axes, setting: str, answers: Sequence[Any], styles: Mapping[str, dict[str, Any]]
) -> None:
    for answer in answers:
        style = styles[answer.run]
        updates, margins = zip(*answer.curve, strict=True) if answer.curve else ((), ())
        line = {key: style[key] for key in ("color", "linestyle")}
        axis.plot(updates, margins, linewidth=1.3, **line)
        fires = answer.fires_at is not None
        axis.plot(
            answer.fires_at if fires else answer.measured_until,
            margins[-1] if margins else 0.0,
            marker=style["marker"],
            markersize=6,
            color=style["color"],
            markerfacecolor=style["color"] if fires else "white",
            transform=axis.transData if margins else axis.get_xaxis_transform(),
            clip_on=False,
            zorder=3,
        )
    _scale(axis, [m for answer in answers for _, m in answer.curve])
    axis.set_title(setting, fontsize=9, loc="left")
    axis.set_title(_outcomes(answers), fontsize=8, loc="right", color=GREY)
    tidy(axis)


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
        return "; ".join(_outcome(answer) for answer in answers)
    fired = [a.fires_at for a in answers if a.fires_at is not None]
    if not fired:
        return f"fires in none of {len(answers)} runs"
    span = f"{min(fired)} to {max(fired)}" if min(fired) < max(fired) else str(fired[0])
    return f"fires in {len(fired)} of {len(answers)} runs, at {span}"


def _outcome(answer: Any) -> str:
    return f"fires at {answer.outcome}" if answer.fires_at is not None else answer.outcome


def _sample(axis: Axes, face: str, label: str) -> Any:
    return axis.plot(
        [], [], linestyle="none", marker="o", color=GREY, markerfacecolor=face, label=label
    )[0]
