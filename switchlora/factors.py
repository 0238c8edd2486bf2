"""Trained factors: which pairs a model has, and a decay of their products."""

from collections.abc import Iterable

import torch
from torch import nn

from switchlora.layers import AdaptedLinear, Adapter


def trained_adapters(model: nn.Module) -> list[Adapter]:
    """The adapters of ``model`` whose factors, or B alone, train; row slices each by itself."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    adapters = [adapter for module in adapted for adapter in module.adapters().values()]
    return [adapter for adapter in adapters if len(adapter.A) and adapter.B.requires_grad]


@torch.no_grad()
def add_frobenius_decay(adapters: Iterable[Adapter], strength: float) -> None:
    """Add the gradient of strength/2 ||s B A||_F^2 to those of the factors that have one.

    g_A += strength s^2 (B^T B) A and g_B += strength s^2 B (A A^T): no product is of the size of
    the weight. Cuttlefish's Frobenius decay (Wang et al., arXiv 2305.02538).
    """
    for A, B, _, scaling in adapters:
        factor = strength * scaling**2
        if A.grad is not None:
            A.grad.addmm_(B.mT @ B, A, alpha=factor)
        if B.grad is not None:
            B.grad.addmm_(B, A @ A.mT, alpha=factor)
