"""Measure the structure of a checkout: ``python scripts/structure.py [CHECKOUT ...]``.

Rooms are the files and folders of the package's top level. A room stands one floor above the
highest room that it imports; an arrow is an import of one room by another, and one that closes a
circle runs back up. Code lines hold a token that is no comment and no docstring.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from statistics import median

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
NO_CODE |= {tokenize.ENCODING, tokenize.ENDMARKER}
Arrows = dict[str, set[str]]


def room_of(package: Path, path: Path) -> str:
    """The folder or file of the package's top level that holds a file."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def arrows_of(package: Path, files: list[Path]) -> Arrows:
    """Which rooms each room imports."""
    rooms = {room_of(package, path) for path in files}
    found: Arrows = {room: set() for room in rooms}
    for path in files:
        here = room_of(package, path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                found[here] |= imported(node) & rooms - {here}
    return found


def imported(node: ast.ImportFrom) -> set[str]:
    """The rooms that one import statement names."""
    package, _, rest = (node.module or "").partition(".")
    if package != "switchlora":
        return set()
    return {rest.split(".")[0]} if rest else {alias.name for alias in node.names}


def floors(arrows: Arrows) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The floor of each room, and the arrows that run back to a room which stands on this one."""
    levels: dict[str, int] = {}
    backwards: list[tuple[str, str]] = []

    def visit(room: str, path: tuple[str, ...]) -> int:
        if room in levels:
            return levels[room]
        below = [0]
        for other in sorted(arrows[room]):
            if other in path or other == room:
                backwards.append((room, other))
            else:
                below.append(visit(other, (*path, room)))
        levels[room] = 1 + max(below)
        return levels[room]

    for room in sorted(arrows):
        visit(room, ())
    return levels, backwards


def functions(tree: ast.AST) -> Iterator[int]:
    """The length of each function in lines, its docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def code(text: str) -> tuple[int, int]:
    """Tokens, and the lines that they stand on, without comments and docstrings."""
    strings = {
        (node.value.lineno, node.value.col_offset)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    kept = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in NO_CODE and token.start not in strings
    ]
    return len(kept), len({token.start[0] for token in kept})


def measure(checkout: Path) -> dict[str, str]:
    """What is told of a checkout, by name."""
    package = checkout / "switchlora"
    files = [path for path in sorted(package.rglob("*.py")) if path.name != "__main__.py"]
    rooms = arrows_of(package, [path for path in files if path != package / "__init__.py"])
    levels, backwards = floors(rooms)
    scripts = sorted((checkout / "scripts").glob("*.py"))
    texts = [path.read_text() for path in [*files, *scripts]]
    trees = [ast.parse(text) for text in texts]
    lengths = [length for tree in trees for length in functions(tree)]
    counts = [code(text) for text in texts]
    tokens, lines = (sum(column) for column in zip(*counts, strict=True))
    made = sum(isinstance(node, COMPREHENSIONS) for tree in trees for node in ast.walk(tree))
    return {
        "rooms": str(len(rooms)),
        "floors": str(max(levels.values())),
        "arrows": str(sum(map(len, rooms.values()))),
        "arrows that run back up": str(len(backwards)),
        "lines, package and scripts": f"{sum(text.count(chr(10)) for text in texts):,}",
        "lines, scripts alone": f"{sum(p.read_text().count(chr(10)) for p in scripts):,}",
        "functions": str(len(lengths)),
        "median function, lines": f"{median(lengths):g}",
        "longest function, lines": str(max(lengths)),
        "tokens a code line": f"{tokens / lines:.1f}",
        "comprehensions per 100 code lines": f"{100 * made / lines:.1f}",
        "README, words": f"{len((checkout / 'README.md').read_text().split()):,}",
    }


def main() -> None:
    """Print a table with a column for each checkout."""
    checkouts = [Path(word) for word in sys.argv[1:]] or [Path(__file__).parents[1]]
    columns = [measure(checkout) for checkout in checkouts]
    for name in columns[0]:
        print(f"{name:<36}" + "".join(f"{column[name]:>12}" for column in columns))


if __name__ == "__main__":
    main()
