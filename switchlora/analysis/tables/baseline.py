"""Compute ratios to a baseline, and refuse ratios between runs under different conditions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
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
from switchlora.analysis.tables.frontier import Curves, full_curves, over_full_training
from switchlora.analysis.tables.rows import METHOD, Row
from switchlora.config import shaping
from switchlora.storage import Record

MACHINE = ("device", "threads", "world_size")
LENGTH = ("epochs", "length", "max_updates", "ema")
OF_SWITCH = ("switch.", "adapter.", METHOD)
OF_TASK = ("data.", "model.")
OF_RECIPES = ("precision", "accumulation", "compile")
RECIPES = {"joint": "adapter", "staged": "adapter"}
"""the recipe's name in the configuration, for phases whose recipe has another name"""
References = dict[Path, Sequence[Record]]
"""by folder of a run, the baseline's runs that it is compared with"""
Conditions = dict[str, Any]
NO_BASELINE = "No baseline: no row trains in full to the end, and none was named."


@dataclass(frozen=True)
class Comparison:
    """Which runs are compared with which, and notes on the comparison."""

    references: References
    notes: tuple[str, ...]
    curves: Curves = field(default_factory=dict)


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
    if not candidates:
        return Comparison({}, (NO_BASELINE,))
    in_full = full_training(rows)
    curves: Curves = {}
    notes = []
    chosen = []
    references: References = {}
    for row in rows:
        if row in candidates:
            continue
        found = choose(row, candidates)
        if isinstance(found, Row):
            paired, remarks = pairs(row, found)
            chosen.append(found)
            references |= paired
            curves |= full_curves(row, found, in_full)
            notes += remarks
        elif baseline is None:
            notes.append(f"{found}.")
        else:
            raise ValueError(f"--baseline: {found}")
    labels = [f"'{row.label}'" for row in candidates if row in chosen or not chosen]
    first = f"Compared with {' or '.join(labels)}, run by run with the same seed."
    return Comparison(references, (first, *notes), curves)


def full_training(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose criterion is 'never', or else the rows that never switched."""
    in_full = [row for row in rows if row.trains_in_full]
    return in_full or [row for row in rows if row.never_switched]


def named_row(rows: Sequence[Row], label: str) -> Row:
    """Return the row with a label. Raise ValueError with all labels when there is none."""
    for row in rows:
        if row.label == label:
            return row
    there = "; ".join(row.label for row in rows)
    raise ValueError(f"--baseline '{label}' names no row: give one of: {there}")


def choose(row: Row, candidates: Sequence[Row]) -> Row | str:
    """Return the baseline for ``row``, or a line that says why there is none."""
    alike = [each for each in candidates if row_difference(row, each) is None]
    if not alike:
        first = candidates[0]
        return f"{row.label}: no ratio to '{first.label}', where {row_difference(row, first)}"
    alike = nearest(row, alike)
    if len(alike) == 1 or all(map(only_switches_apart, alike)):
        return alike[0]
    there = " and ".join(f"'{candidate.label}'" for candidate in alike)
    return f"{row.label}: no ratio, since {there} both could be its baseline: name one"


def only_switches_apart(row: Row) -> bool:
    """Return whether a row's distinguishing settings all concern the switch or what follows it."""
    return all(key.startswith(OF_SWITCH) for key in row.settings)


def nearest(row: Row, others: Sequence[Row]) -> list[Row]:
    """Return those of ``others`` whose settings differ least from those of ``row``."""
    distance = partial(count_differences, row)
    least = min(map(distance, others))
    return [other for other in others if distance(other) == least]


def count_differences(row: Row, other: Row) -> int:
    """Return the number of settings with their values that only one of two rows has."""
    mine = set(map(repr, row.settings.items()))
    theirs = set(map(repr, other.settings.items()))
    return len(mine ^ theirs)


def row_difference(row: Row, baseline: Row) -> str | None:
    """Return a condition in which a run of ``row`` differs from a run of ``baseline``, or None."""
    for record, reference in product(row.records, baseline.records):
        told = difference(*conditions(record, reference))
        if told is not None:
            return told
    return None


def conditions(record: Record, reference: Record) -> tuple[Conditions, Conditions]:
    """Return the conditions of a run and of its reference that must be equal for a ratio.

    They are:
    - the data, with transforms and batch size,
    - the model, with its dropout,
    - the length of training,
    - the machine (see ``machine_and_task``),
    - precision, accumulation and compiler. Those of each of the run's phases are set against those
      of the reference's last phase.
    """
    here = machine_and_task(record)
    there = machine_and_task(reference)
    last_recipe = reference.config[recipe_name(last_phase(reference))]
    for phase, key in product(phases_made(record), OF_RECIPES):
        recipe = recipe_name(phase)
        here[f"{recipe}.{key}"] = told_of(record.config[recipe], key)
        there[f"{recipe}.{key}"] = told_of(last_recipe, key)
    return here, there


def told_of(recipe: Mapping[str, Any], key: str) -> Any:
    """Return what a recipe says of ``key``. Without a compiler, null and false say the same."""
    return recipe[key] or False


def recipe_name(phase: str) -> str:
    """Return the name in the configuration of the recipe that trains in a phase."""
    return RECIPES.get(phase, phase)


def machine_and_task(record: Record) -> Conditions:
    """Return a run's machine and task.

    The machine is the device, threads, processes, kind of parallelism and version of torch. The
    task is the data, the model and the length of training.
    """
    told = machine_of(record)
    told["system.parallel"] = record.config["system"]["parallel"]
    versions = record.result["environment"].get("versions", {})
    told["torch"] = versions.get("torch")
    for key, value in shaping(record.config).items():
        if key.startswith(OF_TASK) or key in LENGTH:
            told[key] = value
    return told


def machine_of(record: Record) -> Conditions:
    """Return the device, the threads of a process and the number of processes."""
    where = record.result["environment"]
    told = {"world_size": 1}
    for key in MACHINE:
        if key in where:
            told[key] = where[key]
    return told


def mixed_machines(rows: Sequence[Row]) -> list[str]:
    """Return a note for each row whose runs were made on different machines."""
    notes = []
    for row in rows:
        first, *others = map(machine_of, row.records)
        for other in others:
            told = difference(other, first)
            if told is not None:
                notes.append(f"{row.label}: runs on different machines ({told}): mind its times.")
                break
    return notes


def difference(here: Conditions, there: Conditions) -> str | None:
    """Return a line on the first key whose value differs, or None when all are equal."""
    for key in sorted(here.keys() | there.keys()):
        mine = here.get(key)
        theirs = there.get(key)
        if mine != theirs:
            return f"{key} is {theirs}, not {mine}"
    return None


def pairs(row: Row, baseline: Row) -> tuple[References, list[str]]:
    """Return the runs of ``baseline`` for each run of ``row``, by the folder of that run.

    When the baseline lacks some of the row's seeds, a note says so.
    """
    by_seed = {record.config["seed"]: record for record in baseline.records}
    paired: References = {}
    missing = []
    for record in row.records:
        seed = record.config["seed"]
        if seed in by_seed:
            paired[record.folder] = [by_seed[seed]]
        else:
            missing.append(str(seed))
    if not missing:
        return paired, []
    note = (
        f"{row.label}: compared with the mean of '{baseline.label}' over its own seeds, which "
        f"lack {', '.join(missing)}."
    )
    folders = [record.folder for record in row.records]
    return dict.fromkeys(folders, baseline.records), [note]


def ratio_columns(comparison: Comparison) -> list[Column]:
    """Return the columns that compare a run with its baseline."""
    references = comparison.references
    top1 = against(references, val_top1, val_top1, sub)
    speed = against(references, of_phase("adapter", IMAGES), of_last_phase(IMAGES), truediv)
    memory = against(references, of_phase("adapter", PEAK), of_last_phase(PEAK), truediv)
    flops = ratio(references, cost_flops)
    difference_of = partial(Column, unit="points", digits=signed, group=ACCURACY, paired=True)
    columns = [difference_of("top1_difference", "top1 to baseline", read=top1)]
    if comparison.curves:
        over = over_full_training(comparison.curves)
        columns.append(difference_of("over_full", "over full training of the cost", read=over))
    return [
        *columns,
        Column("speed_ratio", "speed ratio", "", speed, 2, COST, timed=True),
        Column("cost_ratio", "cost ratio", "", flops, 2, COST),
        Column("memory_ratio", "memory ratio", "", memory, 2, COST, timed=True),
    ]


def prelora_columns(comparison: Comparison) -> list[Column]:
    """Return the columns of PreLoRA's table (arXiv 2509.21619)."""
    by_key = ungrouped_ratios(comparison)
    epoch = ratio(comparison.references, mean_epoch_seconds)
    return [
        Column("trainable_share", "trainable", "%", trainable_share, 1),
        by_key["speed_ratio"],
        Column("epoch_ratio", "epoch time ratio", "", epoch, 2, timed=True),
        by_key["memory_ratio"],
        by_key["top1_difference"],
    ]


def ungrouped_ratios(comparison: Comparison) -> dict[str, Column]:
    """Return the ``ratio_columns`` by key, for a table of a single part."""
    columns = {}
    for column in ratio_columns(comparison):
        columns[column.key] = replace(column, group="")
    return columns


def ratio(references: References, read: Read) -> Read:
    """Return a function that computes ``read(run)`` over the mean of ``read(baseline's runs)``."""
    return against(references, read, read, truediv)


def against(
    references: References, mine: Read, theirs: Read, combine: Callable[[float, float], float]
) -> Read:
    """Return a function that computes ``combine(mine(run), mean of theirs(baseline's runs))``.

    It returns None when one of the numbers is missing, or when that mean is 0.
    """

    def read(record: Record) -> float | None:
        value = mine(record)
        compared = references.get(record.folder, ())
        found = list(map(theirs, compared))
        told = [number for number in found if number is not None]
        if value is None or not told or len(told) < len(found):
            return None
        mean = fmean(told)
        return combine(value, mean) if mean else None

    return read


def signed(value: float) -> str:
    """Return a difference with its sign and two decimals."""
    return f"{value:+.2f}"
