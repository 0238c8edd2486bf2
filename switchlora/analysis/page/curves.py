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
from switchlora.analysis.timeline import Change, measured_targets, number, read_timeline, series
from switchlora.names import family
from switchlora.storage import Record

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111")
"""the colour-blind-safe palette of Okabe and Ito; black becomes the page's text colour"""
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
MOST_POINTS = 240  # on a curve, so that the page stays small
PAGE_COLORS = {
    **dict.fromkeys(("#000000", "#111111", "#555555"), "currentColor"),
    "#ffffff": "var(--card)",
}
SVG_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "switchlora",
    "font.size": 10,
}
MARGINS = {"left": 0.13, "right": 0.97, "bottom": 0.21, "top": 0.95}
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


def by_family(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of targets by their family."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family(name), []).append(name)
    return families


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


def panel(curves: Sequence[Curve], name: str, description: str, limits: Limits | None) -> Markup:
    """Draw a chart as inline SVG. Its ids begin with ``name``, which must be unique on the page.

    - A curve is a ``<g>`` whose id ends in ``-g<group>-<number>``.
    - A change on a curve is a marker. Its id is the curve's id followed by ``-<kind>``. From the
      second change of one kind on, a number follows.

    ``limits`` are the limits of the y axis; with None the axis chooses its own.
    """
    with matplotlib.rc_context(SVG_STYLE):
        figure = Figure(figsize=(3.6, 2.3))
        axis = figure.subplots(gridspec_kw=MARGINS)
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


def _draw(axis: Axes, curve: Curve, gid: str) -> None:
    color, dash = STYLES[curve.group % len(STYLES)]
    lengths = list(map(float, dash.split()))
    dashes = (0, lengths) if lengths else "solid"
    axis.plot(curve.updates, curve.values, color=color, linestyle=dashes, linewidth=1.3, gid=gid)
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
