"""Read runs, finished or not, from their folders: configuration, events, summary."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from yaml import YAMLError

from switchlora.monitor import Measurement
from switchlora.storage.events import METRICS, measurement_of, read_events
from switchlora.storage.runlog import CONFIG, SUMMARY

TRUNK_KEY = "trunk.json"
"""file that marks a trunk: a folder that runs share, and that is no run itself"""


@dataclass(frozen=True)
class Record:
    """One run folder."""

    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    summary: Mapping[str, Any] | None = field(repr=False)
    """None for a run that still trains, or that was killed"""

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary is not None and self.summary["status"] == "finished"

    @property
    def result(self) -> Mapping[str, Any]:
        """The summary of a run that has ended."""
        assert self.summary is not None
        return self.summary

    def events(self, event: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the events in order: those named ``event``, or all.

        A torn last line is left out. ValueError when another line is damaged.
        """
        return read_events(self.folder, event)

    def history(self) -> list[Measurement]:
        """Return what the monitor measured, bit for bit what the criterion read."""
        return [measurement_of(event) for event in self.events("measure")]


def read_record(folder: Path) -> Record:
    """Return the run in ``folder``; ValueError when there is none."""
    if not is_run(folder):
        raise ValueError(f"{folder} holds no run: {CONFIG} or {METRICS} is missing")
    try:
        config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))
    except (YAMLError, OSError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read") from error
    summary = folder / SUMMARY
    return Record(folder, config, json.loads(summary.read_text()) if summary.exists() else None)


def check_alike(records: Sequence[Record], keys: Iterable[str], give: str) -> None:
    """Raise ValueError when two runs differ in one of the ``keys`` of their configurations.

    The message names the two runs and says what to ``give`` instead.
    """
    for record, key in product(records[1:], keys):
        if record.config[key] != records[0].config[key]:
            raise ValueError(
                f"{records[0].folder} and {record.folder} differ in '{key}': give {give}"
            )


def find_records(paths: Iterable[Path]) -> list[Record]:
    """Return the runs in ``paths``: run folders, or folders of run folders, such as a sweep's.

    Each run is returned once. Trunks inside a sweep are left out. ValueError names a path that
    holds no run.
    """
    found: dict[Path, Record] = {}
    for path in paths:
        inside = (p for p in path.glob("*") if is_run(p) and not (p / TRUNK_KEY).exists())
        folders = [path] if is_run(path) else sorted(inside)
        if not folders:
            raise ValueError(f"{path} is no run folder and holds none: give runs or a sweep")
        for folder in folders:
            found.setdefault(folder.resolve(), read_record(folder))
    return list(found.values())


def is_run(folder: Path) -> bool:
    """Return whether a run has begun in ``folder``."""
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()
