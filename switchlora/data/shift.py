"""Compare two samples of images: channels, labels, and whether a classifier tells the samples.

A classifier that has not seen an image guesses its sample right half of the time if both samples
come from one distribution. How far it does better is tested exactly, by the binomial distribution.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.001
"""largest p-value of what counts as a shift; small, since a report makes many tests"""
SMALL_EFFECT = 0.2
"""smallest effect that counts, in standard deviations: what Cohen calls small"""
LEAST_ACCURACY = 0.55
"""of the classifier, for what counts as a shift"""
MOST = 1000
"""images of each sample that the classifier gets"""
FEWEST = 20
"""images of each sample without which nothing is tested"""
FOLDS = 5
SIDE = 8
"""pixels of the images that the classifier gets, in each direction"""


@dataclass(frozen=True)
class Effect:
    """How far a statistic of images differs between two samples."""

    statistic: str
    first: float
    second: float
    effect: float
    """difference in standard deviations of images (Cohen's d)"""
    p_value: float

    @property
    def shifted(self) -> bool:
        """Whether the difference is no chance, and no trifle."""
        return bool(self.p_value < LEVEL and abs(self.effect) >= SMALL_EFFECT)


@dataclass(frozen=True)
class TwoSample:
    """How well a classifier tells the samples of images that it has not seen."""

    classifier: str
    images: int
    accuracy: float
    p_value: float
    """of two classifiers, the better one's, doubled"""

    @property
    def shifted(self) -> bool:
        """Whether it does better than chance, and by more than a trifle."""
        return bool(self.p_value < LEVEL and self.accuracy >= LEAST_ACCURACY)


def effects(first: np.ndarray, second: np.ndarray, statistic: str) -> list[Effect]:
    """Return, for each channel, how far a statistic (images, channels) differs."""
    found = []
    for channel in range(first.shape[1]):
        name = f"{statistic} of channel {channel}" if first.shape[1] > 1 else statistic
        found.append(effect(first[:, channel], second[:, channel], name))
    return found


def effect(first: np.ndarray, second: np.ndarray, statistic: str) -> Effect:
    """Return how far the means of two samples differ, with the p-value of Welch's test."""
    from scipy import stats

    mean, other = float(first.mean()), float(second.mean())
    spread = float(np.sqrt((first.var() + second.var()) / 2))
    if min(len(first), len(second)) < FEWEST or spread == 0:
        return Effect(statistic, mean, other, 0.0, 1.0)
    p_value = float(stats.ttest_ind(first, second, equal_var=False).pvalue)
    return Effect(statistic, mean, other, (other - mean) / spread, p_value)


def two_sample_test(first: np.ndarray, second: np.ndarray, seed: int = 0) -> TwoSample | None:
    """Return how well a linear classifier, or one of boosted trees, tells the samples.

    ``first`` and ``second`` are thumbnails (n, C, H, W) uint8. As many of both are used. None for
    samples that are too small.
    """
    from scipy import stats

    count = min(len(first), len(second), MOST)
    if count < FEWEST:
        return None
    rng = np.random.default_rng(seed)
    pixels = np.concatenate([chosen(first, count, rng), chosen(second, count, rng)])
    sides = np.repeat([0, 1], count)
    best = None
    for name, classifier in classifiers(seed).items():
        right = (guesses(classifier, pixels, sides, seed) == sides).sum()
        p_value = stats.binomtest(int(right), len(sides), 0.5, "greater").pvalue
        accuracy = float(right / len(sides))
        found = TwoSample(name, len(sides), accuracy, min(1.0, float(2 * p_value)))
        best = found if best is None or found.p_value < best.p_value else best
    return best


def classifiers(seed: int) -> dict[str, Any]:
    """Return the classifiers that try to tell samples, by their names."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(C=0.01)),
        "boosted trees": HistGradientBoostingClassifier(
            max_iter=20, max_leaf_nodes=15, random_state=seed
        ),
    }


def guesses(classifier: Any, pixels: np.ndarray, sides: np.ndarray, seed: int) -> np.ndarray:
    """Return the sample that a classifier guesses for each image, trained on other images."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that has not converged is good enough
        return cross_val_predict(classifier, pixels, sides, cv=folds)


def chosen(thumbnails: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the pixels (count, features) of some images, made smaller."""
    some = thumbnails[rng.permutation(len(thumbnails))[:count]]
    step = max(1, some.shape[-1] // SIDE)
    number, channels, height, width = some.shape
    parts = some.reshape(number, channels, height // step, step, width // step, step)
    return parts.mean((3, 5), dtype=np.float32).reshape(number, -1)


def label_shift(first: Sequence[int], second: Sequence[int], classes: int) -> float | None:
    """Return the p-value of the chi-square test that both samples have the classes alike.

    None where it cannot be computed.
    """
    from scipy import stats

    table = np.stack([np.bincount(labels, minlength=classes) for labels in (first, second)])
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2 or (table.sum(1) == 0).any():
        return None
    return float(stats.chi2_contingency(table).pvalue)
