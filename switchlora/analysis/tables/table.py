"""Compare finished runs in tables: ``switchlora-runs tables RUNS...``.

RUNS are run folders or sweep folders. Runs that differ only in their seed form one row. Its cells
show mean ± standard deviation over seeds (number of runs). A ratio to a baseline under other
conditions is refused, and a note names the difference. Options:
- ``--preset systems`` makes one table of methods, each compared with full training.
- ``--preset prelora`` makes PreLoRA's table, with its published numbers beside the runs' numbers.
- ``--formats png,pdf,svg`` chooses the files of the picture.
- ``--notes FILE`` adds the lines of a file below the table.
- ``--no-times`` leaves out the numbers of clocks and memory counters. The same runs made again
  then give the same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from switchlora.analysis.output import add_formats
from switchlora.analysis.tables.baseline import (
    Comparison,
    compare_rows,
    mixed_machines,
    prelora_columns,
    ratio_columns,
)
from switchlora.analysis.tables.cards import card_columns
from switchlora.analysis.tables.columns import Cell, Column, make_cell, run_columns
from switchlora.analysis.tables.formats import csv_text, latex, markdown
from switchlora.analysis.tables.notes import general_notes, unfinished_notes
from switchlora.analysis.tables.pareto import draw_pareto
from switchlora.analysis.tables.remarks import remarked
from switchlora.analysis.tables.rows import Row, Table, make_rows
from switchlora.analysis.tables.systems import systems_columns
from switchlora.storage import Record, find_records, is_run, output_folder, warn

STEMS = {"default": "table", "systems": "systems", "prelora": "prelora"}
"""by preset, the name of its files"""
FORMS = {"md": markdown, "tex": latex, "csv": csv_text}
"""by ending of a file, the function that formats its table"""
PUBLISHED = {
    "trainable_share": (10.0,),
    "speed_ratio": (3.0,),
    "epoch_ratio": (1 / 1.5,),
    "memory_ratio": (0.8,),
    "top1_difference": (-0.43, -0.63, -0.58, -0.42, -0.50),
}


def main() -> None:
    """Write and print the tables. Exit with one line on a mistake."""
    options = parse(sys.argv[1:])
    try:
        for line in run(options):
            print(line)
    except (ValueError, OSError) as error:
        sys.exit(f"tables: {error}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders or sweep folders")
    parser.add_argument("--preset", choices=STEMS, default="default")
    parser.add_argument("--baseline", metavar="SETTING", help="label of a row; full training")
    parser.add_argument(
        "--out", type=output_folder, help="tables/ in the sweep, or here for loose runs"
    )
    add_formats(parser)
    parser.add_argument("--notes", type=Path, metavar="FILE", help="lines to put below the table")
    parser.add_argument("--no-times", action="store_true", help="no clock and no memory counter")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> list[str]:
    """Write all files; return the Markdown and, as the last line, the names of the files.

    Raise ValueError when no run has finished.
    """
    records = find_records(options.runs, warn, lambda record: markdown(make_table([record])))
    times = not options.no_times
    table = make_table(records, options.preset, options.baseline, times)
    if not table.rows:
        raise ValueError(f"no finished run: {'; '.join(unfinished_notes(records))}")
    if options.notes is not None:
        given = options.notes.read_text(encoding="utf-8").splitlines()
        table = replace(table, notes=(*table.notes, *given))
    out = options.out or default_out(options.runs)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for ending, form in FORMS.items():
        path = out / f"{STEMS[options.preset]}.{ending}"
        path.write_text(form(table), encoding="utf-8")
        written.append(path)
    lines = [markdown(table)]
    if options.preset != "prelora":
        try:
            for ending in options.formats:
                written.append(draw_pareto(table, out / f"pareto.{ending}"))
        except ValueError as why:
            lines.append(f"No picture: {why}.")
    return [*lines, f"wrote {', '.join(map(str, written))}"]


def default_out(runs: Sequence[Path]) -> Path:
    """Return ``tables/`` in the first sweep, or here when all ``runs`` are run folders."""
    sweeps = [path for path in runs if not is_run(path)]
    return (sweeps[0] if sweeps else Path()) / "tables"


def make_table(
    records: Sequence[Record],
    preset: str = "default",
    baseline: str | None = None,
    times: bool = True,
) -> Table:
    """Return the table of the finished runs among ``records``. Its notes name the others.

    Without ``times``, the columns and notes of clocks and memory counters are left out. Raise
    ValueError when no row is named ``baseline``, or when a row cannot be compared with it.
    """
    finished = [record for record in records if record.finished]
    rows, duplicates = make_rows(finished)
    comparison = compare_rows(rows, baseline)
    columns = columns_of(preset, comparison)
    if not times:
        columns = [column for column in columns if not column.timed]
    told, remarks = remarked(rows, preset, times)
    of_cards, card_notes = card_columns(rows, preset)
    columns += [*of_cards, *told]
    rows = [_filled(row, columns) for row in rows]
    notes = [*general_notes(preset, times, bool(comparison.curves)), *comparison.notes, *remarks]
    notes += card_notes
    if times:
        notes += mixed_machines(rows)
    notes += [*duplicates, *unfinished_notes(records)]
    if preset == "prelora" and rows:
        rows.append(published_row(columns))
    return Table(tuple(columns), tuple(rows), tuple(notes), comparison.references)


def columns_of(preset: str, comparison: Comparison) -> list[Column]:
    """Return the columns of a preset. Raise ValueError for an unknown preset."""
    if preset not in STEMS:
        raise ValueError(f"preset '{preset}' is none of {', '.join(STEMS)}")
    if preset == "prelora":
        return prelora_columns(comparison)
    if preset == "systems":
        return systems_columns(comparison)
    return [*run_columns(), *ratio_columns(comparison)]


def _filled(row: Row, columns: Sequence[Column]) -> Row:
    """Return the row with its cells."""
    cells = {}
    for column in columns:
        cell = make_cell(column, row.records)
        if cell is not None:
            cells[column.key] = cell
    return replace(row, cells=cells)


def published_row(columns: Sequence[Column]) -> Row:
    """Return a row of PreLoRA's published numbers. It has no runs."""
    cells = {column.key: Cell(PUBLISHED[column.key]) for column in columns}
    return Row("PreLoRA, published", {}, (), cells)
