"""Marks on pictures over optimizer updates: shades for phases, lines for changes."""

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from switchlora.analysis.timeline import Change, Span, Timeline

SHADES = {"full": "#dfe7f1", "joint": "#dfeedd", "staged": "#ebe2f1", "adapter": "#f6e6d3"}
"""the background colour of each phase"""
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREY = "#555555"
NAMES = {"settle": "weights frozen", "grow": "ranks grow", "take_back": "taken back"}
ROOM = 0.045  # share of the axis that a name along a line needs
TICK = 0.04  # height of a tick, as a share of the axis


def shade(axis: Axes, spans: Sequence[Span], last: int) -> None:
    """Shade each phase until update ``last``. A phase that occurs again gets only one label."""
    told = set()
    for phase, begin, end in spans:
        if begin < last:
            label = None if phase in told else f"{phase} phase"
            until = min(end, last)
            axis.axvspan(begin, until, color=SHADES[phase], label=label)
            told.add(phase)
    axis.set_xlim(0, last)


def mark_changes(axis: Axes, changes: Sequence[Change], last: int) -> None:
    """Draw a thin line at each change until update ``last``, with its name if there is room.

    Restarts are drawn as ticks on the axis, because there are many of them.
    """
    named = -float("inf")
    for kind, update in changes:
        if update > last:
            continue
        if kind == "restart":
            tick(axis, update)
            continue
        _draw_upright(axis, update, 0.8)
        if update - named > ROOM * last:
            name = NAMES.get(kind, kind)
            shift = -1 if update > ROOM * last else 1
            _name(axis, update, name, shift, rotation=90, fontsize=7)
            named = update


def tick(axis: Axes, update: int, color: str = ORANGE) -> None:
    """Draw a short line upwards from the axis of updates."""
    transform = axis.get_xaxis_transform()
    axis.plot([update, update], [0, TICK], color=color, linewidth=1, transform=transform)


def keys(course: Timeline, last: int) -> list[Artist]:
    """Return legend entries for the shades and the ticks until update ``last``."""
    begun = [span.phase for span in course.spans if span.begin < last]
    found: list[Artist] = []
    for phase in dict.fromkeys(begun):
        found.append(Patch(color=SHADES[phase], label=f"{phase} phase"))
    return found + restart_key(course.changes, last)


def restart_key(changes: Sequence[Change], last: int) -> list[Artist]:
    """Return the legend entry for restarts, if there are any until update ``last``."""
    restarts = [change for change in changes if change.kind == "restart"]
    if not restarts or restarts[0].num_updates > last:
        return []
    look: dict[str, Any] = {"marker": "|", "linestyle": "", "color": ORANGE, "markersize": 7}
    return [Line2D([], [], label="restart", **look)]


def mark_end(axis: Axes, switch: int | None) -> None:
    """Draw a line at the ``switch``, if there is one, on a picture whose curves end there."""
    if switch is not None:
        _draw_upright(axis, switch, 1.2)
        _name(axis, switch, "switch", -3, fontsize=8)


def _draw_upright(axis: Axes, update: int, width: float) -> None:
    axis.axvline(update, color=ORANGE, linestyle="--", linewidth=width)


def _name(axis: Axes, update: int, name: str, shift: float, **look: Any) -> None:
    """Write ``name`` at the top of the line at ``update``.

    The text ends (``shift`` < 0) or begins so many points beside the line.
    """
    axis.annotate(
        name,
        (update, 1),
        xytext=(shift, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if shift < 0 else "left",
        va="top",
        color=ORANGE,
        **look,
    )
