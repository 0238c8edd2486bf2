"""Write files of a run: whole or not at all, through no link, readable for whom the umask says."""

import hashlib
import os
import stat
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to a file, whole or not at all.

    A symbolic link at ``path`` is replaced by the file: what it points to is left alone.
    """
    part = _part_of(path)
    with part.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def sync(path: Path) -> None:
    """Return when the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def follow_umask(path: Path) -> None:
    """Give a file that a library wrote for its owner alone the mode of any new file."""
    new = _part_of(path)
    new.touch()
    path.chmod(stat.S_IMODE(new.stat().st_mode))
    new.unlink()


def is_regular(path: Path) -> bool:
    """Return whether there is a plain file: no link, no device, no pipe, no folder."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def open_here(path: Path) -> int:
    """Open a file to write, making it if need be, and return its descriptor.

    Nothing in it is changed. ValueError for a symbolic link: what it points to may be anything.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, and links are not followed: remove it")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _part_of(path: Path) -> Path:
    """Return the path of an unfinished file beside ``path``; an earlier one is removed."""
    part = path.with_name(f".{path.name}")
    part.unlink(missing_ok=True)
    return part
