"""Read runs, finished or not, from their folders: configuration, events, summary."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchlora.errors import ODD
from switchlora.monitor import Measurement
from switchlora.storage.events import METRICS, read_events, read_history
from switchlora.storage.reading import FileDamaged, content_of, parse_json, parse_yaml
from switchlora.storage.runlog import CONFIG, SUMMARY

TRUNK_KEY = "trunk.json"
"""file that marks a trunk: a folder that runs share, and that is no run itself"""
NEEDED: dict[str, type] = {"status": str, "val": dict, "phases": dict}
"""keys that every summary has, with the types of their values"""


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

        A torn last line is left out. FileDamaged when another line is damaged.
        """
        return read_events(self.folder, event)

    def history(self) -> list[Measurement]:
        """Return what the monitor measured, bit for bit what the criterion read.

        FileDamaged when a line is damaged, or lacks a number.
        """
        return read_history(self.folder)


def read_record(folder: Path | str) -> Record:
    """Return the run in ``folder``; its log is read later, when it is asked for.

    ValueError when there is no run. FileDamaged when configuration or summary cannot be read.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise ValueError(f"{folder} holds no run: {CONFIG} or {METRICS} is missing")
    return Record(folder, read_config(folder), read_summary(folder))


def read_summary(folder: Path | str) -> dict[str, Any] | None:
    """Return the summary of the run in ``folder``, None if it has none yet.

    FileDamaged when the file holds no summary.
    """
    folder = Path(folder)
    path = folder / SUMMARY
    if not path.exists():
        return None
    summary = parse_json(content_of(path), path)
    for key, kind in NEEDED.items():
        if key not in summary:
            raise FileDamaged(f"{path} is damaged: it has no '{key}'")
        if not isinstance(summary[key], kind):
            raise FileDamaged(f"{path} is damaged: its '{key}' is {str(summary[key])[:20]!r}")
    return summary


def read_config(folder: Path | str) -> dict[str, Any]:
    """Return the configuration of the run in ``folder``; FileDamaged when it cannot be read."""
    folder = Path(folder)
    path = folder / CONFIG
    return parse_yaml(content_of(path), path)


def check_alike(records: Sequence[Record], keys: Sequence[str], give: str) -> None:
    """Raise ValueError when two runs differ in one of the ``keys`` of their configurations.

    The message names the two runs and says what to ``give`` instead.
    """
    for record in records[1:]:
        for key in keys:
            if record.config.get(key) != records[0].config.get(key):
                raise ValueError(
                    f"{records[0].folder} and {record.folder} differ in '{key}': give {give}"
                )


def warn(line: str) -> None:
    """Print a line on standard error, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def find_records(
    paths: Iterable[Path | str],
    say: Callable[[str], None] | None = None,
    attempt: Callable[[Record], object] | None = None,
) -> list[Record]:
    """Return the runs in ``paths``: run folders, or folders of run folders, such as a sweep's.

    Each run is returned once. Trunks inside a sweep are left out. ValueError names a path that
    holds no run.

    FileDamaged when the configuration or the summary of a run cannot be read. With ``say`` such a
    run is left out, and so is one whose log is damaged: ``say`` gets a line that names the file.
    ``attempt`` does with each run alone what is to be done with all: one that it fails on, since
    something odd stands in its files, is left out too. ValueError when every run is left out.
    """
    found: dict[Path, Record] = {}
    for path in map(Path, paths):
        for folder in _run_folders(path):
            try:
                record = read_record(folder)
                if say is not None:
                    _check_content(record, attempt)
            except FileDamaged as error:
                if say is None:
                    raise
                say(f"left out: {error}")
                continue
            found.setdefault(folder.resolve(), record)
    if not found:
        raise ValueError("every run was left out")
    return list(found.values())


def is_run(folder: Path | str) -> bool:
    """Return whether a run has begun in ``folder``."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()


def _run_folders(path: Path) -> list[Path]:
    """Return the run folders that ``path`` stands for; ValueError when there are none."""
    if is_run(path):
        return [path]
    folders = []
    for inside in sorted(path.glob("*")):
        if is_run(inside) and not (inside / TRUNK_KEY).exists():
            folders.append(inside)
    if not folders:
        raise ValueError(f"{path} is no run folder and holds none: give runs or a sweep")
    return folders


def _check_content(record: Record, attempt: Callable[[Record], object] | None) -> None:
    """Raise FileDamaged for a damaged log, or when ``attempt`` fails on what a file holds."""
    for _ in record.events():
        pass
    if attempt is None:
        return
    try:
        attempt(record)
    except FileDamaged:
        raise
    except ODD as error:
        reason = f"{type(error).__name__}: {error}"
        raise FileDamaged(f"{record.folder} holds something odd ({reason})") from error
    except ValueError:
        return  # it is told, with its own words, when it comes to all runs
