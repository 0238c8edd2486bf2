"""Which form of a product with an adapter costs less: by counts, or by a device's rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

FORMS = ("merged", "split")


class Rates(NamedTuple):
    """A device: FLOPs and bytes in a second, and the seconds of its shortest kernel."""

    flops: float
    bandwidth: float
    latency: float = 4e-6


class Work(NamedTuple):
    """One operation: its FLOPs, and the bytes that it moves."""

    flops: int
    moved: int


A_GPU = Rates(flops=2.2e14, bandwidth=1.2e12)
"""of an A100 in bf16, which stands for a GPU whose rates nobody has set"""
_RATES: dict[str, Rates] = {}


def set_rates(device: str, rates: Rates | None) -> None:
    """Set the rates by which products on devices of a type choose their form; None: ``A_GPU``."""
    if rates is None:
        _RATES.pop(device, None)
    else:
        _RATES[device] = rates


def rates_of(device: str) -> Rates:
    """Return the rates of devices of a type, or those of ``A_GPU``."""
    return _RATES.get(device, A_GPU)


@dataclass(frozen=True)
class Shape:
    """Sizes of one product X (W_res + s B A)^T, as far as its form depends on them."""

    tokens: int
    in_features: int
    slices: Sequence[tuple[int, int]]
    """rows and rank of each row slice that has an adapter"""
    itemsize: int
    """bytes of a number in the product"""
    weight_itemsize: int = 4
    """bytes of a number of W_res"""
    trains_A: bool = True
    made: int = 1
    """how often an update makes the operand: once if it is kept, else twice"""

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return sum(rows for rows, _ in self.slices)


def cheaper_form(
    tokens: int,
    in_features: int,
    out_features: int,
    trains_A: bool = True,
    slices: int = 1,
) -> str:
    """Return the form that costs less on a CPU for ``tokens`` inputs: 'merged' or 'split'.

    - 'merged' forms W_res + s B A, which takes r in out multiply-adds once.
    - 'split' adds the low-rank path to the product with W_res. That takes T r (n in + out)
      multiply-adds for T tokens and n row slices. If A is frozen it takes T r out more, for a
      product that the gradient of a trained A needs in both forms.

    r cancels out, so only shapes decide. Bytes read and written compare in the same way.

    >>> cheaper_form(tokens=64, in_features=384, out_features=384)
    'split'
    >>> cheaper_form(tokens=4 * 197, in_features=384, out_features=384)
    'merged'
    """
    columns = out_features if trains_A else 2 * out_features
    split = tokens * (slices * in_features + columns)
    merged = in_features * out_features
    return "merged" if split >= merged else "split"


def faster_form(shape: Shape, rates: Rates) -> str:
    """Return the form whose own operations take less time on a device of these rates.

    An operation takes as long as its FLOPs or its bytes do, and at least the shortest kernel's.

    >>> faster_form(Shape(4096, 384, [(384, 16)], itemsize=2), A_GPU)
    'merged'
    >>> faster_form(Shape(1024, 4096, [(4096, 16)], itemsize=2), A_GPU)
    'split'
    """
    merged, split = (sum(seconds(w, rates) for w in own_work(f, shape)) for f in FORMS)
    return "merged" if merged <= split else "split"


def seconds(work: Work, rates: Rates) -> float:
    """Return the seconds of one operation."""
    return max(work.flops / rates.flops, work.moved / rates.bandwidth, rates.latency)


def own_work(form: str, shape: Shape) -> list[Work]:
    """Return the operations of an update that a form has and a frozen linear in its dtype lacks.

    What both forms do is left out: X A^T, the gradients of the factors, and G B where A trains.
    """
    return _of_merged(shape) if form == "merged" else _of_split(shape)


def _of_merged(shape: Shape) -> list[Work]:
    """Return what makes the effective weight, as ``effective_weight`` does."""
    size = shape.in_features * shape.out_features
    summed_in = max(4, shape.weight_itemsize)
    if shape.weight_itemsize == shape.itemsize:
        summed_in = shape.itemsize
    made = _cast(size, shape.weight_itemsize, summed_in)
    in_place = len(shape.slices) > 1
    if in_place and not made:
        made.append(Work(0, 2 * size * summed_in))
    for rows, rank in shape.slices:
        numbers = rank * (rows + shape.in_features) + 2 * rows * shape.in_features
        made.append(Work(2 * rank * rows * shape.in_features, numbers * summed_in))
    made += _cast(size, summed_in, shape.itemsize)
    return made * shape.made


def _of_split(shape: Shape) -> list[Work]:
    """Return what adds the low-rank path to the outputs, and to the gradient of X."""
    size = shape.in_features * shape.out_features
    added = _cast(size, shape.weight_itemsize, shape.itemsize) * shape.made
    for rows, rank in shape.slices:
        added.append(_added_product(shape, rank, rows))
        added.append(_added_product(shape, rank, shape.in_features))
        if not shape.trains_A:
            numbers = shape.tokens * (rows + rank) + rows * rank
            added.append(Work(2 * shape.tokens * rows * rank, numbers * shape.itemsize))
    return added


def _added_product(shape: Shape, rank: int, columns: int) -> Work:
    """Return the work of adding (T, r) (r, columns) to a matrix (T, columns) in place."""
    numbers = shape.tokens * (rank + 2 * columns) + rank * columns
    return Work(2 * shape.tokens * rank * columns, numbers * shape.itemsize)


def _cast(size: int, before: int, after: int) -> list[Work]:
    return [] if before == after else [Work(0, size * (before + after))]
