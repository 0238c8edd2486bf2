"""Compare finished runs in tables: ``python scripts/tables.py RUNS...``.

RUNS are run folders or sweep folders. Runs that differ in nothing but their seed are one row: mean
± standard deviation over seeds (number of runs). A ratio to a baseline under other conditions is
refused and the difference named. ``--preset prelora`` makes PreLoRA's table instead, its published
numbers beside the runs'; ``--no-times`` leaves out what a clock or a memory counter fills, so that
the same runs made again give the same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tables_baseline import (
    Comparison,
    compare_rows,
    mixed_machines,
    prelora_columns,
    ratio_columns,
)
from tables_columns import Cell, Column, make_cell, run_columns
from tables_formats import csv_text, latex, markdown, shown
from tables_picture import draw_pareto, pareto_front
from tables_rows import Row, Table, make_rows

from switchlora.figures import run_labels
from switchlora.records import Record, find_records, is_run
from switchlora.throughput import WARMUP_UPDATES

__all__ = [
    "Cell",
    "Column",
    "Row",
    "Table",
    "draw_pareto",
    "make_table",
    "pareto_front",
    "shown",
]
PRESETS = ("default", "prelora")
SPREAD = (
    "Mean ± standard deviation over seeds (number of runs), also in the picture; of a single run "
    "its value, and quartiles over its updates in square brackets."
)
SWITCHING = (
    "At the switch: the last validation at or before its update; one at that very update is made "
    "by the switched model, whose function differs by switch.drift. Right after: the next one. "
    "Recovery: updates from the switch until a validation reaches the top1 at the switch again, 0 "
    "where the first one does; inf in CSV where none does."
)
TIMES = (
    "Images/s and seconds of an epoch are medians over updates, without evaluation and the first "
    f"{WARMUP_UPDATES} updates of a phase and after a resume (WARMUP_UPDATES in "
    "switchlora/throughput.py). Peak memory: allocated on a GPU, resident on a CPU. Their ratios: "
    "the adapter phase over the last phase of the baseline."
)
PUBLISHED = {
    "trainable_share": (10.0,),
    "speed_ratio": (3.0,),
    "epoch_ratio": (1 / 1.5,),
    "memory_ratio": (0.8,),
    "top1_difference": (-0.43, -0.63, -0.58, -0.42, -0.50),
}
SOURCE = (
    "PreLoRA, published: ViT-Large on ImageNet-1k. Trainable parameters, throughput (3x), time of "
    "an epoch (1.5x shorter) and memory (20 % less): abstract of arXiv 2509.21619. Top1: last "
    "epochs of five settings, one seed each, minus the baseline's 71.86 %, from the curves in "
    "github.com/Krishuthapa/PreLoRA; its spread is over settings, not seeds."
)
MEAN_EPOCH = "Epoch time ratio: the average over all epochs of a run, as published."


def main() -> None:
    """Write and print the tables; one clear line for a mistake."""
    options = parse(sys.argv[1:])
    try:
        for line in run(options):
            print(line)
    except (ValueError, OSError) as error:
        sys.exit(f"tables: {error}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders or sweep folders")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--baseline", metavar="SETTING", help="label of a row; full training")
    parser.add_argument("--out", type=Path, help="tables/ in the sweep, or here for loose runs")
    parser.add_argument("--no-times", action="store_true", help="no clock and no memory counter")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> list[str]:
    """Write all files; the Markdown and, last, a line with what was written."""
    records = find_records(options.runs)
    table = make_table(records, options.preset, options.baseline, times=not options.no_times)
    if not table.rows:
        raise ValueError(f"no finished run: {'; '.join(unfinished_notes(records))}")
    out = options.out or default_out(options.runs)
    out.mkdir(parents=True, exist_ok=True)
    stem = "prelora" if options.preset == "prelora" else "table"
    written = []
    for ending, form in (("md", markdown), ("tex", latex), ("csv", csv_text)):
        written.append(out / f"{stem}.{ending}")
        written[-1].write_text(form(table), encoding="utf-8")
    lines = [markdown(table)]
    if options.preset == "default":
        try:
            written.append(draw_pareto(table, out / "pareto.png"))
        except ValueError as why:
            lines.append(f"No picture: {why}.")
    return [*lines, f"wrote {', '.join(map(str, written))}"]


def default_out(runs: Sequence[Path]) -> Path:
    """``tables/`` in the first sweep; here where all are run folders."""
    sweeps = [path for path in runs if not is_run(path)]
    return (sweeps[0] if sweeps else Path()) / "tables"


def make_table(
    records: Sequence[Record],
    preset: str = "default",
    baseline: str | None = None,
    times: bool = True,
) -> Table:
    """The table of the finished ones of ``records``; the others are named in its notes.

    Without ``times``, columns and notes on what a clock or a memory counter tells are left out.
    ValueError for a ``baseline`` that no row is called, or that a row cannot be compared with.
    """
    rows, duplicates = make_rows([record for record in records if record.finished])
    comparison = compare_rows(rows, baseline)
    columns = columns_of(preset, comparison)
    columns = [column for column in columns if times or not column.timed]
    rows = [replace(row, cells=_cells(columns, row.records)) for row in rows]
    general = [SPREAD, SWITCHING if preset == "default" else SOURCE, *([TIMES] if times else [])]
    general += [MEAN_EPOCH] if times and preset == "prelora" else []
    of_times = [*mixed_machines(rows), *reused_notes(rows)] if times else []
    notes = [*general, *comparison.notes, *of_times, *duplicates, *unfinished_notes(records)]
    published = [published_row(columns)] if preset == "prelora" and rows else []
    return Table(tuple(columns), (*rows, *published), tuple(notes))


def columns_of(preset: str, comparison: Comparison) -> list[Column]:
    """The columns of a preset; ValueError for one that there is not."""
    if preset not in PRESETS:
        raise ValueError(f"preset '{preset}' is none of {', '.join(PRESETS)}")
    if preset == "prelora":
        return prelora_columns(comparison.references)
    return [*run_columns(), *ratio_columns(comparison.references)]


def _cells(columns: Sequence[Column], records: Sequence[Record]) -> dict[str, Cell]:
    made = {column.key: make_cell(column, records) for column in columns}
    return {key: cell for key, cell in made.items() if cell is not None}


def published_row(columns: Sequence[Column]) -> Row:
    """PreLoRA's own numbers, which no runs stand behind."""
    cells = {column.key: Cell(PUBLISHED[column.key]) for column in columns}
    return Row("PreLoRA, published", {}, (), cells)


def reused_notes(rows: Sequence[Row]) -> list[str]:
    """Which rows' full phases were taken from another run, and how many of their updates."""
    notes = []
    for row in rows:
        trunks = [record.summary.get("trunk") for record in row.records]
        reused = [trunk["reused_updates"] if trunk else 0 for trunk in trunks]
        if any(reused):
            told = ", ".join(f"{n:,}" for n in reused)
            notes.append(
                f"{row.label}: {told} updates of the full phase (by seed) were taken from a "
                "shared trunk with their times, not made anew; costs and times count them."
            )
    return notes


def unfinished_notes(records: Sequence[Record]) -> list[str]:
    """The runs that no row counts, with their status."""
    named = zip(run_labels([r.folder for r in records]), records, strict=True)
    unfinished = ((name, record) for name, record in named if not record.finished)
    return sorted(f"{name}: {status_of(record)}; not counted." for name, record in unfinished)


def status_of(record: Record) -> str:
    """How far an unfinished run came."""
    if record.summary is None:
        return "no summary, since it goes on or was killed"
    status = record.summary["status"].split("; the last checkpoint")[0]
    return f"{status} at update {record.summary['num_updates']:,}"


if __name__ == "__main__":
    main()
