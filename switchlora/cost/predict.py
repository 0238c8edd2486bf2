"""Predict the seconds of one training update before it is made.

Each operation of a traced update is priced with the measured speed of the machine. This is the
roofline model (Williams, Waterman & Patterson, 2009, doi 10.1145/1498765.1498785).
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot

from switchlora.adapters import FACTORS, Shape, own_work
from switchlora.cost.fusion import fuse
from switchlora.cost.machine import Machine
from switchlora.cost.trace import PARTS, Operation, Trace

NO_GAIN = 0.98
ADAMW_BYTES = 96  # bytes read and written for each trained number, with the norm and the clipping


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one update, by part."""

    forward: float
    backward: float
    optimizer: float
    communication: float
    """exchange of the gradients, assuming that none of it overlaps with the backward pass"""
    modules: Mapping[str, float]
    """forward and backward together, by module; '' is outside of all"""
    host: float = 0.0
    """what the host needs to start all operations, while the device works on earlier ones"""

    @property
    def total(self) -> float:
        """Seconds of the whole update.

        Device and host wait for each other in places, so the sum of squares stands for the
        larger of the two.
        """
        device = self.forward + self.backward + self.optimizer
        return hypot(device, self.host) + self.communication


def predict(trace: Trace, machine: Machine, world_size: int = 1) -> Prediction:
    """Predict the seconds of ``trace``; several ranks also exchange its gradients."""
    parts = dict.fromkeys(PARTS, 0.0)
    modules: dict[str, float] = {}
    for operation in trace.operations:
        seconds = machine.seconds(operation)
        parts[operation.part] += seconds
        if operation.part != "optimizer":
            modules[operation.module] = modules.get(operation.module, 0.0) + seconds
    exchange = _exchange_seconds(trace.trainable_bytes, machine, world_size)
    host = machine.host * sum(map(_is_started, trace.operations))
    host += machine.host_tensor * trace.num_parameters
    return Prediction(**parts, communication=exchange, modules=modules, host=host)


def price(trace: Trace, machine: Machine, compiled: bool, world_size: int = 1) -> Prediction:
    """Predict the seconds of a trace, with chains of element-wise operations fused if compiled.

    ``machine`` has the rates of compiled code then.
    """
    if compiled:
        trace = replace(trace, operations=tuple(fuse(trace.operations)))
    return predict(trace, machine, world_size)


def _is_started(operation: Operation) -> bool:
    """Return whether the host starts a kernel for it in a pass.

    An optimizer starts a few kernels for all its tensors together.
    """
    return operation.bytes > 0 and operation.part != "optimizer"


def _exchange_seconds(size: int, machine: Machine, world_size: int) -> float:
    if world_size == 1:
        return 0.0
    if machine.all_reduce is None:
        raise ValueError(
            f"the machine was measured in one process, not in {world_size}: give all_reduce, the "
            "bytes/s at which gradients are averaged"
        )
    return size / machine.all_reduce


def break_even_rank(
    tokens: int,
    in_features: int,
    out_features: int,
    itemsize: int,
    machine: Machine,
    train_factors: Sequence[str] = FACTORS,
    world_size: int = 1,
) -> int:
    """Return the largest rank at which a linear's update with an adapter is not slower.

    The comparison is with the update of the whole weight. ``tokens`` is the number of tokens in
    one forward pass. ``itemsize`` is the bytes of a number in the linear's products. The result
    is 0 when no rank pays, and min(in, out) when every rank does.
    """
    linear = _Linear(tokens, in_features, out_features, itemsize)
    sizes = {"A": in_features, "B": out_features}
    numbers_per_rank = sum(sizes[factor] for factor in train_factors)
    trains_A = "A" in train_factors

    def seconds(passes: Sequence[Operation], trained: int) -> float:
        step = Operation("update", "", "optimizer", 0, ADAMW_BYTES * trained)
        exchange = _exchange_seconds(4 * trained, machine, world_size)
        return sum(map(machine.seconds, [*passes, step])) + exchange

    def adapter_seconds(rank: int) -> float:
        trained = rank * numbers_per_rank
        merged = seconds(linear.merged(rank, trains_A), trained)
        split = seconds(linear.split(rank, trains_A), trained)
        return min(merged, split)

    full_seconds = seconds(linear.full(), in_features * out_features)
    ranks = range(1, min(in_features, out_features) + 1)
    return bisect_right(ranks, full_seconds, key=adapter_seconds)


@dataclass(frozen=True)
class _Linear:
    """The operations of one update of a linear from (tokens, inner) to (tokens, outer)."""

    tokens: int
    inner: int
    outer: int
    itemsize: int

    def full(self) -> list[Operation]:
        """Return X W^T, G W, G^T X and the column sums of G.

        In reduced precision the casts of the weight and of its gradient come in addition.
        """
        weight_gradient = self._product(self.outer, self.tokens, self.inner)
        column_sums = self._moves(self.tokens * self.outer)
        return [*self._plain(), weight_gradient, *self._casts(), column_sums]

    def merged(self, rank: int, trains_A: bool) -> list[Operation]:
        """Return the operations of the merged form: W + s B A is formed once and kept."""
        return [
            *self._plain(),
            *self._own("merged", rank, trains_A),
            *self._factors(rank, trains_A),
        ]

    def split(self, rank: int, trains_A: bool) -> list[Operation]:
        """Return the operations of the split form: X W^T + s (X A^T) B^T and G W + s (G B) A."""
        return [
            *self._plain(),
            *self._own("split", rank, trains_A),
            *self._factors(rank, trains_A),
        ]

    def _own(self, form: str, rank: int, trains_A: bool) -> list[Operation]:
        slices = [(self.outer, rank)]
        shape = Shape(self.tokens, self.inner, slices, self.itemsize, trains_A=trains_A)
        return [Operation(form, "", "", *work) for work in own_work(form, shape)]

    def _plain(self) -> list[Operation]:
        forward = self._product(self.tokens, self.inner, self.outer)
        backward = self._product(self.tokens, self.outer, self.inner)
        return [forward, backward]

    def _factors(self, rank: int, trains_A: bool) -> list[Operation]:
        """Return the operations on the factors that both forms need.

        - X A^T, which gets a column of ones, and (X A^T)^T G.
        - If A trains: G B and (G B)^T X.
        - Moves that scale the gradients and put them into order.
        """
        found = [
            self._product(self.tokens, self.inner, rank),
            self._moves(2 * self.tokens * rank),
            self._product(rank, self.tokens, self.outer),
            self._moves(rank * self.outer, 16),
        ]
        if trains_A:
            found.append(self._product(self.tokens, self.outer, rank))
            found.append(self._product(rank, self.tokens, self.inner))
            found.append(self._moves(rank * self.inner, 8))
        return found

    def _casts(self) -> list[Operation]:
        if self.itemsize >= 4:
            return []
        cast = self._moves(self.inner * self.outer, 4 + self.itemsize)
        return [cast, cast]

    def _product(self, m: int, k: int, n: int, itemsize: int | None = None) -> Operation:
        moved = (m * k + k * n + m * n) * (itemsize or self.itemsize)
        return Operation("product", "", "", 2 * m * k * n, moved)

    def _moves(self, size: int, itemsize: int | None = None) -> Operation:
        return Operation("move", "", "", 0, size * (itemsize or self.itemsize))


def speedup_parts(full: Prediction, adapter: Prediction) -> dict[str, float]:
    """Split the predicted speed-up full / adapter into factors; their product is the speed-up.

    - 'arithmetic': the ratio of the seconds of forward and backward pass.
    - 'optimizer': the factor by which this ratio changes when the optimizer is counted too.
    - 'communication': the factor by which it changes when the exchange is counted as well.
    """
    passes = (full.forward + full.backward) / (adapter.forward + adapter.backward)
    steps = (full.total - full.communication) / (adapter.total - adapter.communication)
    whole = full.total / adapter.total
    return {
        "arithmetic": passes,
        "optimizer": steps / passes,
        "communication": whole / steps,
    }


def warning(full: Prediction, adapter: Prediction) -> str | None:
    """Return one line if the adapter phase is predicted to be no faster, else None."""
    share = adapter.total / full.total
    if share < NO_GAIN:
        return None
    return (
        f"the adapter phase will not be faster: an update is predicted to take {share:.2f} times "
        "the full phase's; lower the ranks, adapt fewer modules or take a wider model"
    )
