"""What a sweep says first: one sentence of result, and four numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from switchlora.analysis.tables.columns import Cell
from switchlora.analysis.tables.rows import FULL_TRAINING, Row, Table, short_names
from switchlora.storage import Record

NONE = "–"
TOP1, DIFFERENCE, COST = "val_top1", "top1_difference", "cost_ratio"


@dataclass(frozen=True)
class Tile:
    """A number that is shown large, and what it is."""

    number: str
    meaning: str


def sentence(table: Table) -> str:
    """Return one sentence on the best setting beside full training."""
    others = _others(table)
    full = _full(table)
    if not others:
        if full is None:
            return "No run has finished yet."
        top1 = with_spread(full.cells[TOP1])
        return f"Full training reaches {top1} % val top1; no other setting has finished."
    best = max(others, key=_top1)
    label = _name(best, table)
    count = f"{len(others)} settings" if len(others) > 1 else "1 setting"
    if DIFFERENCE not in best.cells:
        top1 = with_spread(best.cells[TOP1])
        return (
            f"Of {count}, {label} does best, with {top1} % val top1; there is no full "
            "training that it can be compared with."
        )
    return f"Of {count} beside full training, {label} does best: {_compared(best)}."


def _compared(best: Row) -> str:
    """Return how a row ends beside full training, and at what cost."""
    difference = best.cells[DIFFERENCE]
    size = with_spread(difference).lstrip("-")
    where = "above" if difference.mean > 0 else "below"
    cost = f" and costs {_share(best)} of its training FLOPs" if COST in best.cells else ""
    return f"it ends {size} points of val top1 {where} it{cost}"


def tiles(table: Table, records: Sequence[Record]) -> list[Tile]:
    """Return four numbers: runs that finished, full training's top1, the best's top1 and cost."""
    finished = sum(record.finished for record in records)
    full = _full(table)
    best = max(_others(table), key=_top1, default=None)
    label = _name(best, table) if best else "no other setting"
    share = _share(best) if best and COST in best.cells else NONE
    return [
        Tile(f"{finished} of {len(records)}", "runs finished"),
        Tile(_percent(full), f"val top1, {FULL_TRAINING}"),
        Tile(_percent(best), f"val top1, {label}"),
        Tile(share, f"of full training's FLOPs, {label}"),
    ]


def _name(row: Row, table: Table) -> str:
    """Return a row's label without what it shares with all others."""
    labels = [other.label for other in table.rows]
    return short_names(labels)[labels.index(row.label)]


def with_spread(cell: Cell) -> str:
    """Return the mean of a cell with two decimals, and its standard deviation if there is one."""
    spread = "" if cell.std is None else f" ± {cell.std:.2f}"
    return f"{cell.mean:.2f}{spread}"


def _percent(row: Row | None) -> str:
    return NONE if row is None else f"{with_spread(row.cells[TOP1])} %"


def _share(row: Row) -> str:
    return f"{100 * row.cells[COST].mean:.0f} %"


def _top1(row: Row) -> float:
    return row.cells[TOP1].mean


def _full(table: Table) -> Row | None:
    """Return the row of full training with the best top1."""
    rows = [row for row in table.rows if TOP1 in row.cells and row.trains_in_full]
    return max(rows, key=_top1, default=None)


def _others(table: Table) -> list[Row]:
    return [row for row in table.rows if TOP1 in row.cells and not row.trains_in_full]
