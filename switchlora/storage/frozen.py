"""Weights that no longer change: a file of their own, which later checkpoints share.

The file is named after its content. A checkpoint whose frozen weights are those of an earlier one
takes that one's file by a link, so they are on the disk once. Each checkpoint stays whole by
itself: it can be copied, moved and removed without the others.
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from switchlora.process import distributed

NAME = re.compile(r"frozen-[0-9a-f]{16}\.pt")
LEAST = 0.5
"""share of the bytes of all weights from which frozen ones get a file of their own"""


class Hashed:
    """A file to write, with the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, content: Any) -> int:
        """Write ``content``."""
        self._digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()

    @property
    def hexdigest(self) -> str:
        """The checksum of all that was written so far."""
        return self._digest.hexdigest()


def save_hashed(content: Any, path: Path) -> str:
    """Write ``content`` with ``torch.save``; return the SHA-256 of the file."""
    with path.open("wb") as file:
        hashed = Hashed(file)
        torch.save(content, hashed)  # type: ignore[arg-type]  # it needs no more than these
    return hashed.hexdigest


def split(
    weights: Mapping[str, Tensor], frozen: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights that may change and those that are ``frozen``, if these are most."""
    apart = {name: weight for name, weight in weights.items() if name in frozen}
    if _bytes_of(apart) < LEAST * _bytes_of(weights):
        return dict(weights), {}
    rest = {name: weight for name, weight in weights.items() if name not in frozen}
    return rest, apart


def write(weights: Mapping[str, Tensor], folder: Path, earlier: Iterable[Path]) -> tuple[str, str]:
    """Write frozen weights into ``folder``, or link the file of an ``earlier`` checkpoint.

    Return the name of the file and its SHA-256.
    """
    name = f"frozen-{distributed.checksum(weights)}.pt"
    for checkpoint in earlier:
        if (checkpoint / name).is_file():
            known = _known_digest(checkpoint, name)
            if known is not None and _linked(checkpoint / name, folder / name):
                return name, known
    return name, save_hashed(dict(weights), folder / name)


def read(state: Mapping[str, Any], folder: Path, mmap: bool) -> dict[str, Any]:
    """Return a checkpoint's ``state`` with its frozen weights among the others."""
    name = state.get("frozen")
    if name is None:
        return dict(state)
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise ValueError(f"'frozen' is {name!r}, no name of a file of frozen weights")
    apart = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=mmap)
    whole = {key: value for key, value in state.items() if key != "frozen"}
    return {**whole, "weights": {**apart, **state["weights"]}}


def _bytes_of(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.nbytes for weight in weights.values())


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # this file system has no links
        return False
    return True


def _known_digest(checkpoint: Path, name: str) -> str | None:
    """Return the checksum that a checkpoint has of its file ``name``."""
    try:
        lines = (checkpoint / "SHA256SUMS").read_text().splitlines()
    except (OSError, ValueError):
        return None
    for line in lines:
        digest, _, file = line.partition("  ")
        if file == name:
            return digest
    return None
