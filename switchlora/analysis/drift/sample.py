"""What a model makes of some images: predicted classes, confidence, features.

Features are what the last layer reads. Those of the validation split, which no training saw, are
what drift is measured against.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

from switchlora.analysis.evaluate import IMAGES, precision_of, test_loader
from switchlora.config import TARGET, build, check_saved
from switchlora.learner import predict
from switchlora.process import USER_ERRORS, find_device
from switchlora.storage import FileDamaged, Saved, save_tensors

SAMPLE = "reference.safetensors"
MOST = 2000
"""images of a sample"""


@dataclass(frozen=True)
class Sample:
    """What a model makes of some images of a split, in the order of the images."""

    predicted: Tensor
    """number of the likeliest class (N,)"""
    confidence: Tensor
    """probability of that class (N,)"""
    features: Tensor
    """what the last layer reads (N, D)"""
    num_classes: int
    split: str

    def __len__(self) -> int:
        return len(self.predicted)


def sample_of(model: nn.Module, loader: DataLoader, precision: str, split: str) -> Sample:
    """Return what ``model`` makes of all images of ``loader`` that can be read.

    ValueError if it gives a number that is not finite.
    """
    observed = Observed(model)
    both, _ = predict(observed, loader, precision)
    logits, features = both.split([observed.num_classes, both.shape[1] - observed.num_classes], 1)
    if not both.isfinite().all():
        raise ValueError("the model gives numbers that are not finite")
    confidence, predicted = logits.softmax(1).max(1)
    return Sample(predicted, confidence, features.contiguous(), observed.num_classes, split)


class Observed(nn.Module):
    """A model that gives its logits and then the input of its last layer, as one row."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.num_classes = 0
        """known after the first batch"""
        self._seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Return logits and features (B, classes + D)."""
        hook = last_layer(self.model).register_forward_pre_hook(self._see)
        with hook:
            logits = self.model(images)
        self.num_classes = logits.shape[-1]
        features = pooled(self._seen.pop())
        return torch.cat([logits.float(), features.float()], dim=1)

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = [inputs[0]]


def last_layer(model: Any) -> nn.Module:
    """Return what makes the logits: the classifier that timm knows, else the last linear."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(found, tuple | list):  # a distilled model has two
        found = found[0]
    if isinstance(found, nn.Module) and not isinstance(found, nn.Identity):
        return found
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError("the model has no last linear layer, so it has no features to compare")
    return linears[-1]


def pooled(features: Tensor) -> Tensor:
    """Return features (B, D): of maps (B, D, H, W) or tokens (B, T, D) their mean."""
    if features.ndim == 4:
        return features.flatten(2).mean(2)
    return features.flatten(1, -2).mean(1) if features.ndim == 3 else features


def reference_of(saved: Saved, allow: Collection[str], device: str) -> Sample:
    """Return the sample of a model's own validation images; of test where these cannot be had.

    ValueError for a model that reads text, and if no split can be read.
    """
    data = saved.config.get("data") or {}
    if "image_size" not in data:
        raise ValueError("it reads text, and drift is measured on images")
    model = saved.model.to(find_device("--device", device))
    precision = precision_of(saved)
    if data.get(TARGET) == IMAGES:
        data = {**data, "train_size": data["batch_size"], "eval_size": MOST}
    try:
        check_saved(data, "data", allow)
        options = {"workers": (saved.config.get("system") or {}).get("workers", 0)}
        place = {"pin_memory": False, "rank": 0, "world_size": 1}
        built = build(data, seed=saved.config.get("seed", 0), **options, **place)
        return sample_of(model, built.val, precision, "val")
    except USER_ERRORS:
        return sample_of(model, test_loader(saved, data, allow, own=True), precision, "test")


def save_sample(sample: Sample, path: Path) -> None:
    """Write a sample."""
    tensors = {
        "predicted": sample.predicted,
        "confidence": sample.confidence,
        "features": sample.features,
    }
    about = {"split": sample.split, "num_classes": str(sample.num_classes)}
    save_tensors(tensors, path, about)


def read_sample(path: Path) -> Sample:
    """Return the sample in a file; FileDamaged if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Sample(**tensors, num_classes=int(about["num_classes"]), split=about["split"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FileDamaged(f"{path} is damaged: {error}") from error
