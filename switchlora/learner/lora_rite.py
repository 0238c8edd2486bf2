r"""LoRA-RITE: steps and moments that do not depend on the split into factors (arXiv 2410.20625).

Yen et al. write the factor B = Q R with orthonormal columns of Q (n, r). The gradient of A, as a
tall matrix (m, r), is taken in the basis Q, where the size of B is of no account:

    U = g_A^T R^-1.

Moments live in this basis. As B moves it becomes another one, so they are turned by P = Q_new^T Q:

    V <- b2 P V P^T + (1 - b2) U^T U / m,    M <- b1 M P^T + (1 - b1) U V^(-1/2).

The step is dA^T = -lr M R^-T. It moves the weight by -lr s Q M^T, whatever the split. B has the
same beside A^T. Decays b are corrected for their bias, as in github.com/gkevinyen5418/LoRA-RITE.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchlora.learner.parts import MATRICES, OTHERS, InParts

FIRST, SECOND, BASIS, STEP = "rotated_exp_avg", "rotated_exp_avg_sq", "basis", "step"
LARGEST = 1.0
"""norm of all U together, and root mean square of a single U: a longer one is cut or left out"""


class Side(NamedTuple):
    """One factor, as a tall matrix (m, r), in the basis of the other one, Q R (n, r)."""

    factor: Tensor
    """the parameter: A, or B"""
    tall: Tensor
    """a view of it (m, r)"""
    gradient: Tensor
    """U (m, r)"""
    basis: Tensor
    """Q (n, r)"""
    inverse: Tensor
    """R^-1 (r, r), a pseudo-inverse where R is singular"""


class LoRARite(InParts):
    """Update factors by LoRA-RITE, and all other parameters by ``torch.optim.AdamW``."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(params, lr, weight_decay, betas, eps, by_adamw=(MATRICES, OTHERS))

    def step_the_rest(self) -> None:
        """Update the factors of all adapters."""
        sides: list[Side] = []
        for A, B, _, _ in self.adapters:
            if A.grad is not None:
                sides.append(side(A, A.mT, A.grad.mT, B))
            if B.grad is not None:
                sides.append(side(B, B, B.grad, A.mT))
        if not sides:
            return
        norms = torch.stack([each.gradient.norm() for each in sides])
        cut = (LARGEST / norms.norm()).clamp_max(1)
        groups = self.factor_groups()
        steps = [self._step(each, cut * each.gradient) for each in sides]
        for each, step in zip(sides, steps, strict=True):
            lr, decay = groups[each.factor]["lr"], groups[each.factor]["weight_decay"]
            each.tall.mul_(1 - lr * decay)
            each.tall.sub_(step, alpha=lr)

    def _step(self, side: Side, gradient: Tensor) -> Tensor:
        """Return M R^-T after the present gradient U."""
        state = self._state_of(side)
        turn = side.basis.mT @ state[BASIS]
        state[BASIS] = side.basis
        state[STEP] += 1
        first, second = (corrected(beta, state[STEP]) for beta in self.betas)
        square = gradient.mT @ gradient / len(gradient)
        state[SECOND] = second * turn @ state[SECOND] @ turn.mT + (1 - second) * square
        direction = gradient @ inverse_root(state[SECOND], self.eps)
        state[FIRST] = first * state[FIRST] @ turn.mT + (1 - first) * direction
        return state[FIRST] @ side.inverse.mT

    def _state_of(self, side: Side) -> dict[str, Any]:
        """Return the state of a factor; a new one if it has none, or one of another rank."""
        state = self.state[side.factor]
        if FIRST not in state or state[FIRST].shape != side.tall.shape:
            state.clear()
            state[STEP] = 0
            state[FIRST] = torch.zeros_like(side.gradient)
            state[SECOND] = torch.zeros_like(side.inverse)
            state[BASIS] = torch.zeros_like(side.basis)
        return state


def side(factor: Tensor, tall: Tensor, gradient: Tensor, other: Tensor) -> Side:
    """Return a factor and its gradient (m, r) in the basis of the ``other`` factor (n, r).

    The gradient is zero where its root mean square is above ``LARGEST``.
    """
    basis, triangle = torch.linalg.qr(other)
    inverse = torch.linalg.pinv(triangle)
    inside = gradient @ inverse
    size = inside.square().mean().sqrt()
    kept = torch.where(size > LARGEST, torch.zeros_like(inside), inside)
    return Side(factor, tall, kept, basis, inverse)


def corrected(beta: float, step: int) -> float:
    """Return the decay of update ``step`` (the first: 1) for a mean without bias."""
    return float(beta * (1 - beta ** (step - 1)) / (1 - beta**step))


def inverse_root(matrix: Tensor, eps: float) -> Tensor:
    """Return V^(-1/2) of a positive semidefinite V, with ``eps`` added to the roots of V."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    roots = values.clamp_min(0).sqrt() + eps
    return (vectors / roots) @ vectors.mT
