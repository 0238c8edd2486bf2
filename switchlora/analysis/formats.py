"""Tables as padded Markdown."""

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with padded columns, which also reads well as plain text.

    The first row is the header.
    """
    rows = [[" ".join(cell.splitlines()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rules = ["-" * width for width in widths]
    header, *others = rows
    lines = []
    for row in (header, rules, *others):
        cells = map(str.ljust, row, widths)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
