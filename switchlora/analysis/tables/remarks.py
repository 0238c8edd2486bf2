"""What must be said of single rows: a note on one row, a column when several rows need it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from switchlora.analysis.tables.columns import COST, Column
from switchlora.analysis.tables.rows import CRITERION, NEVER, Row, named_full
from switchlora.analysis.tables.systems import has_switched, taken_back, waits
from switchlora.storage import Record


@dataclass(frozen=True)
class Remark:
    """Something that holds for some runs. ``read`` returns its number for a run; 0 if nothing."""

    column: Column
    sentence: Callable[[Row], str]
    """what a note says of a row, after its label"""
    meaning: str
    """the note on the column"""

    def concerns(self, row: Row) -> bool:
        """Return whether there is something to say of a row."""
        return any(map(self.column.read, row.records))


def remarks(grouped: bool) -> list[Remark]:
    """Return all remarks. Their columns are ``grouped`` as in a table of several parts."""
    part = COST if grouped else ""
    return [
        Remark(
            Column("not_switched", "not switched", "share of seeds", _not_switched, 2, part),
            lambda row: f"{_count(row, has_switched)} {_all(row)} switched; the row counts all.",
            "Not switched: the share of seeds that trained in full to their end; rows count all.",
        ),
        Remark(
            Column("taken_back", "taken back", "share of seeds", _taken_back, 2, part),
            lambda row: (
                f"in {_count(row, _taken_back)} {_all(row)} the guard took the switch back."
            ),
            "Taken back: the share of seeds in which the guard took the switch back.",
        ),
        Remark(
            Column("waiting", "in part", "share of seeds", _waits, 2, part),
            lambda row: (
                f"in {_count(row, _waits)} {_all(row)} some targets train in full to the end."
            ),
            "In part: the share of seeds in which some targets train in full to the end.",
        ),
        Remark(
            Column("reused", "from a trunk", "updates", reused_updates, 0, part, timed=True),
            lambda row: (
                f"{_reused(row)} updates of the full phase (by seed) were taken from a "
                "shared trunk with their times, not made anew; costs and times count them."
            ),
            "From a trunk: updates of the full phase that were taken from a shared trunk with "
            "their times, not made anew; costs and times count them.",
        ),
    ]


def remarked(
    rows: Sequence[Row], preset: str, times: bool = True
) -> tuple[list[Column], list[str]]:
    """Return the columns and the notes that the remarks on ``rows`` need.

    The table of the preset 'prelora' has no room for columns. Without ``times``, remarks on times
    are left out.
    """
    columns = []
    notes = []
    for remark in remarks(preset == "default"):
        concerned = list(filter(remark.concerns, rows))
        if remark.column.timed and not times:
            continue
        if len(concerned) > 1 and preset != "prelora":
            columns.append(remark.column)
            notes.append(remark.meaning)
        else:
            notes += [f"{row.label}: {remark.sentence(row)}" for row in concerned]
    return columns, notes


def reused_updates(record: Record) -> int:
    """Return how many updates were taken from a shared trunk."""
    trunk = record.result.get("trunk")
    return trunk["reused_updates"] if trunk else 0


def _is_full(record: Record) -> bool:
    return named_full([record])[CRITERION] == NEVER


def _not_switched(record: Record) -> int | None:
    return None if _is_full(record) else int(not has_switched(record))


def _taken_back(record: Record) -> int | None:
    return None if _is_full(record) else int(taken_back(record))


def _waits(record: Record) -> int | None:
    return None if _is_full(record) else int(waits(record))


def _count(row: Row, read: Callable[[Record], int | None]) -> int:
    return sum(read(record) or 0 for record in row.records)


def _all(row: Row) -> str:
    return f"of {len(row.records)} seeds"


def _reused(row: Row) -> str:
    return ", ".join(f"{reused_updates(record):,}" for record in row.records)
