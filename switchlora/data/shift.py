"""Compare two samples of images: channels, labels, and whether a classifier tells the samples.

A classifier learns from half of the images. If both samples come from one distribution, it is
right about half of the others. How far it does better is tested exactly, by the binomial one.
(Guesses of cross-validation hang on each other, and raise false alarms.)
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.001
"""largest p-value of what counts as a shift; small, since a report makes many tests"""
SMALL_EFFECT = 0.2
"""smallest effect that counts, in standard deviations: what Cohen calls small"""
LEAST_ACCURACY = 0.55
"""of the classifier, for what counts as a shift"""
MOST = 2000
"""images of each sample that the classifier gets"""
FEWEST = 20
"""images of each sample without which nothing is tested"""
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
    pixels = np.stack([chosen(first, count, rng), chosen(second, count, rng)])
    learned, held = np.split(pixels, [count // 2], axis=1)
    best = None
    for name, classifier in classifiers(seed).items():
        right = int(correct(classifier, learned, held).sum())
        cases = 2 * held.shape[1]
        p_value = float(stats.binomtest(right, cases, 0.5, "greater").pvalue)
        found = TwoSample(name, cases, right / cases, min(1.0, 2 * p_value))
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


def correct(classifier: Any, learned: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Return whether a classifier is right about each image that it has not seen.

    Both arrays are (2, images, features), one sample after the other.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that has not converged is good enough
        classifier.fit(*with_sides(learned))
    pixels, sides = with_sides(held)
    return classifier.predict(pixels) == sides


def with_sides(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all images in a row, and which sample each is from."""
    return pixels.reshape(-1, pixels.shape[-1]), np.repeat([0, 1], pixels.shape[1])


def chosen(thumbnails: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the pixels (count, features) of some images, made smaller."""
    some = thumbnails[rng.permutation(len(thumbnails))[:count]]
    step = max(1, some.shape[-1] // SIDE)
    number, channels, height, width = some.shape
    parts = some.reshape(number, channels, height // step, step, width // step, step)
    return parts.mean((3, 5), dtype=np.float32).reshape(number, -1)


def label_shift(first: np.ndarray, second: np.ndarray, classes: int) -> float | None:
    """Return the p-value of the chi-square test that both samples have the classes alike.

    None where it cannot be computed.
    """
    from scipy import stats

    table = np.stack([np.bincount(labels, minlength=classes) for labels in (first, second)])
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2 or (table.sum(1) == 0).any():
        return None
    return float(stats.chi2_contingency(table).pvalue)
