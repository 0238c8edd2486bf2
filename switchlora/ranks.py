"""Rank policies: they choose the rank of each adapter from what the full phase measured.

To add one, write a function, or a frozen dataclass with ``__call__``, and a yaml in
``conf/switch/rank``. Rank 0 freezes a target without an adapter.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor, nn

from switchlora.adapters import FACTORS, Target
from switchlora.errors import NothingMeasured, check_choice, check_range, check_share
from switchlora.monitor import Measurement, energies
from switchlora.names import family


@dataclass(frozen=True)
class SwitchContext:
    """What a rank policy may read, about the targets that switch now."""

    history: Sequence[Measurement]
    updates: Mapping[str, Tensor]
    """the recent update W - W_ref (out, in) of each target"""
    initial_stable_ranks: Mapping[str, float]
    """stable rank of each target's weight before training"""
    total_parameters: int
    """parameters of the model before the switch"""
    other_trainable: int
    """number of parameters that go on training beside the factors"""
    train_factors: Sequence[str] = FACTORS
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """the weight W (out, in) of each target"""
    part: float = 1.0
    """the targets that switch now hold this share of the weights of all targets still to switch"""


class Weights(Mapping[str, Tensor]):
    """Mapping of each target to its weight W (out, in), read from ``model`` on access."""

    def __init__(self, model: nn.Module, targets: Mapping[str, Target]) -> None:
        self._model = model
        self._targets = targets

    def __getitem__(self, name: str) -> Tensor:
        return self._targets[name].weight(self._model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


RankPolicy = Callable[[SwitchContext], Mapping[str, int]]


@dataclass(frozen=True)
class Fixed:
    """Give every target the same rank."""

    rank: int = 8

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Return the rank per target; ValueError for a rank above a target's smaller side."""
        for name, update in context.updates.items():
            full = min(update.shape)
            if not 1 <= self.rank <= full:
                raise ValueError(
                    f"switch.rank.rank={self.rank} does not fit {name} of shape "
                    f"{tuple(update.shape)}: give 1 to {full}"
                )
        return dict.fromkeys(context.updates, self.rank)


@dataclass(frozen=True)
class RankRatio:
    """Give every target the same share of its full rank: r = round(ratio * min(out, in)).

    This is the one ratio of Pufferfish (Wang et al., arXiv 2103.03936).
    """

    ratio: float = 0.25

    def __post_init__(self) -> None:
        check_share("switch.rank.ratio", self.ratio)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Return the rank per target, at least 1."""
        ranks = {}
        for name, update in context.updates.items():
            full = min(update.shape)
            rank = round(self.ratio * full)
            ranks[name] = max(rank, 1)
        return ranks


@dataclass(frozen=True)
class ParameterRatio:
    """Give the factors the share ``ratio`` of their target's parameters.

    r = round(ratio * out in / (out + in)). Low-rank FFN training (Wei et al., arXiv 2407.09835)
    uses the ratios 0.625 and 0.3125. Between widths d and 4 d, these are r = d / 2 and r = d / 4.
    """

    ratio: float = 0.63

    def __post_init__(self) -> None:
        check_share("switch.rank.ratio", self.ratio)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Return the rank per target, at least 1."""
        ranks = {}
        for name, update in context.updates.items():
            out_features, in_features = update.shape
            as_large = out_features * in_features / (out_features + in_features)
            rank = round(self.ratio * as_large)
            ranks[name] = max(rank, 1)
        return ranks


@dataclass(frozen=True)
class PreLoRARanks:
    """Give larger ranks to targets that changed more lately: PreLoRA (arXiv 2509.21619).

    - c_i = |m_i(T) - m_i(T-1)| / m_i(T-1), with m_i the ``signal`` of target i and T the last
      window.
    - u_i is c_i scaled to [0, 1] over the family (``mode='family'``) or over all targets ('all').
    - r_i = R[ceil(u_i |R|) - 1], or R[0] at u_i = 0, with R = [r_min, 2 r_min, ..., r_max].

    Equal changes (max = min) give r_min.
    """

    r_min: int = 4
    r_max: int = 32
    signal: str = "grad_norm"
    mode: str = "family"

    def __post_init__(self) -> None:
        if not (_is_power_of_two(self.r_min) and _is_power_of_two(self.r_max)):
            raise ValueError(
                f"switch.rank.r_min={self.r_min} and switch.rank.r_max={self.r_max} must be "
                "powers of two"
            )
        check_choice("switch.rank.mode", self.mode, ("family", "all"))
        check_choice(
            "switch.rank.signal", self.signal, ("grad_norm", "weight_norm", "update_norm")
        )
        if self.r_min >= self.r_max:
            raise ValueError(
                f"switch.rank.r_min={self.r_min} must be below switch.rank.r_max={self.r_max}"
            )

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Return the rank per target; NothingMeasured with fewer than two measurements."""
        if len(context.history) < 2:
            raise NothingMeasured("switch/rank=prelora compares two windows; fewer are measured")
        before, after = context.history[-2:]
        changes: dict[str, float] = {}
        groups: dict[str, list[float]] = {}
        signal = attrgetter(self.signal)
        for name in context.updates:
            old = signal(before.layers[name])
            new = signal(after.layers[name])
            changes[name] = _change(old, new)
            group = groups.setdefault(self._group(name), [])
            group.append(changes[name])
        ranks = {}
        for name, change in changes.items():
            if not math.isfinite(change):
                raise ValueError(
                    f"switch/rank=prelora reads {self.signal}, and that of {name} is not finite: "
                    "choose another switch.rank.signal, or give the target a gradient"
                )
            group = groups[self._group(name)]
            ranks[name] = self._rank(change, group)
        return ranks

    def _group(self, name: str) -> str:
        return family(name) if self.mode == "family" else ""

    def _rank(self, change: float, group: Sequence[float]) -> int:
        low = min(group)
        high = max(group)
        share = 0.0
        if high > low:
            share = (change - low) / (high - low)
        num_ranks = int(math.log2(self.r_max // self.r_min)) + 1
        doublings = max(math.ceil(share * num_ranks) - 1, 0)
        return self.r_min * 2**doublings


@dataclass(frozen=True)
class StableRankRanks:
    """Give each target its measured stable rank rho, rounded up.

    - ``of``: 'update' takes rho of the last window's update, 'weight' takes rho of the weight.
    - ``multiplier``: multiply rho by it before rounding.
    - ``scaled``: Cuttlefish's form for weights (arXiv 2305.02538), r = ceil(rho * full / rho_init)
      with full = min(out, in). rho_init is the stable rank of the weight before training.
    - ``lowest``: the rank is at least this share of the full rank.
    - ``accumulative`` = p: the rank is at least Cuttlefish's accumulative rank,
      min {k : sum_{i<=k} s_i >= p * sum s_i} with s the singular values of W.
    - ``power_of_two``: round up to a power of two.
    """

    of: str = "update"
    multiplier: float = 1.0
    scaled: bool = False
    lowest: float = 0.0
    power_of_two: bool = False
    accumulative: float | None = None

    def __post_init__(self) -> None:
        check_choice("switch.rank.of", self.of, ("weight", "update"))
        check_range("switch.rank.multiplier", self.multiplier, 0)
        check_range("switch.rank.lowest", self.lowest, 0, 1)
        if self.accumulative is not None:
            check_share("switch.rank.accumulative", self.accumulative)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Return the rank per target; NothingMeasured before the first measurement."""
        if not context.history:
            raise NothingMeasured("switch/rank=stable_rank needs a measurement; none is there yet")
        ranks = {}
        for name, update in context.updates.items():
            full = min(update.shape)
            ranks[name] = self._rank(context, name, full)
        return ranks

    def _rank(self, context: SwitchContext, name: str, full: int) -> int:
        stats = context.history[-1].layers[name]
        stable = getattr(stats, f"{self.of}_stable_rank")
        factor = 1.0
        if self.scaled:
            initial = context.initial_stable_ranks[name]
            factor = full / initial if initial > 0 else 1.0  # a weight that began as zero
        wanted = math.ceil(self.multiplier * stable * factor)
        wanted = max(wanted, math.ceil(self.lowest * full))
        if self.accumulative is not None:
            singular_values = energies(context.weights[name]).sqrt()
            accumulative = _smallest_count(singular_values, self.accumulative)
            wanted = max(wanted, accumulative)
        return _bounded(wanted, full, self.power_of_two)


@dataclass(frozen=True)
class Energy:
    """Give each target the smallest rank that captures a share of its update's energy.

    r = min {k : sum_{i<=k} S_i^2 >= share * sum S_i^2} with S the singular values of W - W_ref,
    at most ``r_max``. ``power_of_two`` rounds r up to a power of two.
    """

    share: float = 0.8
    r_max: int | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        check_share("switch.rank.share", self.share)
        if self.r_max is not None:
            check_range("switch.rank.r_max", self.r_max, 1)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Return the rank per target; NothingMeasured before the first update."""
        ranks = {}
        for name, update in context.updates.items():
            ranks[name] = self._rank(name, update)
        return ranks

    def _rank(self, name: str, update: Tensor) -> int:
        wanted = _smallest_count(_energies(name, update), self.share)
        largest = min(update.shape)
        if self.r_max is not None:
            largest = min(largest, self.r_max)
        return _bounded(wanted, largest, self.power_of_two)


@dataclass(frozen=True)
class Budget:
    """Choose the ranks that capture most energy of the updates within a parameter budget.

    Maximise sum_i sum_{k <= r_i} S_ik^2 under sum_i r_i (out_i + in_i) + others <= ``share`` * P.
    S_ik are the singular values of the update of target i, P is the number of parameters of the
    model, and 'others' is the number that train beside the factors. in_i does not count when A is
    frozen.

    The policy starts at ``r_min`` everywhere and buys singular values by energy per parameter.
    Singular values descend, so this is optimal up to the last one bought.

    - ``captured``: a target buys no more once it holds this share of its update's energy, as in
      ``Energy``. None: the whole budget is spent.
    - ``relative``: count energy as a share of the energy of the target's own update.
    - ``power_of_two``: round ranks down to a power of two.
    """

    share: float = 0.3
    captured: float | None = 0.99
    relative: bool = False
    r_min: int = 1
    power_of_two: bool = False

    def __post_init__(self) -> None:
        check_share("switch.rank.share", self.share)
        if self.captured is not None:
            check_share("switch.rank.captured", self.captured)
        check_range("switch.rank.r_min", self.r_min, 0)

    def __call__(self, context: SwitchContext) -> dict[str, int]:
        """Return the rank per target; ValueError when ``r_min`` everywhere is above the budget."""
        costs = {}
        for name, update in context.updates.items():
            costs[name] = _cost(update, context.train_factors)
        smallest = self.r_min * sum(costs.values())
        left = self._budget(context) - smallest
        if left < 0:
            raise ValueError(
                f"switch.rank.share={self.share:g} is too small: switch.rank.r_min={self.r_min} "
                f"on every target and {context.other_trainable:,} other trained parameters "
                f"already need {-left:,} parameters more; {self._remedy(context, smallest)}"
            )
        ranks = dict.fromkeys(costs, self.r_min)
        offers = self._offers(context, costs)
        for _, name in sorted(offers, reverse=True):
            if costs[name] <= left:
                ranks[name] += 1
                left -= costs[name]
        if self.power_of_two:
            return {name: _power_below(rank) for name, rank in ranks.items()}
        return ranks

    def _budget(self, context: SwitchContext) -> int:
        """Return the number of parameters that the factors of the targets may have."""
        allowed = int(self.share * context.total_parameters)
        return int((allowed - context.other_trainable) * context.part)

    def _remedy(self, context: SwitchContext, smallest: int) -> str:
        """Return which share the smallest factors need, rounded up to two decimals."""
        needed = smallest / context.part + context.other_trainable
        share = math.ceil(100 * needed / context.total_parameters) / 100
        if share > 1:
            return "no share is enough: choose another switch/rank, such as switch/rank=fixed"
        return f"give {share:.2f} or more"

    def _offers(self, context: SwitchContext, costs: Mapping[str, int]) -> list[tuple[float, str]]:
        """Return the energy per parameter of each singular value, with its target."""
        offers = []
        for name, update in context.updates.items():
            value = _energies(name, update)
            if self.relative:
                value = value / value.sum()
            most = largest_saving_rank(update.shape)
            if self.captured is not None:
                most = min(most, _smallest_count(value, self.captured))
            for energy in value[self.r_min : most].tolist():
                offers.append((energy / costs[name], name))
        return offers


def saves_parameters(rank: int, shape: Sequence[int]) -> bool:
    """Return whether factors of this rank have fewer parameters than a weight (out, in)."""
    return rank <= largest_saving_rank(shape)


def largest_saving_rank(shape: Sequence[int]) -> int:
    """Return the largest r with r (out + in) < out in."""
    return (math.prod(shape) - 1) // sum(shape)


def _cost(update: Tensor, train_factors: Sequence[str]) -> int:
    """Return the number of trained parameters that one more rank adds."""
    out_features, in_features = update.shape
    cost = 0
    if "A" in train_factors:
        cost += in_features
    if "B" in train_factors:
        cost += out_features
    return cost


def _energies(name: str, update: Tensor) -> Tensor:
    energy = energies(update)
    if not torch.any(energy):
        raise NothingMeasured(
            f"{name} has not moved since its window began: a rank policy that reads the updates "
            "cannot switch here; use switch/rank=fixed"
        )
    return energy


def _smallest_count(values: Tensor, share: float) -> int:
    """Return the smallest k for which the first k ``values`` hold a share of their sum."""
    cumulative = values.cumsum(0)
    wanted = share * cumulative[-1] * (1 - 1e-12)  # rounding must not cost a rank
    too_few = cumulative < wanted
    return int(too_few.sum()) + 1


def _change(before: float, after: float) -> float:
    return abs(after - before) / before if before else 0.0


def _bounded(rank: int, full: int, power_of_two: bool) -> int:
    """Return ``rank``, or the power of two from it on, in the bounds 1 and ``full``."""
    rank = max(rank, 1)
    if power_of_two:
        rank = 2 ** math.ceil(math.log2(rank))
    return min(rank, full)


def _power_below(rank: int) -> int:
    return 2 ** int(math.log2(rank)) if rank else 0


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
