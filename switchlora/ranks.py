"""Rank policies: what the full phase measured -> the rank of each adapter.

A new one is a function, or a frozen dataclass with ``__call__``, and a yaml in
``conf/switch/rank``. Rank 0 freezes a target without an adapter.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from switchlora.adapters import FACTORS, Target
from switchlora.errors import NothingMeasured, check_choice, check_range, check_share
from switchlora.monitor import Measurement, energies
from switchlora.names import family


@dataclass(frozen=True)
class SwitchContext:
    """What a rank policy may look at."""

    history: Sequence[Measurement]
    updates: Mapping[str, Tensor]
    """W - W_ref per target (out, in)"""
    initial_stable_ranks: Mapping[str, float]
    """of each target's weight before training"""
    total_parameters: int
    """of the model before the switch"""
    other_trainable: int
    """parameters that go on training besides the factors"""
    train_factors: Sequence[str] = FACTORS
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """W per target (out, in)"""
    part: float = 1.0
    """share of the weights still to be adapted that this stage takes"""


class Weights(Mapping[str, Tensor]):
    """W of each target (out, in), read from ``model`` when it is asked for."""

    def __init__(self, model: nn.Module, targets: Mapping[str, Target]) -> None:
        self._model, self._targets = model, targets

    def __getitem__(self, name: str) -> Tensor:
        return self._targets[name].weight(self._model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


RankPolicy = Callable[[SwitchContext], Mapping[str, int]]


@dataclass(frozen=True)
class Fixed:
    """The same rank everywhere."""

    rank: int = 8

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Rank per target; ValueError for a rank above a target's smaller side."""
        for name, update in context.updates.items():
            if not 1 <= self.rank <= min(update.shape):
                raise ValueError(
                    f"rank {self.rank} does not fit {name} of shape {tuple(update.shape)}: "
                    f"give 1 to {min(update.shape)}"
                )
        return dict.fromkeys(context.updates, self.rank)


@dataclass(frozen=True)
class RankRatio:
    """r = round(ratio * min(out, in)): Pufferfish's one ratio (Wang et al., arXiv 2103.03936)."""

    ratio: float = 0.25

    def __post_init__(self) -> None:
        check_share("rank.ratio", self.ratio)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Rank per target, at least 1."""
        sides = {name: min(update.shape) for name, update in context.updates.items()}
        return {name: max(round(self.ratio * side), 1) for name, side in sides.items()}


@dataclass(frozen=True)
class ParameterRatio:
    """r = round(ratio * out in / (out + in)): factors with that share of a target's parameters.

    Low-rank FFN training (Wei et al., arXiv 2407.09835) has 0.625 and 0.3125, which are r = d / 2
    and d / 4 between widths d and 4 d.
    """

    ratio: float = 0.63

    def __post_init__(self) -> None:
        check_share("rank.ratio", self.ratio)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Rank per target, at least 1."""
        full = {n: math.prod(u.shape) / sum(u.shape) for n, u in context.updates.items()}
        return {name: max(round(self.ratio * rank), 1) for name, rank in full.items()}


@dataclass(frozen=True)
class PreLoRARanks:
    """PreLoRA's ranks: the more a target changed lately, the larger (arXiv 2509.21619).

    c_i = |m_i(T) - m_i(T-1)| / m_i(T-1) of ``signal``; u_i = c_i scaled to [0, 1] over the family
    (``mode='family'``) or over all; R = [r_min, 2 r_min, ..., r_max]; r_i = R[ceil(u_i |R|) - 1],
    or R[0] at u_i = 0. Equal changes (max = min) give r_min.
    """

    r_min: int = 4
    r_max: int = 32
    signal: str = "grad_norm"
    mode: str = "family"

    def __post_init__(self) -> None:
        if not (_is_power_of_two(self.r_min) and _is_power_of_two(self.r_max)):
            raise ValueError(f"r_min {self.r_min} and r_max {self.r_max} must be powers of two")
        check_choice("rank.mode", self.mode, ("family", "all"))
        check_choice("rank.signal", self.signal, ("grad_norm", "weight_norm", "update_norm"))
        if self.r_min >= self.r_max:
            raise ValueError(f"r_min {self.r_min} must be below r_max {self.r_max}")

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Rank per target; NothingMeasured with fewer than two measurements."""
        if len(context.history) < 2:
            raise NothingMeasured("rank=prelora compares two windows; fewer are measured")
        before, after = (m.layers for m in context.history[-2:])
        changes = {
            name: _change(getattr(before[name], self.signal), getattr(after[name], self.signal))
            for name in context.updates
        }
        groups: dict[str, list[float]] = {}
        for name, change in changes.items():
            groups.setdefault(self._group(name), []).append(change)
        return {name: self._rank(c, groups[self._group(name)]) for name, c in changes.items()}

    def _group(self, name: str) -> str:
        return family(name) if self.mode == "family" else ""

    def _rank(self, change: float, group: Sequence[float]) -> int:
        low, high = min(group), max(group)
        share = (change - low) / (high - low) if high > low else 0.0
        steps = int(math.log2(self.r_max // self.r_min)) + 1
        return self.r_min * 2 ** max(math.ceil(share * steps) - 1, 0)


@dataclass(frozen=True)
class StableRankRanks:
    """The measured stable rank, rounded up, of the last window's update or of the weight.

    ``scaled`` is Cuttlefish's form for weights: r = ceil(rho * full / rho_init), where rho_init is
    the stable rank before training (arXiv 2305.02538). ``multiplier`` widens. Two floors:
    ``lowest``, a share of the full rank, and ``accumulative`` = p, Cuttlefish's accumulative rank
    min {k : sum_{i<=k} s_i >= p * sum s_i} with s the singular values of W.
    """

    of: str = "update"
    multiplier: float = 1.0
    scaled: bool = False
    lowest: float = 0.0
    power_of_two: bool = False
    accumulative: float | None = None

    def __post_init__(self) -> None:
        check_choice("rank.of", self.of, ("weight", "update"))
        check_range("rank.multiplier", self.multiplier, 0)
        check_range("rank.lowest", self.lowest, 0, 1)
        if self.accumulative is not None:
            check_share("rank.accumulative", self.accumulative)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Rank per target; NothingMeasured before the first measurement."""
        if not context.history:
            raise NothingMeasured("rank=stable_rank needs a measurement; none is there yet")
        return {
            name: self._rank(context, name, min(update.shape))
            for name, update in context.updates.items()
        }

    def _rank(self, context: SwitchContext, name: str, full: int) -> int:
        stable = getattr(context.history[-1].layers[name], f"{self.of}_stable_rank")
        factor = full / context.initial_stable_ranks[name] if self.scaled else 1.0
        wanted = max(math.ceil(self.multiplier * stable * factor), math.ceil(self.lowest * full))
        if self.accumulative is not None:
            values = energies(context.weights[name]).sqrt()
            wanted = max(wanted, _smallest_count(values, self.accumulative))
        return _bounded(wanted, full, self.power_of_two)


@dataclass(frozen=True)
class Energy:
    """The smallest rank that captures a share of the update's energy.

    r = min {k : sum_{i<=k} S_i^2 >= share * sum S_i^2} with S the singular values of W - W_ref.
    """

    share: float = 0.8
    r_max: int | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        check_share("rank.share", self.share)
        if self.r_max is not None:
            check_range("rank.r_max", self.r_max, 1)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Rank per target; NothingMeasured before the first update."""
        return {name: self._rank(name, update) for name, update in context.updates.items()}

    def _rank(self, name: str, update: Tensor) -> int:
        wanted = _smallest_count(_energies(name, update), self.share)
        full = min(update.shape)
        return _bounded(wanted, min(self.r_max or full, full), self.power_of_two)


@dataclass(frozen=True)
class Budget:
    """The ranks that capture most energy of the updates with a given share of trained parameters.

    Maximises sum_i sum_{k <= r_i} S_ik^2 under sum_i r_i (out_i + in_i) + others <= ``share`` * P,
    with P the model's parameters and 'others' what trains besides the factors; in_i does not count
    where A is frozen. Singular values
    descend, so buying them by energy per parameter is optimal up to the last one bought.
    ``relative`` counts energy as a share of the layer's own.
    """

    share: float = 0.1
    relative: bool = False
    r_min: int = 1
    power_of_two: bool = False

    def __post_init__(self) -> None:
        check_share("rank.share", self.share)
        check_range("rank.r_min", self.r_min, 0)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Rank per target; ValueError when even ``r_min`` everywhere is above the budget."""
        updates = context.updates
        costs = {name: _cost(update, context.train_factors) for name, update in updates.items()}
        left = int(self.share * context.total_parameters) - context.other_trainable
        left = int(left * context.part)
        left -= self.r_min * sum(costs.values())
        if left < 0:
            raise ValueError(
                f"rank.share={self.share:g} is too small: r_min={self.r_min} on every target and "
                f"{context.other_trainable:,} other trained parameters already need "
                f"{-left:,} parameters more"
            )
        ranks = dict.fromkeys(costs, self.r_min)
        for _, name in sorted(self._offers(context, costs), reverse=True):
            if costs[name] <= left:
                ranks[name] += 1
                left -= costs[name]
        return {name: _power_below(r) if self.power_of_two else r for name, r in ranks.items()}

    def _offers(self, context: SwitchContext, costs: Mapping[str, int]) -> list[tuple[float, str]]:
        offers = []
        for name, update in context.updates.items():
            energy = _energies(name, update)
            value = energy / energy.sum() if self.relative else energy
            useful = value[self.r_min : largest_saving_rank(update.shape)]
            offers += [(e / costs[name], name) for e in useful.tolist()]
        return offers


def saves_parameters(rank: int, shape: Sequence[int]) -> bool:
    """Whether factors of this rank are smaller than the weight (out, in) they stand for."""
    return rank <= largest_saving_rank(shape)


def largest_saving_rank(shape: Sequence[int]) -> int:
    """The largest r with r (out + in) < out in."""
    return (math.prod(shape) - 1) // sum(shape)


def _cost(update: Tensor, train_factors: Sequence[str]) -> int:
    return sum(n for factor, n in zip("BA", update.shape, strict=True) if factor in train_factors)


def _energies(name: str, update: Tensor) -> Tensor:
    energy = energies(update)
    if not torch.any(energy):
        raise NothingMeasured(
            f"{name} has not moved since its window began: a rank policy that reads the updates "
            "cannot switch here; use rank=fixed"
        )
    return energy


def _smallest_count(values: Tensor, share: float) -> int:
    cumulative = values.cumsum(0)
    return int((cumulative < share * cumulative[-1] * (1 - 1e-12)).sum()) + 1


def _change(before: float, after: float) -> float:
    return abs(after - before) / before if before else 0.0


def _bounded(rank: int, full: int, power_of_two: bool) -> int:
    rank = 2 ** math.ceil(math.log2(max(rank, 1))) if power_of_two else max(rank, 1)
    return min(rank, full)


def _power_below(rank: int) -> int:
    return 2 ** int(math.log2(rank)) if rank else 0


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
