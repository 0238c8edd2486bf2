"""What the scripts that compare the runs of a study share: command line, mistakes, tables."""

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from switchlora.analysis.tables.rows import settings_of
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import Record, find_records, output_folder, warn

T = TypeVar("T")


def compare(
    documentation: str,
    read: Callable[[Record], T | None],
    write: Callable[[list[T], Path], object],
) -> None:
    """Write what a script compares into the folder that its command line names.

    ``read`` takes what is compared from a run, or None to leave it out. Exit with one line when
    the runs are no runs of the study.
    """
    parser = argparse.ArgumentParser(description=documentation.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS")
    parser.add_argument("--out", type=output_folder, required=True, metavar="FOLDER")
    options = parser.parse_args()
    try:
        records = find_records(options.runs, warn, read)
        found = [each for each in map(read, records) if each is not None]
        if not found:
            raise ValueError(f"no run in {' '.join(map(str, options.runs))} has finished")
        options.out.mkdir(parents=True, exist_ok=True)
        write(found, options.out)
    except USER_ERRORS as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {one_line(error)}")


def settings(record: Record, *keys: str) -> list[Any]:
    """Return what a run sets for some dotted keys; ValueError for a key that it does not have."""
    known = settings_of(record.config)
    for key in keys:
        if key not in known:
            raise ValueError(f"{record.folder} has no {key}: give the runs of this study")
    return [known[key] for key in keys]


def held_out(record: Record) -> float:
    """Return top1 in % over all images that were held out: validation and test split together."""
    splits = [record.result["val"], record.result["test"]]
    images = [record.result["images"][name] for name in ("val", "test")]
    total = sum(split["top1"] * count for split, count in zip(splits, images, strict=True))
    return float(total) / sum(images)


def lines_of(rows: list[list[str]]) -> str:
    """Return a Markdown table without padding; the first row is the header."""
    header, *others = rows
    lines = [header, ["---"] * len(header), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys, the keys first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
