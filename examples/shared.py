"""What the examples share: data, a small ViT, accuracy, a criterion that says what it sees."""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from switchlora.criteria import SwitchCriterion, Verdict
from switchlora.monitor import Measurement

SMALL_VIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
SMALL_VIT |= {"embed_dim": 64, "depth": 2, "num_heads": 2}
"""timm's options for a ViT of 0.1 M parameters on grey images of 8 x 8"""


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return scikit-learn's handwritten digits: 1,437 to train and 360 to test."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=360, random_state=0, stratify=labels)
    train_pixels, test_pixels, train_labels, test_labels = parts
    return dataset(train_pixels, train_labels), dataset(test_pixels, test_labels)


def dataset(pixels, labels) -> TensorDataset:
    """Return images from -1 to 1 with their labels."""
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return TensorDataset(images, torch.tensor(labels))


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return what ``model`` says of ``images`` in evaluation."""
    model.eval()
    output = model(images)
    model.train()
    return getattr(output, "logits", output)  # transformers returns an object


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of right answers."""
    images, labels = data.tensors
    return (logits(model, images).argmax(1) == labels).float().mean().item()


class Telling:
    """A criterion that prints a line for each measurement, and two for the switch."""

    def __init__(self, criterion: SwitchCriterion) -> None:
        self.criterion = criterion
        self.last = ""

    def __call__(self, history: Sequence[Measurement]) -> Verdict:
        """Return the criterion's verdict."""
        verdict = self.criterion(history)
        self.last = f"update {history[-1].num_updates}: {verdict.reason}"
        if not verdict.fires:
            print(self.last)
        return verdict

    def switched(self, report) -> None:
        """Say why and how the model switched; for ``on_switch``."""
        before, after = report.trainable_before, report.trainable_after
        print(f"SWITCH at {self.last}")
        print(f"  trained parameters {before:,} -> {after:,}, logits moved by {report.drift:.1e}")
