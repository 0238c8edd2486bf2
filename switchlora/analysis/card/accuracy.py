"""Accuracy with intervals: top1, top5, the mean over classes, each class, and what is confused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from switchlora.analysis.card.intervals import resampled, resampled_mean, wilson
from switchlora.analysis.card.predictions import Predictions

WORST = 5
"""classes and confusions that are named"""
LARGEST_MATRIX = 100
"""classes up to which the whole matrix is kept"""
BYTES = "left out: the classes of a text are its bytes"
Found = dict[str, Any]


def measure_accuracy(found: Predictions, names: Sequence[str]) -> Found:
    """Return top1 and top5 in %, and of images also the accuracy of classes and the confusions."""
    measured: Found = {"top1": share(found, found.correct)}
    if found.num_classes >= 5:
        measured["top5"] = share(found, found.among_first(5))
    if not found.of_images:
        return {**measured, "classes": {"left_out": BYTES}}
    classes = accuracy_of_classes(found, names)
    return {
        **measured,
        "macro": macro(found),
        "classes": classes,
        "worst": sorted(classes, key=lambda each: each["accuracy"]["value"])[:WORST],
        "confusion": confusion(found, names),
    }


def share(found: Predictions, right: np.ndarray) -> dict[str, float]:
    """Return how many predictions are right, in %: Wilson's interval, of text by windows."""
    if found.of_images:
        return wilson(int(right.sum()), len(right))
    return resampled_mean(found.by_unit(right)).scaled(100).plain()


def macro(found: Predictions) -> dict[str, float]:
    """Return the mean of the accuracies of the classes, in %."""
    labels = found.labels.numpy()

    def mean_over_classes(rows: np.ndarray) -> float:
        images = np.bincount(labels[rows])
        right = np.bincount(labels[rows], weights=found.correct[rows])
        return float((right[images > 0] / images[images > 0]).mean())

    return resampled(mean_over_classes, found.units).scaled(100).plain()


def accuracy_of_classes(found: Predictions, names: Sequence[str]) -> list[Found]:
    """Return the accuracy of each class that has images."""
    labels = found.labels.numpy()
    classes = []
    for number in np.unique(labels):
        right = found.correct[labels == number]
        accuracy = wilson(int(right.sum()), len(right))
        classes.append({"class": names[number], "images": len(right), "accuracy": accuracy})
    return classes


def confusion(found: Predictions, names: Sequence[str]) -> Found:
    """Return the confusions that are most frequent; of few classes the whole matrix too."""
    numbers = np.arange(found.num_classes)
    matrix = confusion_matrix(found.labels.numpy(), found.choices, labels=numbers)
    wrong = matrix - np.diag(np.diag(matrix))
    most = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:WORST]:
        true, predicted = np.unravel_index(place, wrong.shape)
        images = int(wrong[true, predicted])
        if images:
            pair = {"class": names[true], "predicted": names[predicted], "images": images}
            most.append(pair)
    whole = matrix.tolist() if found.num_classes <= LARGEST_MATRIX else None
    return {"most": most, "matrix": whole}
