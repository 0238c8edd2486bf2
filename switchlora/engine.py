"""Evaluation: one pass over a loader without gradients."""

import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import nn
from torch.utils.data import DataLoader

from switchlora.learner import PRECISIONS


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, precision: str = "fp32") -> dict[str, float]:
    """Mean cross-entropy 'loss', 'top1' and (from 5 classes on) 'top5' in % over all images."""
    device = next(model.parameters()).device
    dtype = PRECISIONS[precision]
    training = model.training
    model.eval()
    totals, images_seen = torch.zeros(3, dtype=torch.float64), 0
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        hits = accuracy(logits, targets, topk=(1, min(5, logits.shape[1])))
        totals += torch.stack([loss, *(hit * len(images) for hit in hits)]).double().cpu()
        images_seen += len(images)
    model.train(training)
    means = (totals / images_seen).tolist()
    names = ("loss", "top1", "top5") if logits.shape[1] >= 5 else ("loss", "top1")
    return dict(zip(names, means, strict=False))
