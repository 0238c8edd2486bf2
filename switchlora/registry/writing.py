"""Change a registry: one writer at a time, each change whole or not at all.

- A version is filled in a hidden folder and gets its name by one rename, which publishes it.
- A promotion or a rollback is a line of the log, which is replaced as a whole.

A writer that is killed leaves a registry as before or as after its change. The next one removes
or finishes what is left over.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from switchlora import __version__
from switchlora.registry.log import (
    LOG,
    PROMOTE,
    PUBLISH,
    ROLLBACK,
    Entry,
    aliases,
    entries,
    existing,
    is_registry,
    logged,
    new_entry,
    number_of,
    productions,
    versions,
)
from switchlora.registry.version import check, seal
from switchlora.storage import NoLocks, locked, sync, warn, write_whole

PATIENCE, POLL = 60.0, 0.1
"""seconds to wait for another writer, and between two tries"""
STAGING = ".publishing-"
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
"""errors of a rename to a name that another writer took"""


def publish(
    registry: Path | str,
    fill: Callable[[Path], None],
    about: Mapping[str, Any],
    alias: str,
    why: str | None = None,
    against: str | None = None,
) -> str:
    """Make a version of what ``fill`` puts into an empty folder; return its name.

    ``about`` is what its ``version.json`` says. The version gets the ``alias``. ``why`` is a
    reason for the log, and ``against`` the objection that it overrules.
    """
    registry = Path(registry)
    check_place(registry)
    with writing(registry):
        part = registry / f"{STAGING}{os.getpid()}"
        entry = new_entry(PUBLISH, "", alias=alias, why=why, against=against)
        told = {name: value for name, value in vars(entry).items() if name != "version"}
        try:
            part.mkdir()
            fill(part)
            seal(part, {**about, "switchlora": __version__, "published": told})
            version = give_name(registry, part)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        settle(registry)
    return version


def promote(
    registry: Path | str, version: str, why: str | None = None, against: str | None = None
) -> bool:
    """Make a version that is whole the one in production; return whether it was not so before.

    VersionDamaged if it is not as published.
    """
    registry = Path(registry)
    with writing(existing(registry)):
        check(registry / version)
        log = entries(registry)
        if productions(log)[-1:] == [version]:
            return False
        add(registry, [*log, new_entry(PROMOTE, version, why=why, against=against)])
    return True


def rollback(registry: Path | str, why: str | None = None) -> str:
    """Put the version back into production that was there before; return its name.

    ValueError if there was none before. VersionDamaged if it is not as published.
    """
    registry = Path(registry)
    with writing(existing(registry)):
        log = entries(registry)
        held = productions(log)
        if len(held) < 2:
            now = f"{held[0]} is the first" if held else "nothing is"
            raise ValueError(f"{registry} has nothing to go back to: {now} in production")
        check(registry / held[-2])
        add(registry, [*log, new_entry(ROLLBACK, held[-2], why=why)])
    return held[-2]


@contextmanager
def writing(registry: Path) -> Iterator[None]:
    """Keep other writers out; remove or finish what a killed one left."""
    lock = lock_of(registry)
    try:
        if lock is not None:  # else it may be a living one's
            for left in registry.glob(f"{STAGING}*"):
                shutil.rmtree(left)
        settle(registry)
        yield
    finally:
        if lock is not None:
            lock.close()


def lock_of(registry: Path) -> TextIO | None:
    """Return the lock of a registry, made if need be; None on a file system without locks.

    ValueError when another writer keeps it.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            lock = locked(registry)
        except NoLocks as error:
            warn(f"{error}: take care that no two write to it at the same time")
            return None
        if lock is not None:
            return lock
        time.sleep(POLL)
    raise ValueError(f"another process has been writing to {registry} for {PATIENCE:g} s")


def check_place(registry: Path) -> None:
    """Raise ValueError unless there is a registry, an empty folder or nothing."""
    if not registry.exists() or is_registry(registry):
        return
    if not registry.is_dir():
        raise ValueError(f"{registry} is no folder: give a registry, or a new folder")
    others = [path.name for path in registry.iterdir() if not path.name.startswith(".")]
    if others:
        raise ValueError(
            f"{registry} is no registry, and holds {others[0]}: give a registry, or a new folder"
        )


def give_name(registry: Path, part: Path) -> str:
    """Rename a finished folder to the next free version, and return its name."""
    taken = [*versions(registry), *(entry.version for entry in logged(registry))]
    number = max(map(number_of, taken), default=0) + 1
    while True:
        try:
            part.rename(registry / f"v{number:04d}")
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            number += 1
            continue
        sync(registry)
        return f"v{number:04d}"


def settle(registry: Path) -> None:
    """Write what the log lacks, and set the links."""
    log = entries(registry)
    if log != logged(registry):
        add(registry, log)
    link(registry, log)


def add(registry: Path, log: Sequence[Entry]) -> None:
    """Write the log with its new entries, and set the links."""
    write_whole(registry / LOG, "".join(entry.line() for entry in log))
    sync(registry)
    link(registry, log)


def link(registry: Path, log: Sequence[Entry]) -> None:
    """Let a link of each alias lead to its version; the log holds without them."""
    for alias, version in aliases(log).items():
        path, part = registry / alias, registry / f".{alias}"
        if path.is_symlink() and os.readlink(path) == version:
            continue
        try:
            part.unlink(missing_ok=True)
            part.symlink_to(version)
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            warn(f"{path} does not lead to {version}: {error.strerror}; the log has it")
