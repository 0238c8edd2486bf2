r"""GaLore, Fira and APOLLO: full training with Adam's moments in a subspace, AdamW for all else.

They train every parameter to the end, with a smaller state of the optimizer. G (m, n) is the
gradient of a matrix with m <= n, or its transpose. P (m, r) is its projection, a new one every
``interval`` updates. With Adam's moments M and V of R = P^T G, and c Adam's correction of their
bias, a matrix moves by -lr c times

- GaLore (Zhao et al., arXiv 2403.03507): s P psi, where psi = M / (sqrt(V) + eps);
- Fira (Chen et al., arXiv 2410.01623): s P psi + limited(phi (G - s P R));
- APOLLO (Zhu et al., arXiv 2412.05270): s limited(phi G).

phi = ||psi|| / ||R|| is taken for each of the n columns; in APOLLO-Mini, for the whole matrix. In
GaLore and Fira the columns of P are the first left singular vectors of the gradient. In APOLLO its
entries are random and normal with variance 1/r. limited(X) is X, made shorter where its norm would
grow by more than 1 % in an update.

Details are those of github.com/jiaweizzhao/GaLore and github.com/xichen-fy/Fira, and of the
authors' code of APOLLO.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from switchlora.errors import check_choice, check_range
from switchlora.learner.parts import FACTORS, MATRICES, OTHERS, InParts

FIRST, SECOND = "projected_exp_avg", "projected_exp_avg_sq"
PROJECTION, SEED, NORM, STEP = "projection", "seed", "norm", "step"
GROWTH = 1.01
"""how many times the norm of a limited term may be that of the update before"""
TINY = 1e-8
"""is added to norms that divide"""
SCALINGS = ("channel", "tensor")
PRIME = 1_000_003
State = dict[str, Any]


class Projected(InParts):
    """The common part: Adam's moments of the projected gradients of matrices.

    ``rank`` is a number of at least 1, or a share of the shorter side of a matrix. ``scale`` is s.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-6,
        rank: float = 0.25,
        interval: int = 200,
        scale: float = 0.25,
    ) -> None:
        super().__init__(params, lr, weight_decay, betas, eps, by_adamw=(FACTORS, OTHERS))
        check_range("full.optimizer.interval", interval, 1)
        if not rank > 0:
            raise ValueError(f"full.optimizer.rank is {rank}: give a number above 0")
        self.rank = rank
        self.interval = interval
        self.scale = scale

    def step_size(self, rows: int, columns: int) -> float:
        """Return about how many times as long a matrix's step is as AdamW's at the same rate.

        The columns of psi have the norm sqrt(r), where those of AdamW's step have sqrt(m).
        """
        shorter = min(rows, columns)
        return self.scale * math.sqrt(rank_of(shorter, self.rank) / shorter)

    def step_the_rest(self) -> None:
        """Update the matrices."""
        number = 0
        for group in self.groups(MATRICES):
            for weight in group["params"]:
                number += 1
                if weight.grad is not None:
                    self._step_matrix(weight, wide(weight.grad), group, number)

    def _step_matrix(
        self, weight: Tensor, gradient: Tensor, group: dict[str, Any], number: int
    ) -> None:
        state = self._state_of(weight, gradient, number)
        projection = self.projection(state, gradient)
        inside = projection.mT @ gradient
        direction = self._direction(state, inside)
        change = self.change(state, gradient, projection, inside, direction)
        lr = group["lr"]
        weight.mul_(1 - lr * group["weight_decay"])
        wide(weight).sub_(change, alpha=lr * self._correction(state[STEP]))

    def _state_of(self, weight: Tensor, gradient: Tensor, number: int) -> State:
        """Return the state of a matrix; a new one if it has none, or one of another rank."""
        state = self.state[weight]
        shape = (rank_of(len(gradient), self.rank), gradient.shape[1])
        if FIRST not in state or state[FIRST].shape != shape:
            state.clear()
            state[STEP] = 0
            state[SEED] = number
            state[FIRST] = gradient.new_zeros(shape)
            state[SECOND] = gradient.new_zeros(shape)
        return state

    def _direction(self, state: State, inside: Tensor) -> Tensor:
        """Return psi after the present gradient, without Adam's correction of the bias."""
        first, second = self.betas
        state[STEP] += 1
        state[FIRST].lerp_(inside, 1 - first)
        state[SECOND].mul_(second).addcmul_(inside, inside, value=1 - second)
        return state[FIRST] / (state[SECOND].sqrt() + self.eps)

    def _correction(self, step: int) -> float:
        first, second = self.betas
        return math.sqrt(1 - second**step) / (1 - first**step)

    def projection(self, state: State, gradient: Tensor) -> Tensor:
        """Return P (m, r) of this update: the first left singular vectors of a gradient."""
        if state[STEP] % self.interval == 0:
            vectors, _, _ = torch.linalg.svd(gradient, full_matrices=False)
            rank = rank_of(len(gradient), self.rank)
            state[PROJECTION] = vectors[:, :rank].clone()  # a view would keep all of them
        return state[PROJECTION]

    def change(
        self, state: State, gradient: Tensor, projection: Tensor, inside: Tensor, direction: Tensor
    ) -> Tensor:
        """Return what the matrix moves by, over -lr c; ``inside`` is R, ``direction`` psi."""
        raise NotImplementedError


class GaLore(Projected):
    """Adam within the leading singular vectors of the gradient (arXiv 2403.03507)."""

    def change(
        self, state: State, gradient: Tensor, projection: Tensor, inside: Tensor, direction: Tensor
    ) -> Tensor:
        """Return s P psi."""
        return self.scale * projection @ direction


class Fira(Projected):
    """GaLore, and the rest of the gradient with the lengths that Adam gives (arXiv 2410.01623)."""

    def step_size(self, rows: int, columns: int) -> float:
        """Return GaLore's with s = 1, since the rest is nearly the whole gradient."""
        return super().step_size(rows, columns) / self.scale

    def change(
        self, state: State, gradient: Tensor, projection: Tensor, inside: Tensor, direction: Tensor
    ) -> Tensor:
        """Return s P psi + limited(phi (G - s P R)), as in the authors' code.

        Their paper has P R without s.
        """
        rest = gradient - self.scale * projection @ inside
        return self.scale * projection @ direction + limited(
            state, column_scales(inside, direction) * rest
        )


class Apollo(Projected):
    """The gradient itself, with lengths of columns that Adam gives in a random subspace.

    ``scaling`` says what has a length of its own (arXiv 2412.05270):

    - 'channel': each column of the wide gradient, as in APOLLO.
    - 'tensor': the matrix alone, as in APOLLO-Mini.

    A projection is drawn again at each update, from a seed, so that the state holds none. It is
    drawn on the CPU: it is the same on all ranks and devices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        scale: float = 1.0,
        scaling: str = "channel",
        **options: Any,
    ) -> None:
        super().__init__(params, scale=scale, **options)
        check_choice("full.optimizer.scaling", scaling, SCALINGS)
        self.scaling = scaling

    def projection(self, state: State, gradient: Tensor) -> Tensor:
        """Return P (m, r) of this update: normal numbers with the variance 1/r."""
        rank = rank_of(len(gradient), self.rank)
        number = state[STEP] // self.interval
        generator = torch.Generator().manual_seed(PRIME * state[SEED] + number)
        drawn = torch.randn(len(gradient), rank, generator=generator, device="cpu")
        return drawn.to(gradient) / rank**0.5

    def change(
        self, state: State, gradient: Tensor, projection: Tensor, inside: Tensor, direction: Tensor
    ) -> Tensor:
        """Return s limited(phi G)."""
        if self.scaling == "channel":
            lengths = column_scales(inside, direction)
        else:
            lengths = direction.norm() / (inside.norm() + TINY)
        return self.scale * limited(state, lengths * gradient)


def wide(matrix: Tensor) -> Tensor:
    """Return a view of a matrix that has more columns than rows: the matrix, or its transpose."""
    rows, columns = matrix.shape
    return matrix if rows < columns else matrix.mT


def rank_of(rows: int, rank: float) -> int:
    """Return the rank of the projection of a wide gradient: a number, or a share of its rows.

    >>> rank_of(64, 0.25), rank_of(64, 128)
    (16, 64)
    """
    wanted = round(rank * rows) if rank < 1 else int(rank)
    return max(1, min(wanted, rows))


def column_scales(inside: Tensor, direction: Tensor) -> Tensor:
    """Return phi (1, n): how much longer Adam makes each column of the projected gradient."""
    lengths: Tensor = direction.norm(dim=0, keepdim=True)
    return lengths / (inside.norm(dim=0, keepdim=True) + TINY)


def limited(state: State, term: Tensor) -> Tensor:
    """Return ``term``, shortened to at most ``GROWTH`` times its norm of the update before.

    This is the limiter of Fira (arXiv 2410.01623). ``state`` remembers the norm.
    """
    norm = term.norm().reshape(1)
    if NORM in state:
        too_long = (norm / (state[NORM] + TINY)).clamp_min(GROWTH) / GROWTH
        term, norm = term / too_long, norm / too_long
    state[NORM] = norm
    return term
