"""A saved model that a card is made of: opened, hashed, and asked about its images."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switchlora.analysis.card.predictions import Predictions, predictions_of
from switchlora.analysis.evaluate import Opened, opened, precision_of, validation_loader
from switchlora.learner import predict
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import STATE

WEIGHTS = (STATE, "adapter_model.safetensors", "adapter_model.bin")
"""what holds the weights of a model that is a folder"""
BATCH = 100


@dataclass(frozen=True)
class Source:
    """A model, its test split, and what it predicts there."""

    path: Path
    opened: Opened
    sha256: str
    test: Predictions

    @property
    def model(self) -> nn.Module:
        """The model, on its device."""
        return self.opened.saved.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, if they are known."""
        return self.opened.saved.classes

    @property
    def of_images(self) -> bool:
        """Whether the model takes images whose normalisation is known."""
        return self.why_no_images() is None

    def why_no_images(self) -> str | None:
        """Return why the pixels of the test split cannot be changed; None if they can."""
        data = self.opened.data
        if "image_size" not in data:
            return "left out: for images alone"
        if "mean" not in data or "std" not in data:
            return "left out: the data do not say how images are normalised"
        return None

    def bytes_of(self, images: Tensor) -> Tensor:
        """Return normalised images (B, C, H, W) as bytes."""
        mean, std = self._normalisation()
        return (255 * (images.cpu() * std + mean)).round().clamp(0, 255).to(torch.uint8)

    def predict(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in bytes."""
        mean, std = self._normalisation()

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for part in images.split(BATCH):
                normalised = part.float().div(255).sub(mean).div(std)
                yield normalised, torch.zeros(len(part), dtype=torch.long)

        logits, _ = predict(self.model, batches(), precision_of(self.opened.saved))
        return logits

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        data = self.opened.data
        mean, std = (torch.tensor(list(data[key])).view(-1, 1, 1) for key in ("mean", "std"))
        return mean, std


def open_source(path: Path, words: Sequence[str], how: dict[str, Any]) -> Source:
    """Return the model in ``path`` with its predictions; ``how`` are options of ``opened``."""
    found = opened(path, words, **how)
    view: Any = found.loader.dataset
    if not len(view):
        raise ValueError(f"{path}: the test split is empty")
    logits, labels = predict(found.saved.model, found.loader, precision_of(found.saved))
    units = len(labels) if "image_size" in found.data else len(view)
    test = predictions_of(logits, labels, units, str(path))
    return Source(path, found, sha256_of(found.saved.source), test)


def sha256_of(source: Path) -> str:
    """Return the SHA-256 of the file of weights; of a checkpoint or adapter, that inside it."""
    files = [source, *(source / name for name in WEIGHTS)]
    file = next(path for path in files if path.is_file())
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_same_test(ours: Source, theirs: Source) -> None:
    """Raise ValueError unless both models were asked about the same images and classes."""
    other = f"--against {theirs.path}"
    if theirs.sha256 == ours.sha256:
        why = "it is the same run, or one that never switched; give another"
        raise ValueError(f"{other} holds the same weights as {ours.path}: {why}")
    if theirs.test.num_classes != ours.test.num_classes:
        raise ValueError(
            f"{other} has {theirs.test.num_classes} classes, {ours.path} has "
            f"{ours.test.num_classes}: give a run on the same data"
        )
    if ours.classes and theirs.classes and ours.classes != theirs.classes:
        raise ValueError(f"{other} has other classes, or in another order, than {ours.path}")
    if len(theirs.test.labels) != len(ours.test.labels):
        raise ValueError(
            f"{other} is tested on {theirs.test.units} inputs, {ours.path} on {ours.test.units}: "
            "give a run on the same data with the same data.eval_size"
        )
    labels_differ = not torch.equal(theirs.test.labels, ours.test.labels)
    if labels_differ or contents_differ(ours, theirs):
        raise ValueError(f"{other} is tested on other inputs than {ours.path}: give the same data")


def contents_differ(ours: Source, theirs: Source) -> bool:
    """Return whether the inputs of both test splits differ; they must be kept in the same way."""
    one: Any = ours.opened.loader.dataset
    other: Any = theirs.opened.loader.dataset
    comparable = type(one) is type(other) and hasattr(one, "digest")
    return comparable and one.digest() != other.digest()


def validation_of(
    source: Source, words: Sequence[str], allow: Collection[str]
) -> Predictions | str:
    """Return the predictions on the run's own validation split, or why there are none."""
    try:
        loader = validation_loader(source.opened, words, allow)
        if loader is None:
            return "left out: the model does not say which data it learned from"
        saved = source.opened.saved
        logits, labels = predict(saved.model, loader, precision_of(saved))
        view: Any = loader.dataset
        units = len(labels) if "image_size" in source.opened.data else len(view)
        return predictions_of(logits, labels, units, str(source.path))
    except USER_ERRORS as error:
        return f"left out: there is no validation split ({one_line(error)})"


Say = Callable[[str], None]
"""tells how far the work is"""
