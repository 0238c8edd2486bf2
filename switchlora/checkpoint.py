"""Checkpoints: write them whole or not at all, check them, rebuild a run or a model from one.

A checkpoint is a folder ``checkpoints/update-00001092`` (``.1``, ``.2`` behind it for later ones
at the same update) with ``state.pt``, plain types and tensors for ``torch.load`` with
``weights_only=True``, and ``SHA256SUMS``, which ``sha256sum -c`` reads. Weights and moments of a
sharded model lie beside it in ``tensors/``, in the format of torch.distributed.checkpoint.
"""

import hashlib
import os
import random
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from switchlora import distributed
from switchlora.errors import CheckpointUnusable, check_range
from switchlora.learner import Learner
from switchlora.moments import load_moments, moments_of
from switchlora.sharding import is_sharded
from switchlora.surgery import inject_empty, plain_shapes

FORMAT = 4
FOLDER = "checkpoints"
STATE, SUMS, TENSORS = "state.pt", "SHA256SUMS", "tensors"
NAME = re.compile(r"update-(\d+)(?:\.(\d+))?")


def write(folder: Path, num_updates: int, state: Mapping[str, Any], learner: Learner) -> Path:
    """Write a checkpoint with ``state`` and the learner's tensors into a run folder; return it.

    It appears under its name when all of it is on the disk. All ranks call this; the primary one
    writes, and of a sharded model each rank its part. OSError when the disk does not take it.
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
            tensors = _write_sharded(part / TENSORS, tensors)
        except CheckpointException as error:  # no Exception, and many lines long
            shutil.rmtree(part, ignore_errors=True)
            reason = next(iter(error.failures.values()))[0]
            raise OSError(f"no checkpoint could be written to {part.parent}: {reason}") from error
    state = {"format": FORMAT, **state, **tensors}
    return distributed.from_primary(lambda: _finish_writing(part, state, num_updates))


def _finish_writing(part: Path, state: Mapping[str, Any], num_updates: int) -> Path:
    try:
        with (part / STATE).open("wb") as file:
            torch.save(state, file)
        files = sorted(path for path in part.rglob("*") if path.is_file())
        lines = [f"{_digest(path)}  {path.relative_to(part)}\n" for path in files]
        (part / SUMS).write_text("".join(lines))
        for path in (*files, part / SUMS, *{path.parent for path in files}):
            _sync(path)
        target = _free_name(part.parent, num_updates)
        part.rename(target)
        _sync(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save hides the system's error in its own
        shutil.rmtree(part, ignore_errors=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"no checkpoint could be written to {part.parent}: {reason}") from error
    return target


def read(path: Path) -> dict[str, Any]:
    """The state of a checkpoint; CheckpointUnusable, with the reason, when it is not whole."""
    try:
        lines = (path / SUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointUnusable(f"{path} is not whole: {SUMS} cannot be read") from error
    for name, expected in {STATE: "", **sums}.items():
        try:
            if _digest(path / name) != expected:
                raise CheckpointUnusable(f"{path} is damaged: {name} does not match its checksum")
        except OSError as error:
            raise CheckpointUnusable(f"{path} is not whole: {name} cannot be read") from error
    state = load(path, mmap=True)
    if state.get("format") != FORMAT:
        raise CheckpointUnusable(
            f"{path} has format {state.get('format')}, this version of switchlora reads {FORMAT}"
        )
    return state


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The state of a checkpoint that was read, and so checked, before.

    With ``mmap`` tensors are read from the file when they are looked at.
    """
    return torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=mmap)


def check_model(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """CheckpointUnusable unless the checkpoint's weights are those of the plain ``model``."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in shapes.keys() ^ state["shapes"].keys():
        where = "this model" if name in shapes else "the checkpoint"
        raise CheckpointUnusable(f"{path} is another model's: only {where} has {name}")
    for name, shape in shapes.items():
        if (other := tuple(state["shapes"][name])) != shape:
            raise CheckpointUnusable(
                f"{path} is another model's: {name} is {other} there and {shape} here"
            )


def load_model(path: Path) -> nn.Module:
    """The model of a checkpoint, with its adapters, from the checkpoint alone."""
    state = read(path)
    model: nn.Module = instantiate(state["config"]["model"], _convert_="all")
    inject_empty(model, state["adapters"])
    weights = state["weights"]
    if weights is None:
        weights, _ = _load_sharded(path / TENSORS, {}, model, only="weights")
    model.load_state_dict(weights)
    return model.eval()


def find_all(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first."""
    found = [path for path in (folder / FOLDER).glob("update-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_order, reverse=True)


def prune(folder: Path, keep: int, best_update: int | None) -> None:
    """Remove all checkpoints but the newest ``keep`` and the newest one at ``best_update``."""
    found = find_all(folder)
    best = [path for path in found if _order(path)[0] == best_update][:1]
    for path in found[keep:]:
        if path not in best:
            _remove(path)


def updates_of(path: Path) -> int:
    """Updates that were made when a checkpoint was written."""
    return _order(path)[0]


def thin(folder: Path, budget: float) -> None:
    """Remove checkpoints until they fit into ``budget`` bytes; the newest stays.

    Each time the one goes that leaves the smallest gap, so that those that stay lie evenly.
    """
    kept = find_all(folder)[::-1]
    sizes = {path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in kept}
    while len(kept) > 1 and sum(sizes[path] for path in kept) > budget:
        updates = [0, *map(updates_of, kept)]
        gaps = [after - before for before, after in zip(updates, updates[2:], strict=False)]
        _remove(kept.pop(gaps.index(min(gaps))))


def set_aside(path: Path) -> None:
    """Rename a checkpoint that cannot be used, so that it is not taken for one again."""
    name = f"unusable-{path.name}"
    while path.with_name(name).exists():
        name += "-again"
    path.rename(path.with_name(name))


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted write or removal left."""
    for path in (folder / FOLDER).glob(".*-*"):
        shutil.rmtree(path)


def load_tensors(
    path: Path, state: Mapping[str, Any], learner: Learner, branches: bool
) -> list[str]:
    """Give model, optimizer and scaler of ``learner`` the values of a checkpoint, in place.

    The adapters must be there already. The checkpoint may come from another number of processes,
    sharded or not. Returns lines on what could not be taken over by a run that ``branches`` off.
    """
    weights, moments = state["weights"], state["moments"]
    if weights is None:
        weights, moments = _load_sharded(path / TENSORS, moments, learner.model)
    with torch.no_grad():
        for name, tensor in learner.model.state_dict().items():
            tensor.copy_(distributed.like(weights[name], tensor))
    if learner.scaler is not None and state["scaler"]:
        learner.scaler.load_state_dict(state["scaler"])
    before, now = state["optimizer"], _kind(learner.optimizer)
    if before != now:
        return [f"moments start anew: the optimizer was {before}, it is {now}"]
    load_moments(learner.model, learner.optimizer, moments)
    if not branches:
        for group, saved in zip(learner.optimizer.param_groups, state["groups"], strict=True):
            group.update(saved)
    return []


@dataclass
class SaveSchedule:
    """When a checkpoint is due besides those at the ends of epochs and around the switch.

    ``keep`` is how many of the newest stay, besides the best; 0 writes none at all.
    """

    every_updates: int | None
    every_minutes: float | None
    keep: int
    saved_at: int = 0
    """updates made at the last save"""

    def __post_init__(self) -> None:
        for name, least in {"every_updates": 1, "every_minutes": 0, "keep": 0}.items():
            value = getattr(self, name)
            if value is not None:
                check_range(f"checkpoint.{name}", value, least)
        self._clock = time.monotonic()

    def due(self, num_updates: int) -> bool:
        """Whether it is time for one."""
        minutes = (time.monotonic() - self._clock) / 60
        by_updates = self.every_updates and num_updates - self.saved_at >= self.every_updates
        by_time = self.every_minutes is not None and minutes >= self.every_minutes
        return bool(self.keep and (by_updates or by_time))

    def done(self, num_updates: int) -> None:
        """One was written."""
        self.saved_at, self._clock = num_updates, time.monotonic()


def learner_state(learner: Learner) -> dict[str, Any]:
    """What of a learner is no large tensor: loss scale, values in groups, names, shapes."""
    return {
        "optimizer": _kind(learner.optimizer),
        "scaler": learner.scaler.state_dict() if learner.scaler else None,
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in learner.optimizer.param_groups
        ],
        "shapes": plain_shapes(learner.model),
        "trained": [name for name, p in learner.model.named_parameters() if p.requires_grad],
    }


def _kind(optimizer: Optimizer) -> str:
    options = [key for key in ("amsgrad", "momentum") if optimizer.defaults.get(key)]
    return " with ".join([type(optimizer).__name__, *options])


def random_states() -> dict[str, Any]:
    """The states of random, numpy and torch, as plain types and tensors."""
    numpy_state: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [numpy_state[0], [int(key) for key in numpy_state[1]], *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the generators back to ``random_states``."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _write_sharded(folder: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Write all tensors with torch.distributed.checkpoint; return the values that are none."""
    flat = {f"weights/{name}": tensor for name, tensor in tensors["weights"].items()}
    plain: dict[str, dict[str, Any]] = {}
    for name, state in tensors["moments"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                flat[f"moments/{name}/{key}"] = value
            else:
                plain.setdefault(name, {})[key] = value
    dcp.save(flat, checkpoint_id=folder)
    return {"weights": None, "moments": plain}


def _load_sharded(
    folder: Path, plain: Mapping[str, Mapping[str, Any]], model: nn.Module, only: str = ""
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Weights and moments (``only`` one of them), each rank its part of a sharded ``model``."""
    reader = dcp.FileSystemReader(folder)
    parameters = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        if not key.startswith(only):
            continue
        assert isinstance(saved, TensorStorageMetadata)
        parameter = parameters[key.split("/")[1]]
        whole = tuple(saved.size) == tuple(parameter.shape)
        tensors[key] = (
            torch.zeros_like(parameter)
            if whole
            else torch.zeros(saved.size, dtype=saved.properties.dtype)
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader)
    weights: dict[str, Tensor] = {}
    moments = {name: dict(values) for name, values in plain.items()}
    for key, tensor in tensors.items():
        kind, name, *what = key.split("/")
        if kind == "weights":
            weights[name] = tensor
        else:
            moments.setdefault(name, {})[what[0]] = tensor
    return weights, moments


def _remove(path: Path) -> None:
    unfinished = path.with_name(f".removing-{path.name}")
    path.rename(unfinished)
    shutil.rmtree(unfinished)


def _free_name(place: Path, num_updates: int) -> Path:
    name = f"update-{num_updates:08d}"
    taken = [_order(path)[1] for path in place.glob(f"{name}*")]
    return place / (f"{name}.{max(taken) + 1}" if taken else name)


def _order(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
