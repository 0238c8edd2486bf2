"""Write one page for a whole sweep: ``switchlora-runs report SWEEP [--out FILE]``.

The page is a single HTML file that needs no other file, no network and no JavaScript. It begins
with a sentence of result and four numbers. Folded below are the table of ``switchlora-runs
tables``, curves, ranks, the settings that differ between the runs, the runs that did not finish,
and the environment of the runs. The path of the file is printed.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from switchlora.analysis.page.colors import PAGE
from switchlora.analysis.page.curves import (
    DIFFERENCE,
    HEADINGS,
    SVG_STYLE,
    Curve,
    Limits,
    adopted,
    difference_curve,
    family_medians,
    group_swatches,
    late_limits,
    panel,
    shared_limits,
    validation_curves,
)
from switchlora.analysis.page.headline import sentence, tiles
from switchlora.analysis.page.parts import (
    NONE,
    Groups,
    changes,
    differing_settings,
    environment_of,
    groups_of,
    problems,
    provenance,
    rank_maps,
    reason,
    reused,
    status,
    switch_of,
)
from switchlora.analysis.tables.columns import Cell, Column
from switchlora.analysis.tables.formats import grouped, shown
from switchlora.analysis.tables.pareto import draw_pareto
from switchlora.analysis.tables.rows import Row, Table, run_names
from switchlora.analysis.tables.systems import transitions
from switchlora.analysis.tables.table import make_table
from switchlora.storage import Record, find_records, output_file

FILE = "report.html"
TEMPLATE = "report_page.html"
Curves = dict[str, list[Curve]]
"""by the title of a chart, the curves of all runs"""
Texts = list[tuple[str, str]]
"""the text and the sort value of cells"""
Panels = list[tuple[str, Markup]]
"""the title and picture of each chart"""


def main() -> None:
    """Write the page of a sweep and print its path. Exit with one line on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweep", type=Path, help="a folder of run folders")
    parser.add_argument("--out", type=output_file, help=f"the file; default: {FILE} in the sweep")
    options = parser.parse_args()
    try:
        out = options.out or options.sweep / FILE
        print(write_page(options.sweep, out))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def write_page(sweep: Path, out: Path) -> Path:
    """Write the page of the runs in ``sweep`` to ``out``, and return ``out``.

    Raise ValueError when there are no runs.
    """
    context = content(sweep)
    page = templates(Path(__file__).parent).get_template(TEMPLATE).render(context)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def content(sweep: Path) -> dict[str, Any]:
    """Return the values that the template shows."""
    left_out: list[str] = []
    records = find_records([sweep], left_out.append, _attempt)
    table = make_table(records)
    groups = groups_of(records, table)
    keys, settings = differing_settings(records)
    common, differing = provenance(records)
    names = dict(zip([record.folder for record in records], run_names(records), strict=True))
    return {
        "title": title(sweep.resolve()),
        "sentence": sentence(table),
        "tiles": tiles(table, records),
        "page_colors": PAGE,
        "problems": [*problems(sweep, records), *(("left out", line) for line in left_out)],
        "table": table,
        "parts": _parts(table),
        "pareto": _pareto(table),
        "legend": group_swatches(_labels(records, table, groups, names)),
        "charts": _charts(records, groups, table.references),
        "maps": rank_maps(records),
        "keys": keys,
        "settings": [(names[record.folder], values) for record, values in settings],
        "runs": [_run(record, names[record.folder], differing) for record in records],
        "changes": any(map(_several_changes, records)),
        "common": common,
        "differing": differing,
    }


def _attempt(record: Record) -> None:
    """Read all that the page shows of one run."""
    table = make_table([record])
    _parts(table)
    sentence(table)
    tiles(table, [record])
    _charts([record], groups_of([record], table), table.references)
    rank_maps([record])
    differing_settings([record])
    (name,) = run_names([record])
    _run(record, name, provenance([record])[1])


def title(sweep: Path) -> str:
    """Return the name of the sweep's folder, or of its parent when the folder is named 'sweep'."""
    return sweep.parent.name if sweep.name == "sweep" else sweep.name


def _parts(table: Table) -> list[tuple[str, list[Column], list[tuple[str, Texts]]]]:
    """Return the parts of a table: name, columns, and the label of each row with its cells."""
    parts = []
    if table.rows:
        for name, columns in grouped(table.columns):
            rows = [(row.label, _cells(row, columns)) for row in table.rows]
            parts.append((name, columns, rows))
    return parts


def _cells(row: Row, columns: Sequence[Column]) -> Texts:
    """Return the text and the sort value of a row's cells."""
    cells = []
    for column in columns:
        cell = row.cells.get(column.key)
        cells.append((shown(cell, column), _sort_value(cell)))
    return cells


def _sort_value(cell: Cell | None) -> str:
    return "" if cell is None else repr(cell.mean).replace("inf", "Infinity")


def _labels(
    records: Sequence[Record], table: Table, groups: Groups, names: Mapping[Path, str]
) -> dict[int, str]:
    """Return each group's label: its row in the table, or else the name of its first run."""
    labels: dict[int, str] = {}
    for record in records:
        labels.setdefault(groups[record.folder], names[record.folder])
    for row in table.rows:
        labels[groups[row.records[0].folder]] = row.label
    return labels


def _charts(
    records: Sequence[Record], groups: Groups, references: Mapping[Path, Sequence[Record]]
) -> list[tuple[str, Panels]]:
    """Return the heading of each group of charts, with the title and picture of each chart.

    ``references`` are the runs of full training that a run is compared with, by its folder.
    """
    medians: dict[str, Curves] = defaultdict(dict)
    validations: Curves = {}
    differences: list[Curve] = []
    for record in sorted(records, key=lambda record: groups[record.folder]):
        group = groups[record.folder]
        try:
            of_statistics = family_medians(record, group)
            of_validation = validation_curves(record, group)
            compared = references.get(record.folder, ())
            difference = difference_curve(record, compared, group)
        except ValueError:
            continue  # a damaged log: ``problems`` names it
        for key, curves in of_statistics.items():
            _collect(curves, medians[key])
        _collect(of_validation, validations)
        if difference is not None:
            differences.append(difference)
    charts = []
    for key, heading in HEADINGS.items():
        limits = shared_limits(chain.from_iterable(medians[key].values()))
        panels = _panels(key, heading, medians[key], limits)
        charts.append((heading, panels))
    validation = _panels("val", "", validations, None)
    if differences:
        validation.insert(0, (DIFFERENCE, _difference_panel(differences)))
    charts.insert(0, ("Validation", validation))
    return [(heading, panels) for heading, panels in charts if panels]


def _collect(curves: Mapping[str, Curve], into: Curves) -> None:
    for name, curve in curves.items():
        into.setdefault(name, []).append(curve)


def _panels(key: str, heading: str, charts: Curves, limits: Limits | None) -> Panels:
    """Return the title and picture of each chart, all with the same ``limits`` of the y axis."""
    panels = []
    for place, (name, curves) in enumerate(charts.items()):
        description = f"{heading} {name}: a line for each run over optimizer updates".strip()
        panels.append((name, panel(curves, f"{key}-{place}", description, limits)))
    return panels


def _difference_panel(curves: Sequence[Curve]) -> Markup:
    told = f"{DIFFERENCE}, of each run over optimizer updates; its axis shows the second half"
    return panel(curves, "difference", told, late_limits(curves), zero=True)


def _pareto(table: Table) -> Markup | str:
    """Return the picture of accuracy against cost, or a text that says why there is none."""
    with TemporaryDirectory() as folder, matplotlib.rc_context(SVG_STYLE):
        try:
            path = draw_pareto(table, Path(folder) / "pareto.svg")
        except ValueError as error:
            return str(error)
        return adopted(path.read_text(), "pareto", "top1 against training cost, one mark a row")


def _run(record: Record, name: str, differing: Sequence[str]) -> dict[str, Any]:
    """Return the values of one line in the list of runs."""
    found = environment_of(record)
    switch = switch_of(record).get("num_updates")
    return {
        "name": name,
        "folder": record.folder.name,
        "seed": record.config.get("seed", NONE),
        "status": status(record),
        "switch": NONE if switch is None else f"{switch:,}",
        "changes": changes(record),
        "reason": reason(record),
        "reused": reused(record),
        "command": found.get("command", NONE),
        "environment": [found.get(key, NONE) for key in differing],
    }


def _several_changes(record: Record) -> bool:
    return len(transitions(record)) > 1


def templates(*folders: Path) -> Environment:
    """Return the templates in the folders; a name that is not defined is an error."""
    return Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
