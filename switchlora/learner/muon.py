r"""Muon for the matrices of a network, LoRA-Muon for factors, AdamW for all other parameters.

Muon moves a weight along msign(M), where M is the momentum and msign(U S V^T) = U V^T (Jordan et
al., 2024). LoRA-Muon is the same step within the weights of rank r (Cesista et al., arXiv
2606.12921): with the momenta M_A and M_B of the factors and their Gram matrices S_A = A A^T and
S_B = B^T B,

    dB = -c / s  msign(M_B S_A^(-1/2)) S_A^(-1/2),
    dA = -c / s  S_B^(-1/2) msign(S_B^(-1/2) M_A).

The spectral norm of s dB A is c, and so is that of s B dA. Both factors share the step: c is half
of Muon's where both train. The step does not depend on how B A is split into factors, so the
learning rate of the full phase goes on through a switch, for every rank and every start. A factor
beside a zero one does not move, since no step of it would move the weight.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon as TorchMuon

from switchlora.adapters import Adapter
from switchlora.learner.parts import MATRICES, InParts

MATCHED_RMS = 0.2
"""root mean square of Muon's step relative to AdamW's, so that both share a learning rate (Liu et
al., arXiv 2502.16982); ``adjust_lr_fn='match_rms_adamw'`` of ``torch.optim.Muon``"""
SMALLEST = 1e-6
"""eigenvalues of a Gram matrix below this share of the largest count as this share"""


class Muon(InParts):
    """Update each parameter group by the optimizer that its key 'part' names.

    - 'matrices': ``torch.optim.Muon``.
    - 'factors': LoRA-Muon, for the adapters that ``pair`` was given.
    - 'others', or no key: ``torch.optim.AdamW``.

    Learning rates are AdamW's. ``betas`` and ``eps`` are AdamW's too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, lr, weight_decay, betas, eps)
        self.momentum = momentum
        self.nesterov = nesterov
        if matrices := self.groups(MATRICES):
            matched = "match_rms_adamw"
            self.own[MATRICES] = TorchMuon(
                matrices, lr, weight_decay, momentum, nesterov, adjust_lr_fn=matched
            )

    def step_the_rest(self) -> None:
        """Update the factors of all adapters."""
        groups = self.factor_groups()
        for adapter in self.adapters:
            self._step_adapter(adapter, groups)

    def _step_adapter(self, adapter: Adapter, groups: Mapping[Tensor, dict[str, Any]]) -> None:
        A, B, _, s = adapter
        steps: dict[Tensor, Tensor] = {}
        if A.grad is not None:
            steps[A] = factor_step(self._momentum(A).mT, inverse_root(B)).mT
        if B.grad is not None:
            steps[B] = factor_step(self._momentum(B), inverse_root(A.mT))
        norm = MATCHED_RMS * math.sqrt(max(len(B), A.shape[1]))
        for factor, step in steps.items():
            lr, decay = groups[factor]["lr"], groups[factor]["weight_decay"]
            factor.mul_(1 - lr * decay)
            factor.sub_(step, alpha=lr * norm / (s * len(steps)))

    def _momentum(self, factor: Tensor) -> Tensor:
        """Return the momentum after the present gradient, with a look ahead by Nesterov's rule."""
        gradient = factor.grad
        assert gradient is not None
        state = self.state[factor]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(buffer, self.momentum) if self.nesterov else buffer


def factor_step(momentum: Tensor, root: Tensor) -> Tensor:
    """Return msign(M R) R for the momentum M (n, r) of B and the inverse root R (r, r) of S_A."""
    whitened = momentum @ root
    return whitened @ inverse_root(whitened) @ root


def inverse_root(columns: Tensor) -> Tensor:
    """Return (X^T X)^(-1/2) of a matrix X (n, r), for which msign(X) = X (X^T X)^(-1/2).

    Zeros for X = 0. It is computed in float64, where Newton and Schulz's iteration would not pay
    for a matrix as small as (r, r).
    """
    exact = columns.double()
    values, vectors = torch.linalg.eigh(exact.mT @ exact)
    largest = values[-1].clamp_min(0)
    inverse = values.clamp_min(SMALLEST * largest).rsqrt()
    inverse = torch.where(largest > 0, inverse, torch.zeros_like(inverse))
    return ((vectors * inverse) @ vectors.mT).to(columns.dtype)
