"""Passes that make no update: evaluation, and gradients with respect to effective weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from switchlora.learner.recipe import autocast
from switchlora.models import eval_mode
from switchlora.process import total


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, precision: str = "fp32") -> dict[str, float]:
    """Return the mean cross-entropy 'loss', and 'top1' and 'top5' in %, over all labels.

    'top5' is left out below 5 classes. Labels are one per image, (B,) with logits (B, classes), or
    one per token, (B, T) with logits (B, T, vocabulary). Each rank evaluates its share of the
    batches; all ranks get the same means.
    """
    device = next(model.parameters()).device
    totals, labels_seen = torch.zeros(3, dtype=torch.float64), 0
    with eval_mode(model):
        for inputs, labels in loader:
            with autocast(device.type, precision):
                logits = model(inputs.to(device)).flatten(0, -2)
            totals += _batch_totals(logits.float(), labels.flatten().to(device))
            labels_seen += labels.numel()
    *sums, count = total([*totals.tolist(), labels_seen])
    names = ("loss", "top1", "top5") if logits.shape[1] >= 5 else ("loss", "top1")
    return {name: value / count for name, value in zip(names, sums, strict=False)}


def _batch_totals(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, labels, reduction="sum")
    hits = accuracy(logits, labels, topk=(1, min(5, logits.shape[1])))
    return torch.stack([loss, *(hit * len(labels) for hit in hits)]).double().cpu()


def module_gradients(
    model: nn.Module,
    names: Sequence[str],
    loss_fn: nn.Module,
    precision: str,
    inputs: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """Return G = sum over tokens of g_y x^T (out, in) for each of the linears ``names``.

    x is the input of the linear and g_y the gradient of its output. Both come from one forward and
    backward pass.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: (args[0].detach(), output)})
        )
        for name in names
    ]
    device = next(model.parameters()).device
    try:
        with autocast(device.type, precision):
            loss = loss_fn(model(inputs.to(device)), labels.to(device))
        grads = torch.autograd.grad(loss, [seen[name][1] for name in names])
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: grad.flatten(0, -2).float().mT @ seen[name][0].flatten(0, -2).float()
        for name, grad in zip(names, grads, strict=True)
    }
