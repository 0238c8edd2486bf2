"""What a model says of a test split, and the units that may be taken for independent."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """Logits (N, classes) and labels (N,) of ``units`` images, or of windows of a text.

    The N / units bytes of a window depend on each other: windows are counted and resampled whole.
    """

    logits: Tensor
    labels: Tensor
    units: int

    @property
    def per_unit(self) -> int:
        """How many predictions a unit has: 1 for images."""
        return len(self.labels) // self.units

    @property
    def of_images(self) -> bool:
        """Whether each unit has one prediction."""
        return self.per_unit == 1

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.logits.shape[1]

    @cached_property
    def choices(self) -> np.ndarray:
        """The predicted class of each input, (N,)."""
        return self.logits.argmax(1).numpy()

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right, (N,)."""
        return self.choices == self.labels.numpy()

    def among_first(self, count: int) -> np.ndarray:
        """Return whether each label is among the ``count`` most probable classes, (N,)."""
        first = self.logits.topk(count, dim=1).indices
        return (first == self.labels.unsqueeze(1)).any(1).numpy()

    def by_unit(self, values: np.ndarray) -> np.ndarray:
        """Return the mean of ``values``, one a prediction, over each unit: (units,)."""
        return values.reshape(self.units, -1).mean(1)


def predictions_of(logits: Tensor, labels: Tensor, units: int, source: str) -> Predictions:
    """Return the predictions; ValueError if there are too few, or numbers that are not finite."""
    if units < 2 or not len(labels):
        raise ValueError(f"the test split has {units} inputs: a card needs at least 2")
    if len(labels) % units:
        raise ValueError(
            f"{len(labels)} predictions of {units} inputs: some have more than others"
        )
    if not torch.isfinite(logits).all():
        raise ValueError(f"{source} gives logits that are not finite: its weights are damaged")
    return Predictions(logits, labels, units)


def class_names(names: Sequence[str], count: int) -> list[str]:
    """Return the names of ``count`` classes; their numbers where they are not known."""
    return list(names) if len(names) == count else [str(number) for number in range(count)]
