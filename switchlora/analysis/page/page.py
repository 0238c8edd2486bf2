"""Write one page for a whole sweep: ``switchlora-runs report SWEEP [--out FILE]``.

The page is a single HTML file that needs no other file, no network and no JavaScript. It has the
table of ``switchlora-runs tables``, curves, ranks, the settings that differ between the runs, the
runs that did not finish, and the environment of the runs. The path of the file is printed.
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

from switchlora.analysis.page.curves import (
    HEADINGS,
    SVG_STYLE,
    Curve,
    Limits,
    adopted,
    family_medians,
    group_swatches,
    panel,
    shared_limits,
    validation_curves,
)
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
from switchlora.analysis.tables.columns import Cell
from switchlora.analysis.tables.formats import grouped, shown
from switchlora.analysis.tables.pareto import draw_pareto
from switchlora.analysis.tables.rows import Table
from switchlora.analysis.tables.systems import transitions
from switchlora.analysis.tables.table import make_table
from switchlora.storage import Record, find_records

PAGE = "report.html"
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
    parser.add_argument("--out", type=Path, help=f"the file; default: {PAGE} in the sweep")
    options = parser.parse_args()
    try:
        out = options.out or options.sweep / PAGE
        print(write_page(options.sweep, out))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def write_page(sweep: Path, out: Path) -> Path:
    """Write the page of the runs in ``sweep`` to ``out``, and return ``out``.

    Raise ValueError when there are no runs.
    """
    context = content(sweep)
    page = _templates().get_template(TEMPLATE).render(context)
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
    return {
        "title": title(sweep.resolve()),
        "count": len(records),
        "finished": sum(record.finished for record in records),
        "problems": [*problems(sweep, records), *(("left out", line) for line in left_out)],
        "table": table,
        "parts": grouped(table.columns),
        "rows": _cells(table),
        "pareto": _pareto(table),
        "legend": group_swatches(_labels(records, table, groups)),
        "charts": _charts(records, groups),
        "maps": rank_maps(records),
        "keys": keys,
        "settings": settings,
        "runs": [_run(record, differing) for record in records],
        "changes": any(map(_several_changes, records)),
        "common": common,
        "differing": differing,
    }


def _attempt(record: Record) -> None:
    """Read all that the page shows of one run."""
    make_table([record])
    family_medians(record, 0)
    validation_curves(record, 0)
    rank_maps([record])
    differing_settings([record])
    _run(record, provenance([record])[1])


def title(sweep: Path) -> str:
    """Return the name of the sweep's folder, or of its parent when the folder is named 'sweep'."""
    return sweep.parent.name if sweep.name == "sweep" else sweep.name


def _cells(table: Table) -> list[tuple[str, Texts]]:
    """Return the label of each row with the text and the sort value of its cells."""
    rows = []
    for row in table.rows:
        cells = []
        for _, columns in grouped(table.columns):
            for column in columns:
                cell = row.cells.get(column.key)
                cells.append((shown(cell, column), _sort_value(cell)))
        rows.append((row.label, cells))
    return rows


def _sort_value(cell: Cell | None) -> str:
    return "" if cell is None else repr(cell.mean).replace("inf", "Infinity")


def _labels(records: Sequence[Record], table: Table, groups: Groups) -> dict[int, str]:
    """Return each group's label: its row in the table, or else the folder of its first run."""
    labels: dict[int, str] = {}
    for record in records:
        labels.setdefault(groups[record.folder], record.folder.name)
    for row in table.rows:
        labels[groups[row.records[0].folder]] = row.label
    return labels


def _charts(records: Sequence[Record], groups: Groups) -> list[tuple[str, Panels]]:
    """Return the heading of each group of charts, with the title and picture of each chart."""
    medians: dict[str, Curves] = defaultdict(dict)
    validations: Curves = {}
    for record in sorted(records, key=lambda record: groups[record.folder]):
        group = groups[record.folder]
        try:
            of_statistics = family_medians(record, group)
            of_validation = validation_curves(record, group)
        except ValueError:
            continue  # a damaged log: ``problems`` names it
        for key, curves in of_statistics.items():
            _collect(curves, medians[key])
        _collect(of_validation, validations)
    charts = []
    for key, heading in HEADINGS.items():
        limits = shared_limits(chain.from_iterable(medians[key].values()))
        panels = _panels(key, heading, medians[key], limits)
        charts.append((heading, panels))
    charts.append(("Validation", _panels("val", "", validations, None)))
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


def _pareto(table: Table) -> Markup | str:
    """Return the picture of accuracy against cost, or a text that says why there is none."""
    with TemporaryDirectory() as folder, matplotlib.rc_context(SVG_STYLE):
        try:
            path = draw_pareto(table, Path(folder) / "pareto.svg")
        except ValueError as error:
            return str(error)
        return adopted(path.read_text(), "pareto", "top1 against training cost, one dot a row")


def _run(record: Record, differing: Sequence[str]) -> dict[str, Any]:
    """Return the values of one line in the list of runs."""
    found = environment_of(record)
    switch = switch_of(record).get("num_updates")
    return {
        "name": record.folder.name,
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


def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
