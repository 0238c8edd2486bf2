"""Evaluation: one pass over a loader without gradients."""

import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from switchlora.distributed import total
from switchlora.learner import autocast
from switchlora.models import eval_mode


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, precision: str = "fp32") -> dict[str, float]:
    """Mean cross-entropy 'loss', 'top1' and (from 5 classes on) 'top5' in % over all targets.

    Targets are one an image, or one a token: (B,) with logits (B, classes), or (B, T) with logits
    (B, T, vocabulary). Each rank passes its share of them; all get the same means.
    """
    device = next(model.parameters()).device
    totals, targets_seen = torch.zeros(3, dtype=torch.float64), 0
    with eval_mode(model):
        for inputs, targets in loader:
            with autocast(device.type, precision):
                logits = model(inputs.to(device)).flatten(0, -2)
            totals += _batch_totals(logits.float(), targets.flatten().to(device))
            targets_seen += targets.numel()
    *sums, count = total([*totals.tolist(), targets_seen])
    names = ("loss", "top1", "top5") if logits.shape[1] >= 5 else ("loss", "top1")
    return {name: value / count for name, value in zip(names, sums, strict=False)}


def _batch_totals(logits: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, targets, reduction="sum")
    hits = accuracy(logits, targets, topk=(1, min(5, logits.shape[1])))
    return torch.stack([loss, *(hit * len(targets) for hit in hits)]).double().cpu()
