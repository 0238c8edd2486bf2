"""Riemannian preconditioned LoRA: gradients scaled by the other factor (arXiv 2402.02347)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from switchlora.adapters import Adapter
from switchlora.learner.learner import Learner
from switchlora.learner.reflora import trained_pairs


@dataclass(frozen=True)
class Riemannian:
    """Precondition the gradients of factors: g_A <- (B^T B)^-1 g_A, g_B <- g_B (A A^T)^-1.

    With SGD this is ScaledGD, with AdamW the scaled AdamW of Zhang and Pilanci (arXiv 2402.02347),
    whose moments are those of preconditioned gradients. ``damping`` times the identity is added to
    both matrices, so that they have inverses at B = 0 too.
    """

    damping: float = 1e-6

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"refactoring.damping is {self.damping}: give a number above 0")

    def __call__(self, learner: Learner) -> None:
        """Give the optimizer of ``learner`` a hook that acts before each step."""
        pairs = trained_pairs(learner)

        def before_step(*_: object) -> None:
            scale_gradients(pairs, self.damping)

        learner.optimizer.register_step_pre_hook(before_step)


@torch.no_grad()
def scale_gradients(pairs: Sequence[Adapter], damping: float) -> None:
    """Set g_A <- (B^T B + d I)^-1 g_A and g_B <- g_B (A A^T + d I)^-1 in place, in float64."""
    for A, B, _, _ in pairs:
        g_A, g_B = cast(Tensor, A.grad), cast(Tensor, B.grad)
        scaled_A = torch.linalg.solve(_damped_gram(B, damping), g_A.double())
        scaled_B = torch.linalg.solve(_damped_gram(A.mT, damping), g_B.double(), left=False)
        g_A.copy_(scaled_A)
        g_B.copy_(scaled_B)


def _damped_gram(columns: Tensor, damping: float) -> Tensor:
    double = columns.double()
    gram = double.mT @ double
    return gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
