"""The configuration reference, made from the yamls in ``conf/`` and their comments.

``python docs/reference.py`` writes ``docs/configuration.md`` anew.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from switchlora.config import folder_of
from switchlora.process import kind_of
from switchlora.process.words import BASE, groups, prefix_of, sets_whole_keys

CONF = folder_of("conf")
INTRODUCTION = """# Configuration

Every key, with its default, the values that it takes and what it does. This page is made from
the yamls in `conf/` and from `switchlora/process/schema.py`, which is checked before a run.

- `key=value` sets a key: `switchlora epochs=5 full.optimizer.lr=2e-4`.
- `group=choice` takes another yaml of a group: `switchlora data=cifar10 switch/rank=energy`.
- `switchlora --cfg job` shows the whole configuration, with your changes.
- Quote an argument that holds a bracket or a brace: `'switch.keep=[norm,head]'`.
"""
LINE = re.compile(
    r"^(?P<indent> *)(?P<key>[\w.]+):(?: +(?P<value>[^#\s].*?))?(?: +# *(?P<note>.*))?$"
)


class Row(NamedTuple):
    """One key of a yaml: its dotted name, its value as written, its comment."""

    key: str
    value: str
    note: str


def page(conf: Path = CONF) -> str:
    """Return the whole page as Markdown."""
    notes = known_notes(conf)
    parts = [INTRODUCTION, "## Top level\n", table(rows(conf / "config.yaml"))]
    for group in groups():
        parts += section(conf, group, notes)
    return "\n".join(parts) + "\n"


def known_notes(conf: Path) -> dict[str, str]:
    """Return the comment of each key, from the first yaml that has one."""
    notes: dict[str, str] = {}
    for row in rows(conf / "config.yaml"):
        notes[row.key] = row.note
    for group in groups():
        for path in sorted((conf / group).glob("*.yaml")):
            for row in named(group, path):
                notes[row.key] = notes.get(row.key) or row.note
    return notes


def note_of(row: Row, notes: Mapping[str, str]) -> str:
    """Return the comment of a row: its own, that of the key, or what its value refers to."""
    follows = re.fullmatch(r"\$\{([\w.]+)\}", row.value)
    return row.note or notes[row.key] or (f"follows `{follows[1]}`" if follows else "")


def named(group: str, path: Path) -> list[Row]:
    """Return the keys of a choice as the command line names them."""
    prefix = package(group, path)
    return [row._replace(key=prefix + row.key) for row in rows(path)]


def section(conf: Path, group: str, notes: Mapping[str, str]) -> Iterator[str]:
    """Yield the heading of a group, its choices, and the keys of each."""
    files = sorted((conf / group).glob("*.yaml"))
    yield f"## {group}\n"
    choices = [f"`{path.stem}`" for path in files if path.stem != BASE]
    yield "Choices: " + ", ".join(choices) + ".\n"
    for path in files:
        title = f"{group}={path.stem}"
        if path.stem == BASE:
            title = f"{group}: `{BASE}`, which is no choice"
        yield f"### {title}\n"
        if note := head(path):
            yield f"{note}\n"
        if base := built_on(path):
            yield f"It begins with {base}.\n"
        found = [row._replace(note=note_of(row, notes)) for row in named(group, path)]
        if found:
            yield table(found)


def package(group: str, path: Path) -> str:
    """Return what stands before the keys of a yaml on the command line, with its dot."""
    return "" if sets_whole_keys(path) else prefix_of(group, path.stem)


def head(path: Path) -> str:
    """Return the comment at the top of a yaml as one paragraph."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" @package _global_").strip())
    return " ".join(filter(None, lines))


def built_on(path: Path) -> str:
    """Return the choices of a yaml's defaults list, as words."""
    block = re.search(r"^defaults:\n((?:  - .*\n)+)", path.read_text(), re.M)
    entries = re.findall(r"^  - (.*?)(?: +#.*)?$", block[1], re.M) if block else []
    return ", ".join(f"`{entry}`" for entry in entries if entry != "_self_")


def rows(path: Path) -> list[Row]:
    """Return the keys of a yaml in their order, without ``defaults`` and Hydra's own."""
    found: list[Row] = []
    above: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        indent = len(match["indent"])
        above = [(depth, key) for depth, key in above if depth < indent]
        name = ".".join([*(key for _, key in above), match["key"]])
        above.append((indent, match["key"]))
        if name.split(".")[0] in ("defaults", "hydra"):
            continue
        if match["value"] is not None or match["note"] is not None:
            found.append(Row(name, match["value"] or "", match["note"] or ""))
    return found


def table(found: list[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| key | default | takes | what it does |", "|---|---|---|---|"]
    for row in found:
        value = f"`{escaped(row.value)}`" if row.value else ""
        kind = kind_of(row.key)
        takes = escaped(kind.words) if kind else ""
        lines.append(f"| `{row.key}` | {value} | {takes} | {escaped(row.note)} |")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Return text that a cell of a table can hold."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(page())
