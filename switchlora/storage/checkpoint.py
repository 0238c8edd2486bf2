"""Checkpoints: write them whole or not at all, check them, rebuild a run or a model from one.

A checkpoint is a folder ``checkpoints/update-00001092``. Later checkpoints at the same update end
in ``.1``, ``.2`` and so on. It holds:

- ``state.pt``: plain types and tensors, for ``torch.load`` with ``weights_only=True``.
- ``SHA256SUMS``: checksums that ``sha256sum -c`` reads.
- ``frozen-<hash>.pt``: weights that no longer change, if they are most: one file with those of
  other checkpoints, by a link.
- ``tensors/``: weights and moments of a sharded model, in the format of
  torch.distributed.checkpoint.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from hydra.errors import InstantiationException
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from switchlora.adapters import inject_empty
from switchlora.config import build, check_saved, without_start
from switchlora.errors import CheckpointUnusable
from switchlora.learner import Learner, is_sharded, moments_of, skeleton
from switchlora.process import distributed, why_unlocated
from switchlora.storage import frozen
from switchlora.storage.background import Background, staged
from switchlora.storage.files import is_regular, sha256_of, sync
from switchlora.storage.retention import (
    FOLDER,
    find_all,
    free_name,
    name_of,
    remove_unfinished,
    updates_of,
)
from switchlora.storage.tensors import (
    TENSORS,
    PlainReader,
    check_moments,
    check_weights,
    load_sharded,
    write_sharded,
)

FORMAT = 8
"""of a checkpoint with frozen weights in a file of their own"""
IN_ONE_FILE = 7
"""of any other"""
STATE, SUMS = "state.pt", "SHA256SUMS"
CONTENT: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("config", "train", "adapters", "monitor", "stopwatch", "log"), dict),
    **dict.fromkeys(("shapes", "moments"), dict),
    **dict.fromkeys(("ema", "weights", "scaler"), (dict, type(None))),
    **dict.fromkeys(("random", "groups", "trained"), list),
    "optimizer": str,
    "start": int,
}
"""by key of a state, the type of its value"""
PARTS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "monitor": {
        **dict.fromkeys(("references", "initial_stable_ranks", "vectors"), dict),
        **dict.fromkeys(("window", "window_start"), int),
        "losses": list,
        "decay": (float, int),
    },
    "stopwatch": {
        **dict.fromkeys(("phase_seconds", "monitor_seconds", "train_seconds"), (float, int)),
        **dict.fromkeys(("num_updates", "peak"), int),
        "laps": list,
    },
    "log": {"bytes": int, "wandb_id": (str, type(None))},
}
"""the same for those of its parts that have keys of their own"""
LONGEST = 200
"""characters of another library's message that are told"""
WRONG = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, InstantiationException),
)
"""what code raises that is given something else than it expects"""


def write(
    folder: Path,
    num_updates: int,
    state: Mapping[str, Any],
    learner: Learner,
    background: Background | None = None,
    then: Callable[[], object] = lambda: None,
) -> None:
    """Write a checkpoint of ``state`` and the learner's tensors into a run folder.

    The checkpoint appears under its name only when all of it is on the disk. The primary rank then
    calls ``then()``. All ranks must call this. The primary rank writes, in a thread of
    ``background`` if given; of a sharded model each rank writes its part, and none in a thread.
    OSError when it cannot be written; a thread's error comes out of ``background``.
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
        background = None
    content = {**state, **tensors}
    parameters = learner.model.named_parameters()
    frozen_names = {name for name, parameter in parameters if not parameter.requires_grad}

    def finish(content: Mapping[str, Any]) -> None:
        _finish_writing(part, content, frozen_names, num_updates)
        then()

    if background is None:
        distributed.from_primary(lambda: finish(content))
    elif distributed.is_primary():
        background.start(partial(finish, staged(content)))


def _finish_writing(
    part: Path, content: Mapping[str, Any], frozen_names: Collection[str], num_updates: int
) -> None:
    try:
        sums = _write_state(part, content, frozen_names)
        for path in filter(Path.is_file, part.rglob("*")):
            name = str(path.relative_to(part))
            sums[name] = sums.get(name) or sha256_of(path)
        _write_sums(part, sums)
        files = [part / name for name in sums]
        folders = {path.parent for path in files}
        for path in (*files, part / SUMS, *folders):
            sync(path)
        target = free_name(part.parent, name_of(num_updates))
        part.rename(target)
        sync(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save hides the system's error in its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise _given_up(part, reason) from error


def _write_state(
    part: Path, content: Mapping[str, Any], frozen_names: Collection[str]
) -> dict[str, str]:
    """Write the state, and frozen weights beside it if they are most; return the checksums."""
    weights, apart = frozen.split(content["weights"] or {}, frozen_names)
    if not apart:
        state = {"format": IN_ONE_FILE, **content}
        return {STATE: frozen.save_hashed(state, part / STATE)}
    name, digest = frozen.write(apart, part, find_all(part.parent.parent))
    state = {"format": FORMAT, **content, "weights": weights, "frozen": name}
    return {STATE: frozen.save_hashed(state, part / STATE), name: digest}


def _given_up(part: Path, reason: object) -> OSError:
    """Remove what is written of a checkpoint; return the error that gives the reason."""
    shutil.rmtree(part, ignore_errors=True)
    return OSError(f"no checkpoint could be written to {part.parent}: {reason}")


def _write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    with (folder / SUMS).open("w") as file:
        for name in sorted(sums):
            file.write(f"{sums[name]}  {name}\n")


def read(path: Path | str) -> dict[str, Any]:
    """Check a checkpoint against its checksums and return its state.

    CheckpointUnusable, with the reason, when it is not whole, damaged or of another format, or
    when it holds something else than a state.
    """
    path = Path(path)
    _check_sums(path)
    with content_checked(path):
        state = load(path, mmap=True)
    if not isinstance(state, dict):
        raise CheckpointUnusable(f"{path} holds a {type(state).__name__}: it is no checkpoint")
    version = state.get("format")
    if not isinstance(version, int) or version not in (IN_ONE_FILE, FORMAT):
        told = " ".join(str(version).split())[:LONGEST]
        raise CheckpointUnusable(
            f"{path} has format {told}, this version of switchlora reads {IN_ONE_FILE} and "
            f"{FORMAT}"
        )
    _check_types(path, state, CONTENT)
    for part, kinds in PARTS.items():
        _check_types(path, state[part], kinds)
    return state


def _check_types(
    path: Path, content: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]
) -> None:
    for key, kind in kinds.items():
        if not isinstance(content.get(key, ...), kind):
            raise CheckpointUnusable(f"{path} has wrong content: '{key}' is missing or no {key}")


@contextmanager
def content_checked(path: Path, told: type[Exception] = CheckpointUnusable) -> Iterator[None]:
    """Raise CheckpointUnusable for any error that the content of a checkpoint causes inside.

    Errors of the kind ``told`` have a line of their own already: they pass.
    """
    try:
        yield
    except told:
        raise
    except (*WRONG, UnpicklingError) as error:
        if (why := why_unlocated(error)) is not None:
            raise CheckpointUnusable(f"{path}: {why}") from error
        words = " ".join(str(error).split())[:LONGEST]
        reason = f"{type(error).__name__}: {words}"
        raise CheckpointUnusable(f"{path} has wrong content: {reason}") from error


def _check_sums(path: Path) -> None:
    sums = _read_sums(path)
    for file in (*path.glob(f"{TENSORS}/*.distcp"), *path.glob("frozen-*.pt")):
        sums.setdefault(str(file.relative_to(path)), "")
    for name, expected in sums.items():
        file = path / name
        if path.resolve() not in file.resolve().parents:
            raise CheckpointUnusable(f"{path} is damaged: {SUMS} names {name}, outside of it")
        if not is_regular(file):
            why = "is no plain file" if file.is_symlink() or file.exists() else "cannot be read"
            raise CheckpointUnusable(f"{path} is not whole: {name} {why}")
        try:
            found = sha256_of(file)
        except OSError as error:
            raise CheckpointUnusable(f"{path} is not whole: {name} cannot be read") from error
        if found != expected:
            raise CheckpointUnusable(f"{path} is damaged: {name} does not match its checksum")


def _read_sums(path: Path) -> dict[str, str]:
    """Return the checksum of each file of a checkpoint; an empty one if ``STATE`` has none."""
    sums = {STATE: ""}
    try:
        if not is_regular(path / SUMS):
            raise FileNotFoundError
        for line in (path / SUMS).read_text().splitlines():
            digest, name = line.split("  ", 1)
            sums[name] = digest
    except (OSError, ValueError) as error:
        raise CheckpointUnusable(f"{path} is not whole: {SUMS} cannot be read") from error
    return sums


def load(path: Path | str, mmap: bool = False) -> dict[str, Any]:
    """Return the state of a checkpoint without checking it: ``read`` must have done that before.

    With ``mmap`` tensors are read from the file on first use.
    """
    path = Path(path)
    state = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=mmap)
    return frozen.read(state, path, mmap) if isinstance(state, dict) else state


def check_model(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """Raise CheckpointUnusable unless names and shapes are those of the plain ``model``.

    What the checkpoint holds is tried on a copy of the model that has no values.
    """
    with content_checked(path):
        _check_shapes(path, state["shapes"], model)
        _check_content(path, state, model)


def _check_shapes(path: Path, shapes: Mapping[str, Any], model: nn.Module) -> None:
    tensors = model.state_dict()
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


def _check_content(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """Raise whatever the content of a state makes our own code raise, if it is not right."""
    num_updates, named = state["train"]["num_updates"], updates_of(path)
    if named >= 0 and num_updates != named:
        raise ValueError(f"it is of update {num_updates}")
    if not 0 <= state["start"] <= num_updates:
        raise ValueError(f"its phase began at update {state['start']}")
    if state["log"]["bytes"] < 0 or state["monitor"]["window"] < 1:
        raise ValueError("its log or its window has no length")
    empty = skeleton(model, keep_buffers=False)
    if state["ema"] is not None:
        check_weights(empty, state["ema"])
    inject_empty(empty, state["adapters"])
    if state["weights"] is None:
        PlainReader(path / TENSORS).read_metadata()
    else:
        check_weights(empty, state["weights"])
    check_moments(empty, state["moments"])
    unknown = set(state["trained"]) - set(dict(empty.named_parameters()))
    if unknown:
        raise KeyError(f"trained {unknown.pop()}")


def load_model(path: Path | str, allow: Collection[str] = ()) -> nn.Module:
    """Rebuild the model with its adapters from the checkpoint alone; it is in eval mode.

    The checkpoint says what to build. CheckpointUnusable for a class or function that is no part
    of this program, unless ``allow`` has its name, such as 'my_models.Perceptron': it would run.
    """
    path = Path(path)
    if checkpoints := find_all(path):
        newest = checkpoints[0]
        raise CheckpointUnusable(f"{path} is the folder of a run: give a checkpoint, as {newest}")
    if not path.is_dir():
        raise CheckpointUnusable(f"{path} is no folder: give a checkpoint of a run")
    return rebuild(path, read(path), allow)


def rebuild(path: Path, state: Mapping[str, Any], allow: Collection[str] = ()) -> nn.Module:
    """Do what ``load_model`` does with the state that ``read`` returned."""
    with content_checked(path):
        config = without_start(state["config"]["model"])
    try:
        check_saved(config, f"{path}: model", allow)
    except ValueError as error:
        raise CheckpointUnusable(str(error)) from error
    with content_checked(path):
        model: nn.Module = build(config)
        inject_empty(model, state["adapters"])
        weights = state["weights"]
        if weights is None:
            weights, _ = load_sharded(path / TENSORS, {}, model, only="weights")
        model.load_state_dict(weights)
    return model.eval()
