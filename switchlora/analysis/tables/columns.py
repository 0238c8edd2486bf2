"""The columns of a table of runs: how each is read from a finished run, its unit and digits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t

from switchlora.storage import Record

MIB = 2**20
NOT_RECOVERED = math.inf
ACCURACY, SPEED, COST = "Accuracy", "Speed and memory", "Cost"
Quartiles = tuple[float, float]
Read = Callable[[Record], float | None]
ReadQuartiles = Callable[[Record], Quartiles | None]


@dataclass(frozen=True)
class Column:
    """One column. ``read`` returns its number for a finished run, or None if there is none."""

    key: str
    title: str
    unit: str
    read: Read
    digits: int | Callable[[float], str]
    """digits after the decimal point, or a function that formats the number"""
    group: str = ""
    """the part of the table that it belongs to; a table too wide for a page is split into parts"""
    timed: bool = False
    """whether its numbers come from a clock or a memory counter"""
    quartiles: ReadQuartiles | None = None
    """returns the quartiles over the updates of one run"""
    paired: bool = False
    """whether it is a difference of two runs of one seed; it has a confidence interval"""

    @property
    def header(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Cell:
    """The numbers of one row in one column: one per seed, and at least one."""

    values: tuple[float, ...]
    quartiles: Quartiles | None = None
    """quartiles over the updates, when the row has a single run"""

    @property
    def mean(self) -> float:
        """Mean over the seeds; inf when the value of one of them is inf (not recovered)."""
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for fewer than two finite values."""
        if self.n < 2 or not math.isfinite(self.mean):
            return None
        return stdev(self.values)

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % confidence interval of the mean, by Student's t."""
        if self.std is None:
            return None
        return float(student_t.ppf(0.975, self.n - 1)) * self.std / math.sqrt(self.n)

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)


def make_cell(column: Column, records: Sequence[Record]) -> Cell | None:
    """Return the cell that ``column`` reads from ``records``, or None when it reads nothing."""
    values = [value for value in map(column.read, records) if value is not None]
    if not values:
        return None
    quartiles = None
    if column.quartiles is not None and len(records) == 1:
        quartiles = column.quartiles(records[0])
    return Cell(tuple(values), quartiles)


def run_columns() -> list[Column]:
    """Return the columns that need no baseline."""
    return [
        Column("switch_update", "switch", "update", switch_update, 0, ACCURACY),
        Column("top1_at_switch", "top1 at the switch", "%", top1_at_switch, 2, ACCURACY),
        Column("top1_after_switch", "right after", "%", top1_after_switch, 2, ACCURACY),
        Column("val_top1", "val top1", "%", val_top1, 2, ACCURACY),
        Column("test_top1", "test top1", "%", test_top1, 2, ACCURACY),
        Column("recovery", "recovery", "updates", recovery, 0, ACCURACY),
        *phase_columns(),
        Column("trainable", "trainable", "parameters", trainable, 0, COST),
        Column("trainable_share", "trainable share", "%", trainable_share, 2, COST),
        Column("cost_flops", "training cost", "FLOPs", cost_flops, "{:.4g}".format, COST),
        Column("cost_seconds", "training cost", "s", cost_seconds, 1, COST, timed=True),
    ]


def held(part: str, scale: float = 1) -> Read:
    """Return a function that reads the measured bytes of one memory part, times ``scale``.

    It reads them from the segment of the run's last update.
    """

    def read(record: Record) -> float | None:
        memory = last_segment(record).get("memory") or {}
        size = memory.get("measured", {}).get(part)
        return None if size is None else scale * size

    return read


IMAGES, EPOCH, PEAK = "images_per_second", "epoch_seconds", "peak_memory_bytes"
PHASE_COLUMNS = (
    ("images_per_second", "images/s", "", IMAGES, 1, 1),
    ("epoch_seconds", "epoch", "s", EPOCH, 1, 2),
    ("peak_memory", "peak memory", "MiB", PEAK, 1 / MIB, 0),
)
"""key, title, unit, key in the summary, factor and digits of the columns that a phase has"""


def phase_columns() -> list[Column]:
    """Return the columns of speed and memory, one for the full and one for the adapter phase."""
    columns = []
    for key, title, unit, source, scale, digits in PHASE_COLUMNS:
        for phase in ("full", "adapter"):
            column = Column(
                f"{phase}_{key}",
                f"{title}, {phase}",
                unit,
                of_phase(phase, source, scale),
                digits,
                SPEED,
                timed=True,
                quartiles=quartiles_of(phase) if source == IMAGES else None,
            )
            columns.append(column)
    return columns


def switch_update(record: Record) -> int | None:
    """Return the update after which the run switched."""
    return record.result["switch"]["num_updates"]


def val_top1(record: Record) -> float | None:
    """Return the top1 of the last validation, in %."""
    return record.result["val"].get("top1")


def test_top1(record: Record) -> float | None:
    """Return the top1 on the test split, in %."""
    return (record.result["test"] or {}).get("top1")


def validations(record: Record) -> list[tuple[int, float]]:
    """Return the update and top1 of every validation, in order."""
    found = []
    for event in record.events("eval"):
        found.append((event["num_updates"], event["val/top1"]))
    return found


def validations_after_switch(record: Record) -> list[tuple[int, float]]:
    """Return the updates since the switch and the top1 of every validation after it, in order."""
    switch = switch_update(record)
    if switch is None:
        return []
    after = []
    for update, top1 in validations(record):
        if update > switch:
            after.append((update - switch, top1))
    return after


def top1_at_switch(record: Record) -> float | None:
    """Return the top1 of the last validation at or before the switch, in %."""
    switch = switch_update(record)
    if switch is None:
        return None
    before = [top1 for update, top1 in validations(record) if update <= switch]
    return before[-1] if before else None


def top1_after_switch(record: Record) -> float | None:
    """Return the top1 of the first validation after the switch, in %."""
    after = validations_after_switch(record)
    if not after:
        return None
    _, top1 = after[0]
    return top1


def recovery(record: Record) -> float | None:
    """Return the updates from the switch until a validation reaches the top1 at the switch again.

    - 0 when the first validation after the switch reaches it.
    - NOT_RECOVERED when none does.
    - None without a validation on both sides of the switch.
    """
    before = top1_at_switch(record)
    first = top1_after_switch(record)
    if before is None or first is None:
        return None
    if first >= before:
        return 0
    for updates, top1 in validations_after_switch(record):
        if top1 >= before:
            return updates
    return NOT_RECOVERED


def of_phase(phase: str, key: str, scale: float = 1) -> Read:
    """Return a function that reads a number of one phase from the summary, times ``scale``."""

    def read(record: Record) -> float | None:
        figures = phases_made(record).get(phase, {})
        value = figures.get(key)
        return None if value is None else scale * value

    return read


def of_last_phase(key: str) -> Read:
    """Return a function that reads a number of the segment with the run's last update."""

    def read(record: Record) -> float | None:
        return last_segment(record).get(key)

    return read


def segments(record: Record) -> list[Mapping[str, Any]]:
    """Return the segments between the run's transitions, or its phases when it has no segments."""
    told = record.result.get("segments")
    if told:
        return told
    phases = record.result["phases"].items()
    return [{"phase": name, **figures} for name, figures in phases]


def last_segment(record: Record) -> Mapping[str, Any]:
    """Return the segment with the run's last update; empty when no update was made."""
    for segment in reversed(segments(record)):
        if segment["num_updates"]:
            return segment
    return {}


def last_phase(record: Record) -> str:
    """Return the phase of the run's last update."""
    return last_segment(record).get("phase", "full")


def quartiles_of(phase: str) -> ReadQuartiles:
    """Return a function that reads the quartiles of images/s over the updates of one phase."""

    def read(record: Record) -> Quartiles | None:
        figures = record.result["phases"].get(phase, {})
        quartiles = figures.get("images_per_second_quartiles")
        if quartiles is None:
            return None
        low, high = quartiles
        return low, high

    return read


def trainable(record: Record) -> float | None:
    """Return the number of parameters that train at the end of the run."""
    return segments(record)[-1].get("trainable_parameters")


def trainable_share(record: Record) -> float | None:
    """Return ``trainable`` in % of the parameters of the model without adapters."""
    whole = record.result["switch"].get("parameters")
    if whole is None:
        full = record.result["phases"].get("full", {})
        whole = full.get("trainable_parameters")
    part = trainable(record)
    if whole is None or part is None:
        return None
    return 100 * part / whole


def phases_made(record: Record) -> dict[str, Mapping[str, Any]]:
    """Return the summary's figures for each phase in which updates were made."""
    phases = record.result["phases"].items()
    return {name: figures for name, figures in phases if figures["num_updates"]}


def cost_flops(record: Record) -> float | None:
    """Return the FLOPs of all updates, or None when those of some update are unknown."""
    return record.result.get("cost", {}).get("train_flops")


def cost_seconds(record: Record) -> float | None:
    """Return the seconds of all updates without evaluation."""
    return record.result.get("cost", {}).get("train_seconds")


def mean_epoch_seconds(record: Record) -> float | None:
    """Return the seconds of an epoch, averaged over the phases with their updates as weights.

    Return None when the seconds of a phase are unknown.
    """
    updates = []
    seconds = []
    for figures in phases_made(record).values():
        if figures[EPOCH] is None:
            return None
        updates.append(figures["num_updates"])
        seconds.append(figures[EPOCH] * figures["num_updates"])
    return sum(seconds) / sum(updates)
