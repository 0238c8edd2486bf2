"""Draw two samples beside each other: classes, confidence, the feature that moved most, MMD."""

from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchlora.analysis.drift.sample import Sample
from switchlora.analysis.drift.statistics import Found, counts_of
from switchlora.analysis.figures import tidy
from switchlora.analysis.marks import BLUE, GREY, ORANGE

SHOWN = 20
"""classes in the picture: those that changed most"""
BINS = 25
WIDTH = 110
"""letters of a line above the picture"""


def draw(known: Sample, new: Sample, found: Found, verdict: str) -> Figure:
    """Draw four panels, one a question, with the verdict above them."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    classes, confidence, feature, together = figure.subplots(2, 2).flat
    draw_classes(classes, known, new)
    draw_two(confidence, known.confidence.numpy(), new.confidence.numpy())
    confidence.set_xlabel("confidence")
    most = int(np.argmax(found.ks))
    draw_two(feature, known.features[:, most].numpy(), new.features[:, most].numpy())
    feature.set_xlabel(f"feature {most}, which moved most")
    draw_null(together, found)
    for axis, test in zip((classes, confidence, feature, together), found.tests, strict=True):
        title = f"{test.about}: {test.statistic} {test.value:.3g}, p {test.adjusted:.2g}"
        axis.set_title(title, fontsize=10)
        tidy(axis)
    handles, labels = confidence.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(fill(verdict, WIDTH), fontsize=10)
    return figure


def draw_classes(axis: Axes, known: Sample, new: Sample) -> None:
    """Draw the share of images that are predicted to be of each class."""
    one = counts_of(known) / len(known)
    other = counts_of(new) / len(new)
    chosen = np.sort(np.argsort(-np.abs(other - one), kind="stable")[:SHOWN])
    places = np.arange(len(chosen))
    axis.bar(places - 0.2, one[chosen], width=0.4, color=BLUE)
    axis.bar(places + 0.2, other[chosen], width=0.4, color=ORANGE)
    axis.set_xticks(places, [str(number) for number in chosen], fontsize=8)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("share of the images")


def draw_two(axis: Axes, known: np.ndarray, new: np.ndarray) -> None:
    """Draw the histograms of a number in both samples."""
    bins = np.histogram_bin_edges(np.concatenate([known, new]), bins=BINS).tolist()
    axis.hist(known, bins, density=True, color=BLUE, alpha=0.5, label="known")
    axis.hist(new, bins, density=True, color=ORANGE, alpha=0.5, label="new")
    axis.set_ylabel("density")


def draw_null(axis: Axes, found: Found) -> None:
    """Draw what MMD is for images that are mixed, and what it is here."""
    axis.hist(found.null, BINS, color=GREY, alpha=0.5)
    axis.axvline(found.mmd, color=ORANGE)
    axis.set_xlabel("MMD$^2$: of mixed images (grey), of these (line)")
    axis.set_ylabel("permutations")
