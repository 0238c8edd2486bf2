"""What a registry says of itself: its versions, its log, and what follows from the log.

A registry is a folder:

- ``v0001``, ``v0002`` ...: the versions, which never change;
- ``log.jsonl``: who published, promoted and rolled back which of them, when and why;
- ``candidate``, ``production``: links to versions, for other programs.

The log is the truth, and the links follow it. A version whose publication is not in the log yet
brings its entry along, in its ``version.json``: so it is published by one rename.
"""

import getpass
import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from switchlora.names import near
from switchlora.storage import FileDamaged, content_of, parse_json

LOG, ABOUT = "log.jsonl", "version.json"
CANDIDATE, PRODUCTION = "candidate", "production"
PUBLISH, PROMOTE, ROLLBACK = "publish", "promote", "rollback"
NAME = re.compile(r"v(\d{4,})")
NEEDED = ("when", "who", "what", "version")
"""values that every entry has"""


@dataclass(frozen=True)
class Entry:
    """One line of the log."""

    when: str
    """in UTC, ISO 8601"""
    who: str
    what: str
    version: str
    alias: str | None = None
    """the alias that a version was published under"""
    why: str | None = None
    against: str | None = None
    """the objection that ``why`` overruled"""

    def line(self) -> str:
        """Return the entry as a line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def new_entry(what: str, version: str, **more: str | None) -> Entry:
    """Return an entry of this user, at this moment."""
    return Entry(datetime.now(UTC).isoformat(timespec="seconds"), who(), what, version, **more)


def who() -> str:
    """Return user and machine, such as ``ada@node7``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container a user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def existing(registry: Path | str) -> Path:
    """Return ``registry``; ValueError where there is none."""
    registry = Path(registry)
    if not is_registry(registry):
        raise ValueError(
            f"{registry} is no registry: switchlora-runs publish RUN REGISTRY makes one"
        )
    return registry


def is_registry(folder: Path) -> bool:
    """Return whether anything has been published into a folder."""
    return folder.is_dir() and ((folder / LOG).is_file() or bool(versions(folder)))


def versions(registry: Path | str) -> list[str]:
    """Return the names of the versions, the oldest first."""
    registry = Path(registry)
    found = []
    for path in registry.iterdir():
        if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            found.append(path.name)
    return sorted(found, key=number_of)


def number_of(version: str) -> int:
    """Return the number of a version.

    >>> number_of("v0012")
    12
    """
    return int(version.removeprefix("v"))


def entries(registry: Path | str) -> list[Entry]:
    """Return the log in the order of time, with publications that are not written there yet.

    FileDamaged names a line that cannot be read.
    """
    registry = Path(registry)
    found = logged(registry)
    known = {entry.version for entry in found if entry.what == PUBLISH}
    for version in versions(registry):
        if version not in known:
            about = read_about(registry / version)
            found.append(entry_of({**about["published"], "version": version}, registry / version))
    return found


def logged(registry: Path) -> list[Entry]:
    """Return the entries of the log's file."""
    path = registry / LOG
    lines = content_of(path).splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, start=1):
        found.append(entry_of(parse_json(line, path, number), f"line {number} of {path}"))
    return found


def entry_of(values: dict[str, Any], where: object) -> Entry:
    """Return the entry with these values; FileDamaged if they are none."""
    names = [field.name for field in fields(Entry)]
    known = {name: values[name] for name in names if values.get(name) is not None}
    whole = all(name in known for name in NEEDED)
    if not whole or not all(isinstance(value, str) for value in known.values()):
        raise FileDamaged(f"{where} is damaged: it is no entry of a registry")
    if not NAME.fullmatch(known["version"]):
        raise FileDamaged(f"{where} is damaged: {known['version']!r} is no version")
    return Entry(**known)


def read_about(version: Path | str) -> dict[str, Any]:
    """Return what ``version.json`` of a version's folder says; FileDamaged if it is none."""
    version = Path(version)
    path = version / ABOUT
    about = parse_json(content_of(path), path)
    if not isinstance(about.get("published"), dict):
        raise FileDamaged(f"{path} is damaged: it has no 'published'")
    return about


def productions(log: Sequence[Entry]) -> list[str]:
    """Return the versions in production, the present one last: a rollback takes off the last."""
    held: list[str] = []
    for entry in log:
        if entry.what == PROMOTE:
            held.append(entry.version)
        elif entry.what == ROLLBACK and held:
            held.pop()
    return held


def aliases(log: Sequence[Entry]) -> dict[str, str]:
    """Return the version of each alias."""
    found = {entry.alias: entry.version for entry in log if entry.alias is not None}
    held = productions(log)
    return {**found, PRODUCTION: held[-1]} if held else found


def resolve(registry: Path | str, word: str) -> str:
    """Return the version that a name or an alias stands for; ValueError for any other word."""
    registry = Path(registry)
    known = aliases(entries(registry))
    version = known.get(word, word)
    names = versions(registry)
    if version not in names:
        gone = f"{word} is {version}, which is gone from" if word in known else f"no {word} in"
        raise ValueError(f"{gone} {registry}; {near(word, [*names, *known])}")
    return version
