"""Find the checkpoint to resume from; refuse to resume under another configuration."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from switchlora.config import Config, differences
from switchlora.errors import CheckpointUnusable
from switchlora.process import from_primary
from switchlora.storage import checkpoint, retention
from switchlora.storage.events import METRICS
from switchlora.storage.runlog import CONFIG, SUMMARY

AUTO = "auto"
SHOWN = 3


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


def find(resume: str | None, folder: Path, config: Config, model: nn.Module) -> Found | None:
    """Return the newest usable checkpoint, or None to start from the beginning.

    ``resume`` is one of:

    - None: start a new run in ``folder``.
    - 'auto': go on with the run in ``folder``, if there is one.
    - a path of a checkpoint or of a run folder elsewhere: branch off from it.

    ``model`` is the plain model that the configuration builds. ValueError when ``folder`` holds
    another run, when no checkpoint is usable, or when 'auto' meets a run of another
    configuration.
    """
    place = from_primary(lambda: _choose(resume, folder, config, model))
    if place is None:
        return None
    path, source, lines = place
    elsewhere = resume != AUTO
    return Found(path, source, lines, elsewhere, checkpoint.load(path), foreign=elsewhere)


def finished_summary(resume: str | None, folder: Path, config: Config) -> dict[str, Any] | None:
    """Return the summary of the run in ``folder`` if it is finished, else None.

    Only ``resume='auto'`` looks for one. ValueError when that run had another configuration.
    """
    return from_primary(lambda: _finished_summary(folder, config)) if resume == AUTO else None


def _finished_summary(folder: Path, config: Config) -> dict[str, Any] | None:
    path = folder / SUMMARY
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    if summary["status"] != "finished":
        return None
    _refuse_another(folder, OmegaConf.to_container(OmegaConf.load(folder / CONFIG)), config)
    return summary


def _refuse_another(folder: Path, old: Any, new: Config) -> None:
    if changed := differences(old, new):
        raise ValueError(
            f"{folder} holds a run with another configuration ({_some(changed)}); give the same, "
            f"or branch off in another folder with resume={folder}"
        )


def _choose(
    resume: str | None, folder: Path, config: Config, model: nn.Module
) -> tuple[Path, Path, list[str]] | None:
    begun = (folder / METRICS).exists()
    if resume is None:
        if begun:
            raise ValueError(
                f"{folder} already holds a run; go on with it by resume=auto, or choose another "
                "hydra.run.dir"
            )
        return None
    if resume == AUTO:
        candidates, source = retention.find_all(folder), folder
        if not candidates:
            return None
    else:
        candidates, source = _elsewhere(Path(resume))
        if begun and retention.find_all(folder):
            raise ValueError(
                f"{folder} already holds a run; resume=auto goes on with it from its newest "
                "checkpoint; to branch off from another one, choose another hydra.run.dir"
            )
    path, state, lines, unusable = _newest_usable(candidates, model)
    if resume == AUTO:
        _refuse_another(folder, state["config"], config)
        for left in unusable:
            retention.set_aside(left)
        return path, source, lines
    changed = differences(state["config"], config)
    if state["train"]["position"] and any(line.startswith("data.") for line in changed):
        raise ValueError(
            f"{path} is in the middle of an epoch of other data ({_some(changed)}): choose a "
            "checkpoint from the end of an epoch"
        )
    if changed:
        lines.append(f"branches off with {_some(changed)}")
    return path, source, lines


def _elsewhere(path: Path) -> tuple[list[Path], Path]:
    if (path / checkpoint.STATE).exists():
        candidates, source = [path], path.resolve().parent.parent
    else:
        candidates, source = retention.find_all(path), path
    if not candidates:
        raise ValueError(f"resume={path}: there is no checkpoint and no run folder with one")
    return candidates, source


def _newest_usable(
    candidates: list[Path], model: nn.Module
) -> tuple[Path, dict[str, Any], list[str], list[Path]]:
    reasons = []
    for number, path in enumerate(candidates):
        try:
            state = checkpoint.read(path)
            checkpoint.check_model(path, state, model)
        except CheckpointUnusable as error:
            reasons.append(str(error))
            continue
        lines = [f"{reason}; the one before it is used" for reason in reasons]
        return path, state, lines, candidates[:number]
    raise ValueError(f"no checkpoint can be used: {reasons[0]}")


def _some(changed: list[str]) -> str:
    rest = len(changed) - SHOWN
    return ", ".join(changed[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
