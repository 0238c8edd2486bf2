"""Passes that make no update: evaluation, and gradients with respect to effective weights."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from switchlora.data import IGNORED
from switchlora.learner.recipe import autocast, loss_of
from switchlora.models import eval_mode
from switchlora.process import total

Tensors = dict[str, Tensor]


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, precision: str = "fp32") -> dict[str, float]:
    """Return the mean cross-entropy 'loss', and 'top1' and 'top5' in %, over all labels.

    'top5' is left out below 5 classes. Labels are one per image, (B,) with logits (B, classes), or
    one per token, (B, T) with logits (B, T, vocabulary). Each rank evaluates its share of the
    batches; all ranks get the same means.
    """
    device = next(model.parameters()).device
    found = []
    with eval_mode(model):
        for inputs, labels in loader:
            with autocast(device.type, precision):
                logits = model(inputs.to(device, non_blocking=True)).flatten(0, -2)
            labels = labels.flatten().to(device, non_blocking=True)
            found.append(_batch_totals(logits.float(), labels))
    totals = torch.zeros(4, dtype=torch.float64)
    for each in torch.stack(found).cpu().double():
        totals += each
    loss, top1, top5, count = total(totals.tolist())
    means = {"loss": loss / count, "top1": top1 / count}
    if logits.shape[1] >= 5:
        means["top5"] = top5 / count
    return means


@torch.no_grad()
def predict(
    model: nn.Module, loader: Iterable[Any], precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """Return logits (N, classes) in fp32 and labels (N,) of all inputs, in order, on the CPU.

    Tokens count as inputs of their own. What is to be ignored is left out.
    """
    device = next(model.parameters()).device
    found = []
    with eval_mode(model):
        for inputs, labels in loader:
            with autocast(device.type, precision):
                logits = model(inputs.to(device, non_blocking=True)).flatten(0, -2)
            counted = labels.flatten() != IGNORED
            found.append((logits.float().cpu()[counted], labels.flatten()[counted]))
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels)


def _batch_totals(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sums of loss, top1 and top5 and the number of labels, (4,) on the device."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    top1, top5 = accuracy(logits, labels, topk=(1, min(5, logits.shape[1])))
    count = (labels != IGNORED).sum().to(loss)
    return torch.stack([loss, top1 * len(labels), top5 * len(labels), count])


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
    device = next(model.parameters()).device
    with _seen_by(model, names) as (linear_inputs, linear_outputs):
        with autocast(device.type, precision):
            loss = loss_of(loss_fn, model(inputs.to(device)), labels.to(device))
        grads = torch.autograd.grad(loss, [linear_outputs[name] for name in names])
    found = {}
    for name, grad in zip(names, grads, strict=True):
        x = linear_inputs[name].flatten(0, -2).float()
        g_y = grad.flatten(0, -2).float()
        found[name] = g_y.mT @ x
    return found


@contextmanager
def _seen_by(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[Tensors, Tensors]]:
    """Yield two dicts that a forward pass inside fills: inputs and outputs of the modules."""
    inputs: Tensors = {}
    outputs: Tensors = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name] = args[0].detach()
        outputs[name] = output

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(keep, name)))
        yield inputs, outputs
