"""Checkpoints: write them whole or not at all, check them, rebuild a run or a model from one.

A checkpoint is a folder ``checkpoints/update-00001092``. Later checkpoints at the same update end
in ``.1``, ``.2`` and so on. It holds:

- ``state.pt``: plain types and tensors, for ``torch.load`` with ``weights_only=True``.
- ``SHA256SUMS``: checksums that ``sha256sum -c`` reads.
- ``tensors/``: weights and moments of a sharded model, in the format of
  torch.distributed.checkpoint.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from switchlora.adapters import inject_empty
from switchlora.errors import CheckpointUnusable
from switchlora.learner import Learner, is_sharded, moments_of
from switchlora.process import distributed
from switchlora.storage.retention import FOLDER, free_name, name_of, remove_unfinished
from switchlora.storage.tensors import TENSORS, load_sharded, write_sharded

FORMAT = 5
STATE, SUMS = "state.pt", "SHA256SUMS"


def write(folder: Path, num_updates: int, state: Mapping[str, Any], learner: Learner) -> Path:
    """Write a checkpoint of ``state`` and the learner's tensors into a run folder; return it.

    The checkpoint appears under its name only when all of it is on the disk. All ranks must call
    this. The primary rank writes; of a sharded model each rank writes its part. OSError when it
    cannot be written.
    """
    part = folder / FOLDER / f".writing-{num_updates:08d}"
    with distributed.together():
        if distributed.is_primary():
            if not folder.is_dir():
                raise FileNotFoundError(f"the run folder {folder} is gone: nothing can be saved")
            part.parent.mkdir(exist_ok=True)
            remove_unfinished(folder)
            part.mkdir()
    tensors: dict[str, Any] = {
        "weights": learner.model.state_dict(),
        "moments": moments_of(learner.model, learner.optimizer),
    }
    if is_sharded(learner.model):
        try:
            tensors = write_sharded(part / TENSORS, tensors)
        except CheckpointException as error:  # no Exception, and many lines long
            reason, _ = next(iter(error.failures.values()))
            raise _given_up(part, reason) from error
    state = {"format": FORMAT, **state, **tensors}
    return distributed.from_primary(lambda: _finish_writing(part, state, num_updates))


def _finish_writing(part: Path, state: Mapping[str, Any], num_updates: int) -> Path:
    try:
        with (part / STATE).open("wb") as file:
            torch.save(state, file)
        files = sorted(filter(Path.is_file, part.rglob("*")))
        _write_sums(part, files)
        folders = {path.parent for path in files}
        for path in (*files, part / SUMS, *folders):
            _sync(path)
        target = free_name(part.parent, name_of(num_updates))
        part.rename(target)
        _sync(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save hides the system's error in its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise _given_up(part, reason) from error
    return target


def _given_up(part: Path, reason: object) -> OSError:
    """Remove what is written of a checkpoint; return the error that gives the reason."""
    shutil.rmtree(part, ignore_errors=True)
    return OSError(f"no checkpoint could be written to {part.parent}: {reason}")


def _write_sums(folder: Path, files: Sequence[Path]) -> None:
    with (folder / SUMS).open("w") as sums:
        for path in files:
            sums.write(f"{_digest(path)}  {path.relative_to(folder)}\n")


def read(path: Path) -> dict[str, Any]:
    """Check a checkpoint against its checksums and return its state.

    CheckpointUnusable, with the reason, when it is not whole, damaged or of another format.
    """
    for name, expected in _read_sums(path).items():
        try:
            found = _digest(path / name)
        except OSError as error:
            raise CheckpointUnusable(f"{path} is not whole: {name} cannot be read") from error
        if found != expected:
            raise CheckpointUnusable(f"{path} is damaged: {name} does not match its checksum")
    state = load(path, mmap=True)
    if state.get("format") != FORMAT:
        raise CheckpointUnusable(
            f"{path} has format {state.get('format')}, this version of switchlora reads {FORMAT}"
        )
    return state


def _read_sums(path: Path) -> dict[str, str]:
    """Return the checksum of each file of a checkpoint; an empty one if ``STATE`` has none."""
    sums = {STATE: ""}
    try:
        for line in (path / SUMS).read_text().splitlines():
            digest, name = line.split("  ", 1)
            sums[name] = digest
    except (OSError, ValueError) as error:
        raise CheckpointUnusable(f"{path} is not whole: {SUMS} cannot be read") from error
    return sums


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Return the state of a checkpoint without checking it: ``read`` must have done that before.

    With ``mmap`` tensors are read from the file on first use.
    """
    return torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=mmap)


def check_model(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """Raise CheckpointUnusable unless names and shapes are those of the plain ``model``."""
    tensors = model.state_dict()
    shapes = state["shapes"]
    for name in tensors.keys() ^ shapes.keys():
        where = "this model" if name in tensors else "the checkpoint"
        raise CheckpointUnusable(f"{path} is another model's: only {where} has {name}")
    for name, tensor in tensors.items():
        there = tuple(shapes[name])
        here = tuple(tensor.shape)
        if there != here:
            raise CheckpointUnusable(
                f"{path} is another model's: {name} is {there} there and {here} here"
            )


def load_model(path: Path) -> nn.Module:
    """Rebuild the model with its adapters from the checkpoint alone; it is in eval mode."""
    state = read(path)
    model: nn.Module = instantiate(state["config"]["model"], _convert_="all")
    inject_empty(model, state["adapters"])
    weights = state["weights"]
    if weights is None:
        weights, _ = load_sharded(path / TENSORS, {}, model, only="weights")
    model.load_state_dict(weights)
    return model.eval()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
