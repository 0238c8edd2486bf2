"""Measure the structure of a checkout: ``python scripts/structure.py [CHECKOUT ...]``.

Rooms are the files and folders of the package's top level. A room stands one floor above the
highest room that it imports; an arrow is an import of one room by another, and one that closes a
circle runs back up. Code lines hold a token that is no comment and no docstring.
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from statistics import median

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
Arrows = dict[str, set[str]]
"""the rooms that each room imports"""
Floors = dict[str, int]
Arrow = tuple[str, str]


def room_of(package: Path, path: Path) -> str:
    """Return the folder or file of the package's top level that holds a file."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def arrows_of(package: Path, files: list[Path]) -> Arrows:
    """Return which rooms each room imports."""
    found: Arrows = {room_of(package, path): set() for path in files}
    for path in files:
        here = room_of(package, path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found[here] |= imported(node) & found.keys()
    for room, others in found.items():
        others.discard(room)
    return found


def imported(node: ast.ImportFrom) -> set[str]:
    """Return the rooms that one import statement names."""
    package, _, rest = (node.module or "").partition(".")
    if package != "switchlora":
        return set()
    if rest:
        return {rest.split(".")[0]}
    return {alias.name for alias in node.names}


def floors(arrows: Arrows) -> tuple[Floors, list[Arrow]]:
    """Return the floor of each room, and the arrows that run back to a room which imports this."""
    levels: Floors = {}
    backwards: list[Arrow] = []

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


def lengths_of_functions(tree: ast.AST) -> Iterator[int]:
    """Yield the length of each function in lines, with its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            last = node.end_lineno or node.lineno
            yield last - node.lineno + 1


def count_comprehensions(tree: ast.AST) -> int:
    """Return the number of comprehensions and generator expressions."""
    return sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree))


def code(text: str) -> tuple[int, int]:
    """Return the number of tokens and of their lines, without comments and docstrings."""
    docstrings = places_of_docstrings(ast.parse(text))
    tokens = 0
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE and token.start not in docstrings:
            tokens += 1
            lines.add(token.start[0])
    return tokens, len(lines)


def places_of_docstrings(tree: ast.AST) -> set[tuple[int, int]]:
    """Return line and column of each constant that stands alone, as docstrings do."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.add((node.value.lineno, node.value.col_offset))
    return found


def measure(checkout: Path) -> dict[str, str]:
    """Return what is told of a checkout, by name."""
    package = checkout / "switchlora"
    modules = sorted(package.rglob("*.py"))
    files = [path for path in modules if path.name != "__main__.py"]
    scripts = sorted((checkout / "scripts").glob("*.py"))
    readme = (checkout / "README.md").read_text()
    return {
        **measure_rooms(package, files),
        "lines, package and scripts": f"{count_lines([*files, *scripts]):,}",
        "lines, scripts alone": f"{count_lines(scripts):,}",
        **measure_prose([*files, *scripts]),
        "README, words": f"{len(readme.split()):,}",
    }


def measure_rooms(package: Path, files: list[Path]) -> dict[str, str]:
    """Return the numbers of rooms, floors and arrows."""
    in_rooms = [path for path in files if path != package / "__init__.py"]
    rooms = arrows_of(package, in_rooms)
    levels, backwards = floors(rooms)
    return {
        "rooms": str(len(rooms)),
        "floors": str(max(levels.values())),
        "arrows": str(sum(map(len, rooms.values()))),
        "arrows that run back up": str(len(backwards)),
    }


def count_lines(files: list[Path]) -> int:
    """Return the number of lines of ``files`` in all."""
    return sum(path.read_text().count("\n") for path in files)


def measure_prose(files: list[Path]) -> dict[str, str]:
    """Return how long functions are and how dense the code is."""
    lengths: list[int] = []
    tokens = 0
    lines = 0
    comprehensions = 0
    for path in files:
        text = path.read_text()
        tree = ast.parse(text)
        lengths += lengths_of_functions(tree)
        comprehensions += count_comprehensions(tree)
        own_tokens, own_lines = code(text)
        tokens += own_tokens
        lines += own_lines
    return {
        "functions": str(len(lengths)),
        "median function, lines": f"{median(lengths):g}",
        "longest function, lines": str(max(lengths)),
        "tokens a code line": f"{tokens / lines:.1f}",
        "comprehensions per 100 code lines": f"{100 * comprehensions / lines:.1f}",
    }


def main() -> None:
    """Print a table with a column for each checkout. Exit with one line for a wrong folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkouts", type=Path, nargs="*", metavar="CHECKOUT", help="default: this"
    )
    this = Path(__file__).parents[1]
    checkouts = parser.parse_args().checkouts or [this]
    for checkout in checkouts:
        if not (checkout / "switchlora").is_dir():
            parser.error(f"{checkout} holds no switchlora: give the folder of a checkout")
    columns = list(map(measure, checkouts))
    for name in columns[0]:
        values = [f"{column[name]:>12}" for column in columns]
        print(f"{name:<36}" + "".join(values))


if __name__ == "__main__":
    main()
