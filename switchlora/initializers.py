"""Adapter initializers: they choose the first factors, ``(weight, update, rank) -> Factors``.

An initializer only chooses the factors of one target. The switch keeps the function of the
network: it subtracts the adapter from the weight.

``weight`` and ``update`` = W - W_ref are (out, in). Both come divided by the target's scaling s.
With gain 1, B A of an SVD start thus approximates the given matrix, s B A the undivided one.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from switchlora.adapters import Factors, switchlora_bounds
from switchlora.errors import NothingMeasured
from switchlora.monitor import truncated_svd


class AdapterInit(Protocol):
    """Choose the factors of one target from its weight and its recent update."""

    def __call__(self, weight: Tensor, update: Tensor, rank: int) -> Factors:
        """Return factors of the given rank for ``weight`` and ``update`` (out, in)."""


@dataclass(frozen=True)
class UpdateSVD:
    """Start from balanced factors of the recent update D = W - W_ref.

    D ~ U S V^T,  B = g U S^(1/2),  A = g S^(1/2) V^T. Hence A A^T = B^T B = g^2 S and
    B A = g^2 D_r. Small factors learn slowly under Adam, since its steps do not scale with them.
    The gain g changes their size without changing the function of the network.
    """

    gain: float = 1.0

    def __call__(self, weight: Tensor, update: Tensor, rank: int) -> Factors:
        """Return the balanced factors; ValueError when nothing has been updated yet."""
        _check_moved(update, "update_svd")
        return _balanced_svd(update, rank, self.gain)


@dataclass(frozen=True)
class WeightSVD:
    """Start from balanced factors of the weight itself: PiSSA.

    By Meng, Wang & Zhang (arXiv 2404.02948).
    W ~ U S V^T,  B = g U S^(1/2),  A = g S^(1/2) V^T.
    """

    gain: float = 1.0

    def __call__(self, weight: Tensor, update: Tensor, rank: int) -> Factors:
        """Return the balanced factors of ``weight``."""
        return _balanced_svd(weight, rank, self.gain)


def update_directions(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """Return A with the leading right singular vectors of the recent update as rows, and B = 0.

    The rows of A have norm sqrt(1/3). The rows of LoRA's Kaiming-uniform start have this norm on
    average. This is LoRA with directions from data; EVA takes them from activations
    (arXiv 2410.07170). It raises ValueError when nothing has been updated yet.
    """
    _check_moved(update, "update_directions")
    _, _, directions = truncated_svd(update, rank)
    return Factors(directions / 3**0.5, _zero_B(weight, rank))


def from_updates(init: AdapterInit) -> bool:
    """Return whether the rows of A come from the recent update."""
    return init is update_directions or isinstance(init, UpdateSVD)


def zero_b(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """Return LoRA's own start: A Kaiming-uniform, B = 0 (Hu et al., arXiv 2106.09685)."""
    A = _empty_A(weight, rank)
    nn.init.kaiming_uniform_(A, a=5**0.5)
    return Factors(A, _zero_B(weight, rank))


def re_init(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """Return A and B Kaiming-uniform: what RefLoRA's code starts from where it has no warm-up.

    By Zhang, Li & Giannakis (arXiv 2505.18877; ``re_init`` in github.com/zhangyilang/RefLoRA). The
    pair is not balanced: entries of B are below 1/sqrt(r), those of A below 1/sqrt(in).
    """
    out_features, _ = weight.shape
    A = _empty_A(weight, rank)
    B = torch.empty(out_features, rank, device=weight.device)
    nn.init.kaiming_uniform_(A, a=5**0.5)
    nn.init.kaiming_uniform_(B, a=5**0.5)
    return Factors(A, B)


def balanced(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """Return the product B A of ``re_init`` in two factors of one norm.

    A <- p A and B <- B / p with p^2 = ||B||_F / ||A||_F, the pair of RefLoRA-S (arXiv 2505.18877).
    """
    A, B = re_init(weight, update, rank)
    p = (B.norm() / A.norm()).sqrt()
    return Factors(p * A, B / p)


def gaussian(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """Return normal factors for which the entries of B A have variance 1 / (in + out).

    It is the start of CoLA (Liu et al., arXiv 2502.10940; alvin-zyl/CoLA): the entries of both
    factors have variance 1 / sqrt(r (in + out)).
    """
    out_features, in_features = weight.shape
    std = (rank * (in_features + out_features)) ** -0.25
    A = nn.init.normal_(_empty_A(weight, rank), std=std)
    B = nn.init.normal_(_zero_B(weight, rank), std=std)
    return Factors(A, B)


def switchlora(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """Return the uniform factors of SwitchLoRA's start (Zhou et al., arXiv 2406.06564).

    It goes with s = 1 / r.
    """
    out_features, in_features = weight.shape
    bound_A, bound_B = switchlora_bounds(out_features, in_features, rank)
    A = nn.init.uniform_(_empty_A(weight, rank), -bound_A, bound_A)
    B = nn.init.uniform_(_zero_B(weight, rank), -bound_B, bound_B)
    return Factors(A, B)


def orthogonal(weight: Tensor, update: Tensor, rank: int) -> Factors:
    """Return A with random orthogonal rows of norm sqrt(1/3), and B = 0."""
    A = _empty_A(weight, rank)
    nn.init.orthogonal_(A, gain=3**-0.5)
    return Factors(A, _zero_B(weight, rank))


def empty_factors(weight: Tensor) -> Factors:
    """Return factors of rank 0, for a target that is frozen without an adapter."""
    return Factors(_empty_A(weight, 0), _zero_B(weight, 0))


def _balanced_svd(matrix: Tensor, rank: int, gain: float) -> Factors:
    U, S, Vh = truncated_svd(matrix, rank)
    root = gain * S.sqrt()
    A = root[:, None] * Vh
    B = U * root
    return Factors(A.float(), B.float())


def _empty_A(weight: Tensor, rank: int) -> Tensor:
    _, in_features = weight.shape
    return torch.empty(rank, in_features, device=weight.device)


def _zero_B(weight: Tensor, rank: int) -> Tensor:
    out_features, _ = weight.shape
    return torch.zeros(out_features, rank, device=weight.device)


def _check_moved(update: Tensor, name: str) -> None:
    if not update.any():
        raise NothingMeasured(
            f"switch/init={name} needs a recent update, but the weights have not moved since the "
            "window began; use switch/init=zero_b, orthogonal or weight_svd to switch at the start"
        )
