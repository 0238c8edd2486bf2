"""Draw curves of many runs for a page: small panels as inline SVG in the page's colours."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import product
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchlora.analysis.figures import STATISTICS
from switchlora.analysis.page.colors import COLORS, PAGE_COLORS, TRUNK
from switchlora.analysis.timeline import (
    Change,
    by_family,
    measured_targets,
    number,
    read_timeline,
    series,
)
from switchlora.storage import Record

DASHES = ("", "6 2", "1.5 1.5", "7 2 1.5 2")
STYLES = [(color, dash) for dash, color in product(DASHES, COLORS)]
"""colour and SVG dashes of each group of runs"""
HEADINGS = {
    "relative_update_norm": "Update norm relative to the weight's, %",
    "update_stable_rank": "Stable rank of the update",
    "weight_stable_rank": "Stable rank of the weight",
}
"""by statistic, the heading of its charts"""
VALIDATION = {"val/top1": "Validation top1, %", "val/loss": "Validation loss"}
DIFFERENCE = "Top1, difference to full training, points"
MOST_POINTS = 240  # on a curve, so that the page stays small
SVG_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "switchlora",
    "font.size": 10,
}
MARGINS = {"left": 0.13, "right": 0.97, "bottom": 0.21, "top": 0.95}
SWITCHES = ("switch", "stage")
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
MARKER: dict[str, Any] = {
    "zorder": 5,
    "markersize": 6,
    "markeredgecolor": "#ffffff",
    "markeredgewidth": 0.8,
}
MARKERS = {
    "switch": "o",
    "stage": "o",
    "settle": "D",
    "grow": "^",
    "take_back": "X",
}
"""the marker of each kind of change; restarts have none"""
Limits = tuple[float, float]
"""the lower and upper end of a y axis"""


@dataclass(frozen=True)
class Curve:
    """One run's values over its optimizer updates, drawn in the style of its ``group``."""

    group: int
    updates: Sequence[float] | np.ndarray
    values: Sequence[float] | np.ndarray
    changes: Sequence[Change] = ()
    shared_until: float = -math.inf
    """the last update until which a run of another group has the same values"""

    def thinned(self) -> "Curve":
        """Return the curve with at most ``MOST_POINTS`` finite points, including both ends."""
        finite = np.flatnonzero(np.isfinite(self.values))
        count = min(len(finite), MOST_POINTS)
        places = np.linspace(0, len(finite) - 1, count).round()
        kept = finite[places.astype(int)]
        updates = np.asarray(self.updates)[kept]
        values = np.asarray(self.values)[kept]
        return replace(self, updates=updates, values=values)


def family_medians(record: Record, group: int) -> dict[str, dict[str, Curve]]:
    """Return, by statistic and family, the median over the family's layers per measurement."""
    course = read_timeline(list(record.events()))
    found: dict[str, dict[str, Curve]] = {}
    for key, _, unit in STATISTICS.values():
        curves = {}
        for name, members in by_family(measured_targets(course, key)).items():
            statistics = [f"{key}/{member}" for member in members]
            updates, values = series(course.windows, statistics, unit)
            curves[name] = Curve(group, updates, medians(values), course.changes)
        found[key] = curves
    return found


def medians(values: np.ndarray) -> np.ndarray:
    """Return medians (windows) over the measured layers; NaN when no layer was measured."""
    found = np.full(len(values), math.nan)
    seen = np.isfinite(values).any(axis=1)
    found[seen] = np.nanmedian(values[seen], axis=1)
    return found


def validation_curves(record: Record, group: int) -> dict[str, Curve]:
    """Return, by the title of its chart, the curves of validation loss and top1."""
    events = list(record.events())
    changes = read_timeline(events).changes
    updates = []
    evaluations = []
    for event in events:
        if event["event"] == "eval" and event.keys() >= VALIDATION.keys():
            evaluations.append(event)
            updates.append(event["num_updates"])
    curves = {}
    for key, title in VALIDATION.items():
        values = [number(event[key]) for event in evaluations]
        curves[title] = Curve(group, updates, values, changes)
    return curves


def difference_curve(record: Record, references: Sequence[Record], group: int) -> Curve | None:
    """Return top1 minus the mean of the ``references``, at the updates at which all have one.

    Return None when there are no such updates.
    """
    mine = _top1_by_update(record)
    theirs = list(map(_top1_by_update, references))
    updates = sorted(set(mine).intersection(*theirs)) if theirs else []
    if not updates:
        return None
    values = []
    for update in updates:
        mean = sum(each[update] for each in theirs) / len(theirs)
        values.append(mine[update] - mean)
    return Curve(group, updates, values, read_timeline(list(record.events())).changes)


def _top1_by_update(record: Record) -> dict[int, float]:
    found = {}
    for event in record.events("eval"):
        if "val/top1" in event:
            found[event["num_updates"]] = number(event["val/top1"])
    return found


def late_limits(curves: Sequence[Curve]) -> Limits | None:
    """Return limits of a y axis that shows 0, and the curves in the second half of the updates."""
    last = max((curve.updates[-1] for curve in curves if len(curve.updates)), default=0)
    late = []
    for curve in curves:
        updates = np.asarray(curve.updates)
        values = np.asarray(curve.values, dtype=float)[updates >= last / 2]
        late.append(replace(curve, values=[0.0, *values]))
    return shared_limits(late)


def with_common_phases(curves: Sequence[Curve]) -> list[Curve]:
    """Return the curves, each with the update until which one of another group is the same.

    What comes after a run's first switch is its own, even when another run does the same.
    """
    found = []
    for curve in curves:
        others = [other for other in curves if other.group != curve.group]
        count = max((common_points(curve, other) for other in others), default=0)
        until = curve.updates[count - 1] if count else -math.inf
        switches = [change.num_updates for change in curve.changes if change.kind in SWITCHES]
        found.append(replace(curve, shared_until=min([until, *switches])))
    return found


def common_points(one: Curve, other: Curve) -> int:
    """Return how many points at the beginning of two curves are equal."""
    size = min(len(one.updates), len(other.updates))
    points = np.array([one.updates[:size], one.values[:size]], dtype=float)
    others = np.array([other.updates[:size], other.values[:size]], dtype=float)
    same = ((points == others) | (np.isnan(points) & np.isnan(others))).all(axis=0)
    return size if same.all() else int(np.argmin(same))


def panel(
    curves: Sequence[Curve],
    name: str,
    description: str,
    limits: Limits | None,
    zero: bool = False,
) -> Markup:
    """Draw a chart as inline SVG. Its ids begin with ``name``, which must be unique on the page.

    - What runs of several groups have in common is drawn once, in grey: ``-trunk-<number>``.
    - The rest of a curve is a ``<g>`` whose id ends in ``-g<group>-<number>``.
    - A change on a curve is a marker. Its id is the curve's id followed by ``-<kind>``. From the
      second change of one kind on, a number follows.

    ``limits`` are the limits of the y axis; with None the axis chooses its own. ``zero`` draws a
    line at 0.
    """
    curves = with_common_phases(curves)
    with matplotlib.rc_context(SVG_STYLE):
        figure = Figure(figsize=(3.6, 2.3))
        axis = figure.subplots(gridspec_kw=MARGINS)
        if zero:
            axis.axhline(0, color="#555555", linewidth=0.8)
        _draw_common(axis, curves)
        for place, curve in enumerate(curves):
            _draw(axis, curve.thinned(), f"g{curve.group}-{place}")
        axis.set_xlabel("optimizer updates")
        axis.set_xlim(left=0)
        axis.set_ylim(limits)
        axis.grid(color="#888888", alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        return inline_svg(figure, name, description)


def shared_limits(curves: Iterable[Curve]) -> Limits | None:
    """Return limits of a y axis that shows all of ``curves``.

    Return None when there are no finite values or all of them are equal.
    """
    values: list[float] = []
    for curve in curves:
        values += filter(math.isfinite, curve.values)
    if not values or min(values) == max(values):
        return None
    low = min(values)
    high = max(values)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """Return a figure as SVG for a page, with its own ids, the page's colours and no metadata."""
    text = StringIO()
    with matplotlib.rc_context(SVG_STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    return adopted(text.getvalue(), name, description)


def adopted(svg: str, name: str, description: str) -> Markup:
    """Turn matplotlib's SVG file into an ``<svg>`` element for a page.

    Ids get the prefix ``name``, so that they do not clash with other pictures. Fixed colours
    become the page's colours.
    """
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' d="[^"]*"', _with_two_decimals, svg)
    for color, page_color in PAGE_COLORS.items():
        svg = re.sub(rf"{color}(?=[;\"])", page_color, svg, flags=re.IGNORECASE)
    label = f'<svg role="img" aria-label="{escape(description)}" '
    return Markup(label + svg.removeprefix("<svg "))  # noqa: S704


def _with_two_decimals(path: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])


def _draw_common(axis: Axes, curves: Sequence[Curve]) -> None:
    """Draw what curves of several groups have in common, each stretch once."""
    drawn: list[Curve] = []
    for curve in sorted(curves, key=lambda curve: curve.shared_until, reverse=True):
        count = int(np.sum(np.asarray(curve.updates) <= curve.shared_until))
        if not count or any(common_points(curve, other) >= count for other in drawn):
            continue
        common = replace(curve, updates=curve.updates[:count], values=curve.values[:count])
        shown = common.thinned()
        look: dict[str, Any] = {"color": TRUNK, "linewidth": 1.6, "gid": f"trunk-{len(drawn)}"}
        axis.plot(shown.updates, shown.values, **look)
        drawn.append(common)


def _draw(axis: Axes, curve: Curve, gid: str) -> None:
    color, dash = STYLES[curve.group % len(STYLES)]
    lengths = list(map(float, dash.split()))
    dashes = (0, lengths) if lengths else "solid"
    common = np.count_nonzero(np.asarray(curve.updates) <= curve.shared_until)
    own = slice(max(common - 1, 0), None)
    updates, values = np.asarray(curve.updates)[own], np.asarray(curve.values)[own]
    axis.plot(updates, values, color=color, linestyle=dashes, linewidth=1.3, gid=gid)
    if len(curve.updates):
        _mark_changes(axis, curve, color, gid)


def _mark_changes(axis: Axes, curve: Curve, color: str, gid: str) -> None:
    """Draw a marker on the curve at each change that it reaches."""
    told: Counter[str] = Counter()
    first = curve.updates[0]
    last = curve.updates[-1]
    for kind, update in curve.changes:
        if kind in MARKERS and first <= update <= last:
            height = np.interp(update, curve.updates, curve.values)
            name = f"{gid}-{kind}-{told[kind]}" if told[kind] else f"{gid}-{kind}"
            axis.plot(update, height, MARKERS[kind], color=color, gid=name, **MARKER)
            told[kind] += 1


def group_swatches(labels: Mapping[int, str]) -> list[tuple[int, str, str, str]]:
    """Return number, label, colour and dashes of each group, for the legend."""
    swatches = []
    for group, label in sorted(labels.items()):
        color, dash = STYLES[group % len(STYLES)]
        page_color = PAGE_COLORS.get(color, color)
        swatches.append((group, label, page_color, dash))
    return swatches
