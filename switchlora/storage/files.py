"""Write files of a run: whole or not at all, through no link, readable for whom the umask says."""

import hashlib
import os
import stat
from argparse import ArgumentTypeError
from pathlib import Path
from tempfile import TemporaryDirectory


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


def check_folder(path: Path) -> None:
    """Raise ValueError unless files can be written into a folder ``path``; none is made here."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        reason = f"is no folder that can be written to ({error.strerror})"
        raise ValueError(f"{path}: {there} {reason}") from error


def output_folder(word: str) -> Path:
    """Return the folder that an option names, for argparse.

    A command that computes for minutes refuses at once what it could not write to at its end.
    """
    try:
        check_folder(Path(word))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
    return Path(word)


def output_file(word: str) -> Path:
    """Return the file that an option names, in the same way."""
    path = Path(word)
    if path.is_dir():
        raise ArgumentTypeError(f"{word} is a folder: name a file")
    output_folder(str(path.parent))
    return path


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
