"""RefLoRA: steps as if each pair of factors were balanced first (arXiv 2505.18877).

For any invertible P the pair (P^T A, B P^-T) has the product B A too. Its gradients differ, and so
does its next step. Zhang, Li and Giannakis choose the pair for which A A^T = B^T B. Only S = P P^T
matters. It is the one symmetric positive definite solution of S (A A^T) S = B^T B: the geometric
mean of (A A^T)^-1 and B^T B.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from switchlora.adapters import Adapter, trained_adapters
from switchlora.errors import check_range, check_share
from switchlora.learner.learner import Learner
from switchlora.learner.moments import rescale_moments

EPS = 1e-5
"""relative to the largest singular value: a smaller one counts as zero; rounding of float32
factors turns zeros into singular values of about 1e-7"""
BEGAN, LEARNER = "refactored_from", "refactored_by"
"""keys in the optimizer's state of the first A: the update from which pairs are refactored, and
the start of the learner that did so, whose moments may outlive it"""


class FactorBalance(NamedTuple):
    """How balanced pairs of factors are: medians over the pairs."""

    norm_ratio: float
    """||B||_F / ||A||_F; 0 at B = 0"""
    spread: float
    """largest eigenvalue of S over its smallest; 1 of a singular pair, whose S is the identity"""


@dataclass(frozen=True)
class Refactoring:
    """When pairs of factors are refactored, however that is done.

    It begins once ``warmup_updates`` of the recipe are made. With ``start_balance`` it also waits
    until the median of ||B||_F / ||A||_F is as large as that, which is an addition of this
    project. From then on it acts on every ``interval``-th update.
    """

    warmup_updates: int = 100
    interval: int = 1
    start_balance: float | None = None

    def __post_init__(self) -> None:
        check_range("refactoring.warmup_updates", self.warmup_updates, 0)
        check_range("refactoring.interval", self.interval, 1)
        if self.start_balance is not None:
            check_range("refactoring.start_balance", self.start_balance, 0)

    @property
    def at_once(self) -> bool:
        """Whether it begins before the first update, whatever the factors are."""
        return not self.warmup_updates and not self.start_balance

    def acts(self, learner: Learner, pairs: Sequence[Adapter], done: int) -> bool:
        """Return whether ``pairs`` are refactored after ``done`` updates of the recipe.

        The first time that it does, the learner gets that number of updates and a measurement.
        """
        if learner.refactored_from is None:
            learner.refactored_from = refactored_from(learner)
        if learner.refactored_from is None and self._may_begin(pairs, done):
            learner.refactored_from = learner.start + (0 if self.at_once else done)
            learner.balance_then = factor_balance(pairs)
        if learner.refactored_from is None:
            return False
        return (learner.start + done - learner.refactored_from) % self.interval == 0

    def _may_begin(self, pairs: Sequence[Adapter], done: int) -> bool:
        if done < self.warmup_updates:
            return False
        return not self.start_balance or norm_ratios(pairs).median().item() >= self.start_balance


@dataclass(frozen=True)
class RefLoRA(Refactoring):
    """Precondition the gradients of the factors before a step: g_A <- S^-1 g_A, g_B <- g_B S.

    This is a step in the balanced pair, mapped back (Zhang et al., arXiv 2505.18877; code:
    github.com/zhangyilang/RefLoRA). The factors and the optimizer's moments are not refactored, so
    moments are those of preconditioned gradients. A singular pair, as at B = 0, keeps its
    gradients. ``refactoring_matrices`` explains ``eps``.

    With ``reset_moments`` the factors' moments begin anew when refactoring begins, which is an
    addition of this project: those of gradients before it are of another size.
    """

    eps: float = EPS
    reset_moments: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("refactoring.eps", self.eps)

    def __call__(self, learner: Learner) -> None:
        """Give the optimizer of ``learner`` a hook that acts before each step."""
        pairs = trained_pairs(learner)
        if not pairs:
            return
        batches = _by_rank(pairs)
        its = weakref.ref(learner)  # a cycle would keep the moments of learners that are replaced

        def before_step(*_: object) -> None:
            learner = cast(Learner, its())
            if not self.acts(learner, pairs, learner.since):
                return
            if self.reset_moments and learner.refactored_from == learner.num_updates:
                drop_moments(pairs, learner.optimizer)
            for batch in batches:
                precondition(batch, self.eps)

        def after_step(*_: object) -> None:
            keep_start(cast(Learner, its()), pairs)

        learner.optimizer.register_step_pre_hook(before_step)
        learner.optimizer.register_step_post_hook(after_step)


@dataclass(frozen=True)
class RefLoRAS(Refactoring):
    """Give A and B of each pair the same norm after a step (RefLoRA-S, arXiv 2505.18877).

    That is S = p^2 I with p^2 = ||B||_F / ||A||_F: A <- p A and B <- B / p. Without a warm-up it
    happens once at the start too. The optimizer's moments are rescaled as gradients would be: by
    1/p for A and by p for B. Second moments are rescaled by the squares.
    """

    def __call__(self, learner: Learner) -> None:
        """Give the optimizer of ``learner`` a hook that balances the factors after each step."""
        pairs = trained_pairs(learner)
        if not pairs:
            return
        its = weakref.ref(learner)

        def after_step(optimizer: Optimizer, *_: object) -> None:
            learner = cast(Learner, its())
            if self.acts(learner, pairs, learner.since + 1):
                balance(pairs, optimizer)
            keep_start(learner, pairs)

        if self.at_once:
            balance(pairs, learner.optimizer)
        learner.optimizer.register_step_post_hook(after_step)


def refactored_from(learner: Learner) -> int | None:
    """Return the update from which the pairs of a learner are refactored, None if not yet.

    A learner that goes on from a checkpoint finds it among the optimizer's moments.
    """
    if learner.refactored_from is not None:
        return learner.refactored_from
    for pair in trained_pairs(learner)[:1]:
        state = learner.optimizer.state.get(pair.A, {})
        if state.get(LEARNER) == learner.start:
            return int(state[BEGAN])
    return None


def keep_start(learner: Learner, pairs: Sequence[Adapter]) -> None:
    """Keep with the moments from which update on pairs are refactored, for a checkpoint.

    It is called after a step: an optimizer takes a state that holds anything as complete.
    """
    if learner.refactored_from is not None:
        kept = {BEGAN: learner.refactored_from, LEARNER: learner.start}
        learner.optimizer.state[pairs[0].A].update(kept)


def drop_moments(pairs: Sequence[Adapter], optimizer: Optimizer) -> None:
    """Let the moments of the factors begin anew, with their counters."""
    for pair in pairs:
        optimizer.state.pop(pair.A, None)
        optimizer.state.pop(pair.B, None)


@torch.no_grad()
def norm_ratios(pairs: Sequence[Adapter]) -> Tensor:
    """Return ||B||_F / ||A||_F of each pair."""
    norms_A = torch.stack(torch._foreach_norm([pair.A for pair in pairs]))
    norms_B = torch.stack(torch._foreach_norm([pair.B for pair in pairs]))
    return norms_B / norms_A


@torch.no_grad()
def factor_balance(pairs: Sequence[Adapter], eps: float = EPS) -> FactorBalance:
    """Return how balanced ``pairs`` are, of which there is at least one."""
    spreads = []
    for batch in _by_rank(pairs):
        means, _ = geometric_means(*_grams(batch), eps)
        values = torch.linalg.eigvalsh(means)
        spreads.append(values[:, -1] / values[:, 0])
    ratio = norm_ratios(pairs).median()
    return FactorBalance(ratio.item(), torch.cat(spreads).median().item())


def refactoring_matrices(A: Tensor, B: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Return S (..., r, r) with S (A A^T) S = B^T B, and its inverse, in float64.

    A is (..., r, in), B is (..., out, r). S or its inverse would be unbounded for a singular pair:
    a singular value of A, or of B A, is below ``eps`` times the largest one. That is so at B = 0,
    or when a row of A is zero. Both matrices are the identity then.
    """
    return geometric_means(_gram(A), _gram(B.mT), eps)


def geometric_means(P: Tensor, Q: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return S with S P S = Q, and its inverse.

    P and Q (..., r, r) are symmetric positive definite. With P = V s^2 V^T and K = V diag(s): K^T
    Q K = W t^2 W^T, S = K^-T W diag(t) W^T K^-1. Both results are identities where the smallest s
    or t is below ``eps`` times the largest. For P = A A^T and Q = B^T B, the t are the singular
    values of B A.
    """
    s, V = _roots_and_vectors(P)
    K = V * s.unsqueeze(-2)
    t, W = _roots_and_vectors(K.mT @ Q @ K)
    regular = _spread_within(eps, s) & _spread_within(eps, t)
    s = torch.where(regular, s, 1.0).unsqueeze(-2)
    t = torch.where(regular, t, 1.0).unsqueeze(-2)
    outer = (V / s) @ W
    inner = (V * s) @ W
    mean = (outer * t) @ outer.mT
    inverse = (inner / t) @ inner.mT
    identity = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    regular = regular.unsqueeze(-1)
    return torch.where(regular, mean, identity), torch.where(regular, inverse, identity)


@torch.no_grad()
def precondition(pairs: Sequence[Adapter], eps: float = EPS) -> None:
    """Set g_A <- S^-1 g_A and g_B <- g_B S in place, for pairs of one rank that have gradients."""
    means, inverses = geometric_means(*_grams(pairs), eps)
    for pair, S, inverse in zip(pairs, means, inverses, strict=True):
        g_A, g_B = cast(Tensor, pair.A.grad), cast(Tensor, pair.B.grad)
        g_A.copy_(inverse.to(g_A) @ g_A)
        g_B.copy_(g_B @ S.to(g_B))


@torch.no_grad()
def balance(pairs: Sequence[Adapter], optimizer: Optimizer) -> None:
    """Set A <- p A, B <- B / p with p^2 = ||B||_F / ||A||_F, and rescale their moments to match.

    The product B A does not change. A pair with a zero factor is left alone.
    """
    if not pairs:
        return
    ratios = norm_ratios(pairs)
    neither_is_zero = (ratios > 0) & ratios.isfinite()
    scales = torch.where(neither_is_zero, ratios, 1.0).sqrt()
    for pair, p in zip(pairs, scales, strict=True):
        pair.A.mul_(p)
        pair.B.div_(p)
        rescale_moments(optimizer.state.get(pair.A, {}), 1 / p)
        rescale_moments(optimizer.state.get(pair.B, {}), p)


def trained_pairs(learner: Learner) -> list[Adapter]:
    """Return the adapters of a learner's model whose two factors both train."""
    return [pair for pair in trained_adapters(learner.model) if pair.A.requires_grad]


def _by_rank(pairs: Sequence[Adapter]) -> list[list[Adapter]]:
    """Return the pairs in lists of one rank each, the smallest rank first."""
    found: dict[int, list[Adapter]] = {}
    for pair in pairs:
        found.setdefault(len(pair.A), []).append(pair)
    return [found[rank] for rank in sorted(found)]


def _grams(pairs: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
    """Return A A^T and B^T B of pairs of one rank, each (pairs, r, r)."""
    grams_A = torch.stack([_gram(pair.A) for pair in pairs])
    grams_B = torch.stack([_gram(pair.B.mT) for pair in pairs])
    return grams_A, grams_B


def _gram(rows: Tensor) -> Tensor:
    double = rows.detach().double()
    return double @ double.mT


def _roots_and_vectors(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(symmetric)
    return values.clamp(min=0).sqrt(), vectors


def _spread_within(eps: float, values: Tensor) -> Tensor:
    """Return whether the smallest of ascending values is above ``eps`` times the largest.

    ``values`` is (..., n), the result (..., 1).
    """
    smallest = values[..., :1]
    largest = values[..., -1:]
    return smallest > eps * largest
