"""Format a table as Markdown, LaTeX and CSV."""

import csv
import io
import math
import re
from collections.abc import Sequence
from itertools import groupby

from switchlora.analysis.tables.columns import Cell, Column
from switchlora.analysis.tables.rows import Table

MISSING = "–"
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "–": "--", "<": "$<$", ">": "$>$", "|": "$|$"},
}


def shown(cell: Cell | None, column: Column) -> str:
    """Return a cell as text: '87.5 ± 0.2 (3)', '1,200 [1,150–1,260] (1)' with quartiles, or '–'.

    When some seeds did not recover (inf), the text has the mean of the others, and how many did
    not recover.
    """
    if cell is None:
        return MISSING
    reached = tuple(v for v in cell.values if math.isfinite(v))
    if len(reached) < cell.n:
        lost = f"not recovered ({cell.n - len(reached)})"
        return f"{shown(Cell(reached), column)}, {lost}" if reached else lost
    text = number(cell.mean, column)
    if cell.std is not None:
        text += f" ± {number(cell.std, column).lstrip('+')}"
    elif cell.quartiles is not None:
        text += f" [{MISSING.join(number(each, column) for each in cell.quartiles)}]"
    return f"{text} ({cell.n})"


def number(value: float, column: Column) -> str:
    """Return a number as text, with the digits of its column."""
    digits = column.digits
    return digits(value) if callable(digits) else f"{value:,.{digits}f}"


def grouped(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Return the columns by group, in the order in which groups first appear."""
    order = {column.group: place for place, column in reversed(list(enumerate(columns)))}
    ordered = sorted(columns, key=lambda column: order[column.group])
    return [(name, list(found)) for name, found in groupby(ordered, key=lambda c: c.group)]


def markdown(table: Table) -> str:
    """Return Markdown: a padded table for each group of columns, and the notes."""
    parts = []
    for name, columns in grouped(table.columns):
        rows = [["", *(column.header for column in columns)], *_lines(table, columns)]
        parts += [f"**{name}**"] if name else []
        parts.append(_padded([[cell.replace("|", r"\|") for cell in row] for row in rows]))
    notes = "\n".join(f"- {note}" for note in table.notes)
    return "\n\n".join([*parts, *([notes] if notes else [])]) + "\n"


def _lines(table: Table, columns: Sequence[Column]) -> list[list[str]]:
    return [
        [row.label, *(shown(row.cells.get(column.key), column) for column in columns)]
        for row in table.rows
    ]


def _padded(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines.insert(1, ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(table: Table) -> str:
    r"""Return a LaTeX float for ``\input``: a booktabs tabular for each group, and the notes."""
    parts = [
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering\footnotesize",
    ]
    for name, columns in grouped(table.columns):
        heads = [
            [name, *(column.title for column in columns)],
            ["", *(column.unit for column in columns)],
        ]
        parts += [
            FIT,
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            *map(_latex_row, heads),
            r"\midrule",
            *map(_latex_row, _lines(table, columns)),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\par\medskip",
        ]
    parts += [r"\begin{flushleft}\scriptsize", *(rf"{escaped(n)}\par" for n in table.notes)]
    return "\n".join([*parts, r"\end{flushleft}", r"\end{table*}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"


def escaped(text: str) -> str:
    """Return the text with LaTeX's special characters escaped."""
    plain = re.sub(".", lambda found: LATEX.get(found[0], found[0]), text)
    return re.sub(r"(?<!\S)-(?=\d)", "$-$", plain)


def csv_text(table: Table) -> str:
    """Return CSV with mean, standard deviation and n of each column, and units in the header."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    titles = [_csv_title(column) for column in table.columns]
    writer.writerow(["setting", *(f"{t} {part}" for t in titles for part in ("mean", "std", "n"))])
    for row in table.rows:
        cells = [row.cells.get(column.key) for column in table.columns]
        plain = [("", "", 0) if c is None else (c.mean, c.std, c.n) for c in cells]
        writer.writerow([row.label, *(value for parts in plain for value in parts)])
    return file.getvalue()


def _csv_title(column: Column) -> str:
    return f"{column.key} [{column.unit}]" if column.unit else column.key
