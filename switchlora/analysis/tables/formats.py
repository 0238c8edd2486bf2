"""Format a table as Markdown, LaTeX and CSV."""

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from switchlora.analysis.tables.columns import Cell, Column
from switchlora.analysis.tables.rows import Table

MISSING = "–"
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
LATEX = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",
    }
)
"""what stands in LaTeX for each special character"""


def shown(cell: Cell | None, column: Column) -> str:
    """Return a cell as text: '87.5 ± 0.2 (3)', '1,200 [1,150–1,260] (1)' with quartiles, or '–'.

    A difference of paired runs has its 95 % interval: '+0.5 [+0.2 to +0.8] (3)'.

    When some seeds did not recover (inf), the text has the mean of the others, and how many did
    not recover.
    """
    if cell is None:
        return MISSING
    reached = tuple(filter(math.isfinite, cell.values))
    if len(reached) < cell.n:
        lost = f"not recovered ({cell.n - len(reached)})"
        return f"{shown(Cell(reached), column)}, {lost}" if reached else lost
    text = number_text(cell.mean, column)
    if column.paired and cell.interval is not None:
        low, high = cell.mean - cell.interval, cell.mean + cell.interval
        text += f" [{number_text(low, column)} to {number_text(high, column)}]"
    elif cell.std is not None:
        text += f" ± {number_text(cell.std, column).lstrip('+')}"
    elif cell.quartiles is not None:
        low, high = cell.quartiles
        text += f" [{number_text(low, column)}–{number_text(high, column)}]"
    return f"{text} ({cell.n})"


def number_text(value: float, column: Column) -> str:
    """Return a number as text, with the digits of its column."""
    digits = column.digits
    return digits(value) if callable(digits) else f"{value:,.{digits}f}"


def grouped(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Return the columns by group, in the order in which groups first appear."""
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault(column.group, []).append(column)
    return list(groups.items())


def markdown(table: Table) -> str:
    """Return Markdown: a padded table for each group of columns, and the notes."""
    parts = []
    for name, columns in grouped(table.columns):
        if name:
            parts.append(f"**{name}**")
        headers = [column.header for column in columns]
        rows = [["", *headers], *_lines(table, columns)]
        parts.append(_padded(list(map(_without_bars, rows))))
    if table.notes:
        parts.append("\n".join(f"- {note}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def _lines(table: Table, columns: Sequence[Column]) -> list[list[str]]:
    """Return the label of each row and its cells as text."""
    lines = []
    for row in table.rows:
        cells = [shown(row.cells.get(column.key), column) for column in columns]
        lines.append([on_one_line(row.label), *cells])
    return lines


def on_one_line(text: str) -> str:
    """Return a text without line breaks, which would split a row."""
    return re.sub(r"\s*[\r\n\v\f\x85\u2028\u2029]\s*", " ", text)


def no_formula(text: str) -> str:
    """Return a text that no program for tables takes for a formula: with ' before = + - @."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def _without_bars(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", r"\|") for cell in cells]


def _padded(rows: Sequence[Sequence[str]]) -> str:
    columns = zip(*rows, strict=True)
    widths = [max(3, *map(len, column)) for column in columns]
    rule = ["-" * widths[0]]
    for width in widths[1:]:
        rule.append("-" * (width - 1) + ":")
    header, *body = [_aligned(row, widths) for row in rows]
    return "\n".join(map(_markdown_line, [header, rule, *body]))


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Pad the label on its right and the numbers on their left."""
    label, *numbers = row
    padded = map(str.rjust, numbers, widths[1:])
    return [label.ljust(widths[0]), *padded]


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex(table: Table) -> str:
    r"""Return a LaTeX float for ``\input``: a booktabs tabular for each group, and the notes."""
    lines = [
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering\footnotesize",
    ]
    for name, columns in grouped(table.columns):
        lines += _tabular(table, name, columns)
    lines.append(r"\begin{flushleft}\scriptsize")
    for note in table.notes:
        lines.append(rf"{escaped(note)}\par")
    return "\n".join([*lines, r"\end{flushleft}", r"\end{table*}"]) + "\n"


def _tabular(table: Table, name: str, columns: Sequence[Column]) -> list[str]:
    titles = [column.title for column in columns]
    units = [column.unit for column in columns]
    return [
        FIT,
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        _latex_row([name, *titles]),
        _latex_row(["", *units]),
        r"\midrule",
        *map(_latex_row, _lines(table, columns)),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\par\medskip",
    ]


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"


def escaped(text: str) -> str:
    """Return the text with LaTeX's special characters escaped."""
    return re.sub(r"(?<!\S)-(?=\d)", "$-$", text.translate(LATEX))


def csv_text(table: Table) -> str:
    """Return CSV with mean, standard deviation and n of each column, and units in the header.

    A paired difference also has the half width of its 95 % interval.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = ["setting"]
    for column in table.columns:
        title = _csv_title(column)
        header += [f"{title} mean", f"{title} std", f"{title} n"]
        if column.paired:
            header.append(f"{title} 95 % half width")
    writer.writerow(header)
    for row in table.rows:
        line: list[Any] = [no_formula(on_one_line(row.label))]
        for column in table.columns:
            line += _csv_cells(row.cells.get(column.key), column.paired)
        writer.writerow(line)
    return file.getvalue()


def _csv_cells(cell: Cell | None, paired: bool) -> list[Any]:
    values = ["", "", 0] if cell is None else [cell.mean, cell.std, cell.n]
    if paired:
        values.append(None if cell is None else cell.interval)
    return values


def _csv_title(column: Column) -> str:
    return f"{column.key} [{column.unit}]" if column.unit else column.key
