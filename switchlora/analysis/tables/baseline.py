"""Compute ratios to a baseline, and refuse ratios between runs under different conditions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import sub, truediv
from pathlib import Path
from statistics import fmean
from typing import Any

from switchlora.analysis.tables.columns import (
    ACCURACY,
    COST,
    IMAGES,
    PEAK,
    Column,
    Read,
    cost_flops,
    last_phase,
    mean_epoch_seconds,
    of_last_phase,
    of_phase,
    phases_made,
    trainable_share,
    val_top1,
)
from switchlora.analysis.tables.rows import METHOD, Row
from switchlora.config import shaping
from switchlora.storage import Record

MACHINE = ("device", "threads", "world_size")
LENGTH = ("epochs", "max_updates", "ema")
RECIPES = {"joint": "adapter", "staged": "adapter"}
"""the recipe's name in the configuration, for phases whose recipe has another name"""
References = Mapping[Path, Sequence[Record]]
"""by folder of a run, the baseline's runs that it is compared with"""


@dataclass(frozen=True)
class Comparison:
    """Which runs are compared with which, and notes on the comparison."""

    references: References
    notes: tuple[str, ...]


def compare_rows(rows: Sequence[Row], baseline: str | None) -> Comparison:
    """Find the baseline of each row: the row named ``baseline``, or a row that trains in full.

    - Rows that train in full have the criterion 'never'. Without any, rows that never switched
      are taken.
    - Of several candidates, the one under the row's own conditions counts; of several of those,
      the one with the nearest settings.
    - A row is compared seed by seed when the baseline has all of its seeds. Otherwise it is
      compared with the baseline's mean.

    Raise ValueError when no row is named ``baseline``, or when a row cannot be compared with it.
    """
    candidates = full_training(rows) if baseline is None else [named_row(rows, baseline)]
    references: dict[Path, Sequence[Record]] = {}
    notes = []
    for row in (row for row in rows if row not in candidates and candidates):
        found = choose(row, candidates)
        if isinstance(found, str):
            if baseline is not None:
                raise ValueError(f"--baseline: {found}")
            notes.append(f"{found}.")
        else:
            paired, note = pairs(row, found)
            references |= paired
            notes += note
    return Comparison(references, (*_told(candidates), *notes))


def full_training(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose criterion is 'never', or else the rows that never switched."""
    return [r for r in rows if r.trains_in_full] or [r for r in rows if r.never_switched]


def named_row(rows: Sequence[Row], label: str) -> Row:
    """Return the row with a label. Raise ValueError with all labels when there is none."""
    for row in rows:
        if row.label == label:
            return row
    there = "; ".join(row.label for row in rows)
    raise ValueError(f"--baseline '{label}' names no row: give one of: {there}")


def choose(row: Row, candidates: Sequence[Row]) -> Row | str:
    """Return the baseline for ``row``, or a line that says why there is none."""
    why = [next(row_differences(row, candidate), None) for candidate in candidates]
    alike = nearest(row, [c for c, d in zip(candidates, why, strict=True) if d is None])
    if alike and all(map(only_switches_apart, alike)):
        return alike[0]
    if len(alike) == 1:
        return alike[0]
    if alike:
        there = " and ".join(f"'{c.label}'" for c in alike)
        return f"{row.label}: no ratio, since {there} both could be its baseline: name one"
    return f"{row.label}: no ratio to '{candidates[0].label}', where {why[0]}"


def only_switches_apart(row: Row) -> bool:
    """Return whether a row's distinguishing settings all concern the switch or what follows it."""
    return all(key.startswith(("switch.", "adapter.", METHOD)) for key in row.settings)


def nearest(row: Row, others: Sequence[Row]) -> list[Row]:
    """Return those of ``others`` whose settings differ least from those of ``row``."""
    mine, *theirs = ({repr(item) for item in each.settings.items()} for each in (row, *others))
    apart = [len(mine ^ settings) for settings in theirs]
    return [other for other, count in zip(others, apart, strict=True) if count == min(apart)]


def row_differences(row: Row, baseline: Row) -> Iterator[str]:
    """Yield each condition in which some run of ``row`` differs from some run of ``baseline``."""
    for record in row.records:
        for reference in baseline.records:
            yield from unlike(*conditions(record, reference))


def conditions(record: Record, reference: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the conditions of a run and of its reference that must be equal for a ratio.

    They are:
    - the data, with transforms and batch size,
    - the model, with its dropout,
    - the length of training,
    - the machine (see ``machine_and_task``),
    - precision, accumulation and compiler. Those of each of the run's phases are set against those
      of the reference's last phase.
    """
    here, there = machine_and_task(record), machine_and_task(reference)
    for key in ("precision", "accumulation", "compile"):
        for recipe in {RECIPES.get(phase, phase) for phase in phases_made(record)}:
            last = last_phase(reference)
            here[f"{recipe}.{key}"] = record.config[recipe][key]
            there[f"{recipe}.{key}"] = reference.config[RECIPES.get(last, last)][key]
    return here, there


def machine_and_task(record: Record) -> dict[str, Any]:
    """Return a run's machine and task.

    The machine is the device, threads, processes, kind of parallelism and version of torch. The
    task is the data, the model and the length of training.
    """
    keys = shaping(record.config)
    task = {k: v for k, v in keys.items() if k.startswith(("data.", "model.")) or k in LENGTH}
    parallel = record.config["system"]["parallel"]
    torch = record.result["environment"].get("versions", {}).get("torch")
    return {**task, "system.parallel": parallel, "torch": torch, **machine(record)}


def machine(record: Record) -> dict[str, Any]:
    """Return the device, the threads of a process and the number of processes."""
    where = record.result["environment"]
    return {"world_size": 1, **{key: where[key] for key in MACHINE if key in where}}


def mixed_machines(rows: Sequence[Row]) -> list[str]:
    """Return a note for each row whose runs were made on different machines."""
    notes = []
    for row in rows:
        first, *others = map(machine, row.records)
        told = next((line for other in others for line in unlike(other, first)), None)
        if told is not None:
            notes.append(f"{row.label}: runs on different machines ({told}): mind its times.")
    return notes


def unlike(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key whose value differs between ``here`` and ``there``."""
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            yield f"{key} is {there.get(key)}, not {here.get(key)}"


def pairs(row: Row, baseline: Row) -> tuple[dict[Path, Sequence[Record]], list[str]]:
    """Return the runs of ``baseline`` for each run of ``row``, by the folder of that run.

    When the baseline lacks some of the row's seeds, a note says so.
    """
    by_seed = {record.config["seed"]: record for record in baseline.records}
    missing = [str(r.config["seed"]) for r in row.records if r.config["seed"] not in by_seed]
    if not missing:
        return {r.folder: [by_seed[r.config["seed"]]] for r in row.records}, []
    note = (
        f"{row.label}: compared with the mean of '{baseline.label}' over its own seeds, which "
        f"lack {', '.join(missing)}."
    )
    return {record.folder: baseline.records for record in row.records}, [note]


def ratio_columns(references: References) -> list[Column]:
    """Return the columns that compare a run with its baseline."""
    top1 = against(references, val_top1, val_top1, sub)
    speed = against(references, of_phase("adapter", IMAGES), of_last_phase(IMAGES), truediv)
    memory = against(references, of_phase("adapter", PEAK), of_last_phase(PEAK), truediv)
    flops = against(references, cost_flops, cost_flops, truediv)
    return [
        Column("top1_difference", "top1 to baseline", "points", top1, signed, ACCURACY),
        Column("speed_ratio", "speed ratio", "", speed, 2, COST, timed=True),
        Column("cost_ratio", "cost ratio", "", flops, 2, COST),
        Column("memory_ratio", "memory ratio", "", memory, 2, COST, timed=True),
    ]


def prelora_columns(references: References) -> list[Column]:
    """Return the columns of PreLoRA's table (arXiv 2509.21619)."""
    by_key = {column.key: column for column in ratio_columns(references)}
    epoch = against(references, mean_epoch_seconds, mean_epoch_seconds, truediv)
    columns = [
        Column("trainable_share", "trainable", "%", trainable_share, 1),
        by_key["speed_ratio"],
        Column("epoch_ratio", "epoch time ratio", "", epoch, 2, timed=True),
        by_key["memory_ratio"],
        by_key["top1_difference"],
    ]
    return [replace(column, group="") for column in columns]


def against(
    references: References, mine: Read, theirs: Read, combine: Callable[[float, float], float]
) -> Read:
    """Return a function that computes ``combine(mine(run), mean of theirs(baseline's runs))``.

    It returns None when one of the numbers is missing, or when that mean is 0.
    """

    def read(record: Record) -> float | None:
        found = [theirs(reference) for reference in references.get(record.folder, ())]
        told = [number for number in found if number is not None]
        value = mine(record)
        if value is None or not told or len(told) < len(found) or not fmean(told):
            return None
        return combine(value, fmean(told))

    return read


def signed(value: float) -> str:
    """Return a difference with its sign and two decimals."""
    return f"{value:+.2f}"


def _told(candidates: Sequence[Row]) -> list[str]:
    if not candidates:
        return ["No baseline: no row trains in full to the end, and none was named."]
    there = " or ".join(f"'{row.label}'" for row in candidates)
    return [f"Compared with {there}, run by run with the same seed."]
