"""What torch.compile leaves of a traced update: chains of element-wise operations become one each.

Inductor writes one kernel for neighbouring element-wise operations and reductions. It reads what
was made before, and writes what is needed later. What lives only inside is never in memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from switchlora.cost.trace import Moved, Operation

FUSED = "fused"


def fuse(operations: Sequence[Operation]) -> list[Operation]:
    """Return ``operations`` with each chain of element-wise ones in a pass as one operation.

    Products, attention and the optimizer stay as they are. Views, which move nothing, are left
    out.
    """
    moving = [operation for operation in operations if operation.bytes]
    last_read = _last_reads(moving)
    fused: list[Operation] = []
    begin = 0
    for (part, is_chain), group in groupby(moving, key=_kind):
        chain = list(group)
        end = begin + len(chain)
        if is_chain:
            fused.append(_as_one(chain, part, end, last_read))
        else:
            fused += chain
        begin = end
    return fused


def _kind(operation: Operation) -> tuple[str, bool]:
    """Return the part of the update, and whether the operation can be fused with neighbours."""
    return operation.part, not operation.flops and operation.part != "optimizer"


def _last_reads(operations: Iterable[Operation]) -> dict[int, int]:
    """Return, by the number of a storage, the place of the last operation that reads it."""
    found = {}
    for place, operation in enumerate(operations):
        for number, _ in operation.reads:
            found[number] = place
    return found


def _as_one(
    chain: Sequence[Operation], part: str, end: int, last_read: dict[int, int]
) -> Operation:
    """Return one operation that reads what came before ``chain`` and writes what outlives it."""
    made = {number for operation in chain for number, _ in operation.writes}
    reads = _largest(_moves(chain, "reads"))
    writes = _largest(_moves(chain, "writes"))
    outer = [(number, size) for number, size in reads.items() if number not in made]
    kept = [item for item in writes.items() if last_read.get(item[0], -1) >= end]
    size = sum(size for _, size in [*outer, *kept])
    first = chain[0]
    return replace(
        first, name=FUSED, part=part, bytes=size, reads=tuple(outer), writes=tuple(kept)
    )


def _moves(chain: Sequence[Operation], side: str) -> Iterator[tuple[int, int]]:
    for operation in chain:
        moved: Moved = getattr(operation, side)
        yield from moved


def _largest(moves: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return the most bytes that any operation moved of each storage."""
    found: dict[int, int] = {}
    for number, size in moves:
        found[number] = max(size, found.get(number, 0))
    return found
