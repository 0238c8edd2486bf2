"""One version: a folder that never changes, with a checksum of each of its files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchlora.registry.log import ABOUT
from switchlora.storage import FileDamaged, content_of, is_regular, parse_json, sha256_of, sync

CHECKSUMS = "checksums.json"


class VersionDamaged(ValueError):
    """A version is not as it was published; the message says which, and what is wrong."""


def is_version(folder: Path | str) -> bool:
    """Return whether a folder is a version of a registry."""
    folder = Path(folder)
    return (folder / ABOUT).is_file() and (folder / CHECKSUMS).is_file()


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what there is to say of a version, then checksums of all files; wait for the disk."""
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    sums = {name: sha256_of(folder / name) for name in contents(folder)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        sync(path)


def contents(folder: Path) -> list[str]:
    """Return the names of all files of a version but its checksums, links and pipes too."""
    found = []
    for path in folder.rglob("*"):
        if not path.is_dir() or path.is_symlink():
            found.append(path.relative_to(folder).as_posix())
    return sorted(set(found) - {CHECKSUMS})


def check(folder: Path | str) -> int:
    """Return the number of files of a version; VersionDamaged unless they are as published."""
    folder = Path(folder)
    if not folder.is_dir():
        raise VersionDamaged(f"{folder} is gone")
    sums = read_checksums(folder)
    found = contents(folder)
    for name in sorted(sums.keys() | set(found)):
        reason = what_is_wrong(folder, name, sums, found)
        if reason is not None:
            raise VersionDamaged(f"{folder} is damaged: {name} {reason}")
    return len(found)


def what_is_wrong(
    folder: Path, name: str, sums: Mapping[str, Any], found: list[str]
) -> str | None:
    """Return what is wrong with a file of a version, or None."""
    if name not in found:
        return "is missing"
    if name not in sums:
        return "was not published with it"
    if not is_regular(folder / name):
        return "is no plain file"
    try:
        same = sha256_of(folder / name) == sums[name]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if same else "does not match its checksum"


def read_checksums(folder: Path) -> dict[str, Any]:
    """Return the checksum of each file of a version; VersionDamaged if they cannot be read."""
    path = folder / CHECKSUMS
    if not is_regular(path):
        raise VersionDamaged(f"{folder} is damaged: {CHECKSUMS} is missing or no plain file")
    try:
        return parse_json(content_of(path), path)
    except FileDamaged as error:
        raise VersionDamaged(f"{folder} is damaged: {error}") from error
