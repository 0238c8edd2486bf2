"""Draw the pictures of a card: reliability and errors under corruption, in the page's colours."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchlora.analysis.page.colors import COLORS
from switchlora.analysis.page.curves import MARGINS, SVG_STYLE, inline_svg

Panels = list[tuple[str, Markup]]
"""the title and picture of each chart"""
BLUE, ORANGE, BLACK = COLORS[0], COLORS[1], COLORS[-1]
SIZE = (3.6, 2.5)


def reliability_panels(calibration: Mapping[str, Any]) -> Panels:
    """Return the reliability diagram, before and after the temperature."""
    titles = {"before": "As trained", "after": "After temperature scaling"}
    panels = []
    for key, title in titles.items():
        if "reliability" in calibration[key]:
            bins = calibration[key]["reliability"]
            told = "accuracy over confidence; the diagonal is perfect calibration"
            picture = reliability_diagram(bins, calibration["bins"], key, f"{title}: {told}")
            panels.append((title, picture))
    return panels


def reliability_diagram(
    bins: Sequence[Mapping[str, Any]], count: int, name: str, told: str
) -> Markup:
    """Draw the accuracy of each bin of confidence; dots grow with the predictions in it."""
    most = max(each["predictions"] for each in bins)
    with matplotlib.rc_context(SVG_STYLE):
        figure, axis = panel()
        axis.plot([0, 1], [0, 1], color="#777777", linewidth=1)
        confidence = [each["confidence"] for each in bins]
        accuracy = [each["accuracy"] for each in bins]
        sizes = [12 + 90 * each["predictions"] / most for each in bins]
        axis.vlines(confidence, confidence, accuracy, color=ORANGE, linewidth=1)
        axis.scatter(confidence, accuracy, sizes, color=BLUE, zorder=3)
        axis.set_xlabel("confidence")
        axis.set_xlim(-0.03, 1.05)
        axis.set_ylim(-0.05, 1.08)
        return inline_svg(figure, f"reliability-{name}", told)


def corruption_panels(robustness: Mapping[str, Any]) -> Panels:
    """Return the error of each corruption over its severity, beside the runs compared with."""
    reference = {each["corruption"]: each["error"] for each in robustness.get("reference", ())}
    panels = []
    top = highest(robustness)
    for each in robustness["corruptions"]:
        name = each["corruption"]
        errors = {"this model": each["error"], "compared with": reference.get(name)}
        picture = corruption_curve(name, errors, robustness["clean_error"], top)
        panels.append((name, picture))
    return panels


def highest(robustness: Mapping[str, Any]) -> float:
    """Return the largest error of all curves."""
    curves = [*robustness["corruptions"], *robustness.get("reference", ())]
    return max(max(each["error"]) for each in curves)


def corruption_curve(
    name: str, errors: Mapping[str, Sequence[float] | None], clean: float, top: float
) -> Markup:
    """Draw the errors of one corruption; severity 0 is the clean image."""
    looks = {"this model": (BLUE, "o-"), "compared with": (BLACK, "s--")}
    with matplotlib.rc_context(SVG_STYLE):
        figure, axis = panel()
        axis.axhline(clean, color="#777777", linewidth=1)
        for label, values in errors.items():
            if values is not None:
                color, style = looks[label]
                severities = range(1, len(values) + 1)
                axis.plot(severities, values, style, color=color, markersize=3.5, linewidth=1.3)
        axis.set_xlabel("severity")
        axis.set_xticks(range(1, 6))
        axis.set_ylim(0, max(1.0, 1.05 * top))
        told = f"{name}: error in % over severity; the grey line is the error on clean images"
        return inline_svg(figure, f"corruption-{name}", told)


def panel() -> tuple[Figure, Axes]:
    """Return a small figure and its axis, as those of the report."""
    figure = Figure(figsize=SIZE)
    axis = figure.subplots(gridspec_kw=MARGINS)
    axis.grid(color="#888888", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis
