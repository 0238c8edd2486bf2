"""Find the checkpoint to resume from; refuse to resume under another configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from switchlora.config import Config, differences
from switchlora.errors import CheckpointUnusable
from switchlora.names import some
from switchlora.process import from_primary
from switchlora.storage import checkpoint, retention
from switchlora.storage.events import METRICS
from switchlora.storage.reading import FileDamaged
from switchlora.storage.records import read_config, read_summary
from switchlora.storage.runlog import SUMMARY

Check = Callable[[Mapping[str, Any]], None]
"""raise an error for a state that the caller cannot restore"""
AUTO = "auto"
SHOWN = 3
Usable = Callable[[list[Path]], tuple[Path, dict[str, Any], list[str]]]
"""the first usable one of some checkpoints, its state, and a line for each one before it"""


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from."""

    path: Path
    source: Path
    """the run folder of the checkpoint; its metrics.jsonl is continued"""
    lines: list[str]
    """lines for the user: which checkpoints could not be used, and what a branch changes"""
    branches: bool
    """whether a new run branches off here, in another folder"""
    state: dict[str, Any] = field(repr=False)
    foreign: bool = False
    """whether the checkpoint is from another run, or from a trunk"""


def find(
    resume: str | None,
    folder: Path,
    config: Config,
    model: nn.Module,
    data: Callable[[], str],
    check: Check | None = None,
) -> Found | None:
    """Return the newest usable checkpoint, or None to start from the beginning.

    ``resume`` is one of:

    - None: start a new run in ``folder``.
    - 'auto': go on with the run in ``folder``, if there is one.
    - a path of a checkpoint or of a run folder elsewhere: branch off from it.

    ``model`` is the plain model that the configuration builds, and ``data()`` the digest of the
    data. A checkpoint that is damaged, or whose content fails ``check``, is left for the one
    before it. ValueError when ``folder`` holds another run, when no checkpoint is usable, or when
    'auto' meets a run of another configuration or of other data.
    """
    usable = partial(_newest_usable, model=model, check=check)
    place = from_primary(lambda: _choose(resume, folder, config, usable, data))
    if place is None:
        return None
    path, source, lines = place
    elsewhere = resume != AUTO
    return Found(path, source, lines, elsewhere, checkpoint.load(path), foreign=elsewhere)


def finished_summary(resume: str | None, folder: Path, config: Config) -> dict[str, Any] | None:
    """Return the summary of the run in ``folder`` if it is finished, else None.

    Only ``resume='auto'`` looks for one. ValueError when that run had another configuration, or
    when its files cannot be read.
    """
    if resume != AUTO:
        return None
    return from_primary(lambda: _finished_summary(folder, config))


def _finished_summary(folder: Path, config: Config) -> dict[str, Any] | None:
    try:
        summary = read_summary(folder)
    except FileDamaged as error:
        raise FileDamaged(f"{error}; without this file the last checkpoint is used") from error
    if summary is None or summary["status"] != "finished":
        return None
    try:
        before = read_config(folder)
    except FileDamaged as error:
        raise FileDamaged(f"{error}; without {SUMMARY} the last checkpoint is used") from error
    _refuse_another(folder, before, config)
    return summary


def _refuse_another(folder: Path, old: Config, new: Config) -> None:
    changed = differences(old, new)
    if changed:
        raise ValueError(
            f"{folder} holds a run with another configuration ({some(changed, SHOWN)}); give the "
            f"same, or branch off in another folder with resume={folder}"
        )


def _choose(
    resume: str | None,
    folder: Path,
    config: Config,
    usable: Usable,
    data: Callable[[], str],
) -> tuple[Path, Path, list[str]] | None:
    """Return a checkpoint, the run folder that it is from, and lines for the user; or None."""
    if resume is not None:
        if resume == AUTO:
            return _go_on(folder, config, usable, data)
        return _branch_off(Path(resume), folder, config, usable, data)
    if (folder / METRICS).exists():
        raise ValueError(
            f"{folder} already holds a run; go on with it by resume=auto, or choose another "
            "hydra.run.dir"
        )
    return None


def _go_on(
    folder: Path, config: Config, usable: Usable, data: Callable[[], str]
) -> tuple[Path, Path, list[str]] | None:
    candidates = retention.find_all(folder)
    if not candidates:
        return None
    path, state, lines = usable(candidates)
    _refuse_another(folder, state["config"], config)
    if _has_other_data(state, data):
        raise ValueError(
            f"the data (data.root, data.path) have changed since {path} was written "
            f"({_digests(state, data)}): bring back "
            f"what was there, or branch off in another folder with resume={folder}"
        )
    unusable = candidates[: candidates.index(path)]
    for left in unusable:
        retention.set_aside(left)
    return path, folder, lines


def _branch_off(
    place: Path, folder: Path, config: Config, usable: Usable, data: Callable[[], str]
) -> tuple[Path, Path, list[str]]:
    candidates, source = _elsewhere(place)
    if (folder / METRICS).exists() and retention.find_all(folder):
        raise ValueError(
            f"{folder} already holds a run; resume=auto goes on with it from its newest "
            "checkpoint; to branch off from another one, choose another hydra.run.dir"
        )
    path, state, lines = usable(candidates)
    changed = differences(state["config"], config)
    other_data = any(line.startswith("data.") for line in changed)
    if not other_data and _has_other_data(state, data):
        other_data = True
        changed.append(f"data whose content has changed ({_digests(state, data)})")
    if other_data and state["train"]["position"]:
        raise ValueError(
            f"{path} is in the middle of an epoch of other data ({some(changed, SHOWN)}): choose "
            "a checkpoint from the end of an epoch"
        )
    if changed:
        lines.append(f"branches off with {some(changed, SHOWN)}")
    return path, source, lines


def _has_other_data(state: dict[str, Any], data: Callable[[], str]) -> bool:
    """Return whether the digest of the data is not that of a checkpoint that has one."""
    return state.get("data") not in (None, data())


def _digests(state: dict[str, Any], data: Callable[[], str]) -> str:
    return f"digest {state['data'][:12]} then, {data()[:12]} now"


def _elsewhere(place: Path) -> tuple[list[Path], Path]:
    """Return the checkpoints that ``place`` stands for, and the run folder that they are from."""
    if (place / checkpoint.STATE).exists():
        return [place], place.resolve().parent.parent
    candidates = retention.find_all(place)
    if not candidates:
        raise ValueError(f"resume={place}: there is no checkpoint and no run folder with one")
    return candidates, place


def _newest_usable(
    candidates: list[Path], model: nn.Module, check: Check | None
) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the first usable checkpoint, its state, and a line for each one before it."""
    reasons = []
    for path in candidates:
        try:
            state = checkpoint.read(path)
            checkpoint.check_model(path, state, model)
            if check is not None:
                with checkpoint.content_checked(path):
                    check(state)
        except CheckpointUnusable as error:
            reasons.append(str(error))
            continue
        lines = [f"{reason}; the one before it is used" for reason in reasons]
        return path, state, lines
    raise ValueError(f"no checkpoint can be used: {reasons[0]}")
