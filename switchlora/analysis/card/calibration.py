"""Calibration: expected calibration error, NLL and Brier score, before and after a temperature."""

import math
from typing import Any

import numpy as np
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from switchlora.analysis.card.intervals import resampled, resampled_mean
from switchlora.analysis.card.predictions import Predictions

BINS = 15
TEMPERATURES = (0.05, 20.0)
"""the ends of the search"""
Found = dict[str, Any]


def measure_calibration(test: Predictions, validation: Predictions | str) -> Found:
    """Return the calibration on test, and after the temperature that suits ``validation``.

    ``validation`` may be a line that says why there is none. No temperature is fitted then.
    """
    found: Found = {"bins": BINS, "before": calibration(test)}
    if isinstance(validation, str):
        return {**found, "temperature": None, "after": {"left_out": validation}}
    temperature = fit_temperature(validation.logits, validation.labels)
    scaled = Predictions(test.logits / temperature, test.labels, test.units)
    return {
        **found,
        "temperature": temperature,
        "validation_images": validation.units,
        "after": calibration(scaled),
    }


def calibration(found: Predictions) -> Found:
    """Return error of calibration in %, NLL in nats and Brier score, with their intervals."""
    confidence = confidences(found.logits)
    losses = log_losses(found.logits, found.labels)
    brier = brier_scores(found.logits, found.labels)
    return {
        "ece": calibration_error(found, confidence),
        "nll": resampled_mean(found.by_unit(losses)).plain(),
        "brier": resampled_mean(found.by_unit(brier)).plain(),
        "reliability": reliability(confidence, found.correct),
    }


def confidences(logits: Tensor) -> np.ndarray:
    """Return the largest probability of each prediction."""
    return F.softmax(logits, 1).amax(1).numpy()


def log_losses(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return the negative log likelihood of each label, in nats."""
    return F.cross_entropy(logits, labels, reduction="none").numpy()


def brier_scores(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return the squared distance of the probabilities of each input to its label: 0 to 2."""
    probabilities = F.softmax(logits, 1)
    of_label = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    return (probabilities.square().sum(1) - 2 * of_label + 1).numpy()


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """Return which of ``BINS`` equal bins each confidence is in."""
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


def calibration_error(found: Predictions, confidence: np.ndarray) -> dict[str, float]:
    """Return the expected calibration error in %.

    It is the mean over predictions of how far confidence and accuracy of their bin are apart.
    """
    gaps = np.zeros((len(confidence), BINS))
    gaps[np.arange(len(confidence)), bins_of(confidence)] = confidence - found.correct
    by_unit = gaps.reshape(found.units, -1, BINS).mean(1)

    def error(rows: np.ndarray) -> float:
        return float(np.abs(by_unit[rows].mean(0)).sum())

    return resampled(error, found.units, reflected=True).scaled(100).plain()


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[Found]:
    """Return of each bin that has predictions its mean confidence, its accuracy and its size."""
    bins = bins_of(confidence)
    found = []
    for number in np.unique(bins):
        inside = bins == number
        found.append(
            {
                "bin": int(number),
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(correct[inside].mean()),
                "predictions": int(inside.sum()),
            }
        )
    return found


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T of least NLL for ``logits / T`` (Guo et al. 2017)."""

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits / math.exp(log_temperature), labels).item()

    ends = tuple(map(math.log, TEMPERATURES))
    found = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x)
