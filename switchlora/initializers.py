"""Adapter initializers: ``(weight, update, rank) -> Factors``.

An initializer only chooses the factors. The function of the network is kept by the switch, which
subtracts the adapter from the weight. ``weight`` and ``update`` = W - W_ref are (out, in), of one
target and divided by its scaling s, so that the adapter s B A of an SVD start is a part of them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from switchlora.adapters import Factors
from switchlora.errors import NothingMeasured
from switchlora.monitor import truncated_svd


class AdapterInit(Protocol):
    """Chooses the factors of one target from its weight and its recent update."""

    def __call__(self, weight: Tensor, update: Tensor, rank: int) -> Factors:
        """Return factors of the given rank for ``weight`` and ``update`` (out, in)."""


@dataclass(frozen=True)
class UpdateSVD:
    """Balanced factors of the recent update D = W - W_ref.

    D ~ U S V^T,  B = g U S^(1/2),  A = g S^(1/2) V^T,  so that A A^T = B^T B = g^2 S and
    B A = g^2 D_r. Small factors learn slowly under Adam, whose steps do not scale with them:
    the gain g moves their magnitude without moving the function.
    """

    gain: float = 1.0

    def __call__(self, weight: Tensor, update: Tensor, rank: int) -> Factors:
        """Return the balanced factors; ValueError when nothing has been updated yet."""
        return _balanced(_moved(update, "update_svd"), rank, self.gain)


@dataclass(frozen=True)
class WeightSVD:
    """Balanced factors of the weight itself (PiSSA; Meng, Wang & Zhang, arXiv 2404.02948).

    W ~ U S V^T,  B = g U S^(1/2),  A = g S^(1/2) V^T.
    """

    gain: float = 1.0

    def __call__(self, weight: Tensor, update: Tensor, rank: int) -> Factors:
        """Return the balanced factors of ``weight``."""
        return _balanced(weight, rank, self.gain)


def update_directions(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """A spans the leading right singular vectors of the recent update, B = 0.

    Its rows have norm sqrt(1/3), as those of LoRA's Kaiming-uniform start have on average: LoRA
    with directions from data, as EVA takes them from activations (arXiv 2410.07170).
    """
    directions = truncated_svd(_moved(update, "update_directions"), rank).Vh
    return Factors(directions / 3**0.5, _zero_B(weight, rank))


def zero_b(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """LoRA's own start: A Kaiming-uniform, B = 0 (Hu et al., arXiv 2106.09685)."""
    A = torch.empty(rank, weight.shape[1], device=weight.device)
    nn.init.kaiming_uniform_(A, a=5**0.5)
    return Factors(A, _zero_B(weight, rank))


def orthogonal(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """A with random orthonormal rows of norm sqrt(1/3), B = 0."""
    A = torch.empty(rank, weight.shape[1], device=weight.device)
    nn.init.orthogonal_(A, gain=3**-0.5)
    return Factors(A, _zero_B(weight, rank))


def empty_factors(weight: Tensor) -> Factors:
    """Factors of rank 0: a target that is frozen without an adapter."""
    return Factors(weight.new_zeros(0, weight.shape[1]).float(), _zero_B(weight, 0))


def _balanced(matrix: Tensor, rank: int, gain: float) -> Factors:
    U, S, Vh = truncated_svd(matrix, rank)
    root = gain * S.sqrt()
    return Factors((root[:, None] * Vh).float(), (U * root).float())


def _zero_B(weight: Tensor, rank: int) -> Tensor:
    return torch.zeros(weight.shape[0], rank, device=weight.device)


def _moved(update: Tensor, name: str) -> Tensor:
    if not update.any():
        raise NothingMeasured(
            f"init={name} needs a recent update, but the weights have not moved since the window "
            "began; use init=zero_b, orthogonal or weight_svd to switch at the start"
        )
    return update
