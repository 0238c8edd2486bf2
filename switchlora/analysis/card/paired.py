"""Compare two models on the same images: McNemar's exact test, churn, classes that got worse."""

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from switchlora.analysis.card.accuracy import share
from switchlora.analysis.card.intervals import LEVEL, Interval, resampled_mean
from switchlora.analysis.card.predictions import Predictions
from switchlora.analysis.correction import holm

ALPHA = 0.05
POWER = 0.8
Found = dict[str, Any]


def compare(ours: Predictions, theirs: Predictions, names: Sequence[str]) -> Found:
    """Return how two models differ on the same images.

    - ``lost`` and ``won`` count the images that theirs and ours alone get right. Of text they
      count the windows of which one gets more bytes right.
    - ``p`` is that of McNemar's exact test; of text of the sign test over windows.
    - ``difference`` is in points of top1, with the interval that belongs to the test.
    - ``churn`` is the share of predictions that differ, in %.
    """
    found = counted(ours, theirs)
    changed = ours.choices != theirs.choices
    return {
        **found,
        "top1": float(100 * theirs.correct.mean()),
        "difference": difference(ours, theirs, found["lost"], found["won"]),
        "churn": share(ours, changed),
        "classes": worse_classes([ours_and_theirs(ours, theirs, names)]) if ours.of_images else [],
        "smallest_drop": smallest_drop(ours.units, found["lost"] + found["won"], ALPHA),
    }


def counted(ours: Predictions, theirs: Predictions, rows: np.ndarray | None = None) -> Found:
    """Return the units lost and won, of all or of some ``rows``, and the p of the sign test."""
    gain = ours.by_unit(ours.correct) - theirs.by_unit(theirs.correct)
    gain = gain if rows is None else gain[rows]
    lost, won = int((gain < 0).sum()), int((gain > 0).sum())
    return {"lost": lost, "won": won, "p": sign_test(lost, won)}


def sign_test(lost: int, won: int) -> float:
    """Return the two-sided p of so many units that got worse and better; of images McNemar's."""
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def difference(ours: Predictions, theirs: Predictions, lost: int, won: int) -> dict[str, float]:
    """Return the difference of top1 in points.

    Of images the interval is the exact one of the share lost among those that differ.
    """
    value = 100 * float(ours.correct.mean() - theirs.correct.mean())
    if not ours.of_images:
        gain = ours.by_unit(ours.correct) - theirs.by_unit(theirs.correct)
        return resampled_mean(gain).scaled(100).plain()
    differ = lost + won
    if not differ:
        return Interval(value, value, value).plain()
    found = binomtest(won, differ).proportion_ci(LEVEL)
    points = 100 * differ / ours.units
    low, high = (points * (2 * float(end) - 1) for end in (found.low, found.high))
    return Interval(value, low, high).plain()


def ours_and_theirs(ours: Predictions, theirs: Predictions, names: Sequence[str]) -> list[Found]:
    """Return of each class that has images its counts, its p, and both accuracies in %."""
    labels = ours.labels.numpy()
    classes = []
    for number in np.unique(labels):
        rows = np.flatnonzero(labels == number)
        before, after = theirs.correct[rows].mean(), ours.correct[rows].mean()
        numbers = {"images": len(rows), "before": 100 * before, "after": 100 * after}
        classes.append({"class": names[number], **numbers, **counted(ours, theirs, rows)})
    return classes


def worse_classes(comparisons: Sequence[Sequence[Found]]) -> list[Found]:
    """Return the classes that are worse than in each comparison, after Holm's correction.

    Of several comparisons the one with the largest p counts, of each class.
    """
    weakest = [max(each, key=p_of_loss) for each in zip(*comparisons, strict=True)]
    corrected = holm([p_of_loss(each) for each in weakest])
    worse = []
    for each, p in zip(weakest, corrected, strict=True):
        if p < ALPHA:
            worse.append({**each, "p_holm": p})
    return sorted(worse, key=lambda each: each["p_holm"])


def p_of_loss(found: Found) -> float:
    """Return the p of a comparison where more is lost than won; 1 elsewhere."""
    return found["p"] if found["lost"] > found["won"] else 1.0


def smallest_drop(units: int, differ: int, alpha: float) -> float:
    """Return the smallest drop, in points, that a paired test finds four times out of five.

    ``differ`` is how many of the ``units`` two models treat differently. Fewer than ``least`` of
    them say nothing, whichever way they point.
    """
    least = math.ceil(math.log2(2 / alpha))
    share_differing = max(differ, least) / units
    by_chance = (norm.ppf(1 - alpha / 2) + norm.ppf(POWER)) * math.sqrt(share_differing / units)
    return float(100 * min(1.0, max(by_chance, least / units)))


def yardstick(against: Sequence[Predictions]) -> float | None:
    """Return the mean churn between every two of the runs compared with, in %; None for one."""
    churns = [100 * float((a.choices != b.choices).mean()) for a, b in combinations(against, 2)]
    return fmean(churns) if churns else None


def verdict(
    ours: Predictions, against: Sequence[Predictions], names: Sequence[str], noun: str
) -> Found:
    """Return whether ours is a regression, and one sentence that says why.

    It is one when top1, or some class after Holm's correction, is worse than in each run that it
    is compared with: beside one of two seeds of full training the other may be worse too.
    """
    if not against:
        return {
            "regression": None,
            "sentence": "not compared: give --against RUN of full training",
        }
    compared = [compare(ours, theirs, names) for theirs in against]
    nearest = max(compared, key=p_of_loss)
    lower = p_of_loss(nearest) < ALPHA
    classes: list[Found] = []
    if ours.of_images:
        classes = worse_classes([ours_and_theirs(ours, each, names) for each in against])
    told = [told_of_top1(ours, nearest), *map(told_of_class, classes[:3])]
    if len(classes) > 3:
        told.append(f"{len(classes) - 3} more classes are worse")
    churn = told_of_churn(compared, yardstick(against), noun)
    if not lower and not classes:
        least = max(each["smallest_drop"] for each in compared)
        drop = f"a drop of {least:.1f} points would have been found"
        head = f"no silent regression found at {ALPHA:.0%}".replace("%", " %")
        return {"regression": False, "sentence": f"{head}: {told[0]}; {churn}; {drop}"}
    head = "regression" if lower else "silent regression"
    return {"regression": True, "sentence": f"{head}: {'; '.join(told)}; {churn}"}


def told_of_top1(ours: Predictions, nearest: Found) -> str:
    """Return a clause on top1 of both."""
    top1 = 100 * float(ours.correct.mean())
    points = nearest["difference"]["value"]
    p = "p below 0.0001" if nearest["p"] < 1e-4 else f"p {nearest['p']:.2g}"
    return f"top1 {top1:.2f} % against {nearest['top1']:.2f} % ({points:+.2f} points, {p})"


def told_of_class(found: Found) -> str:
    """Return a clause on a class that got worse."""
    return (
        f"class {found['class']} has {found['after']:.1f} % right against {found['before']:.1f} % "
        f"(of {found['images']})"
    )


def told_of_churn(compared: Sequence[Found], own: float | None, noun: str) -> str:
    """Return a clause on churn, beside that among the runs compared with."""
    churn = f"churn {fmean(each['churn']['value'] for each in compared):.1f} %"
    if own is None:
        return f"{churn} (a second --against would say how much of it {noun} has by itself)"
    count = len(compared)
    return f"{churn}, of which the {count} runs of {noun} have {own:.1f} % among themselves"
