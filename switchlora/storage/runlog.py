"""The log of a run: metrics.jsonl always, W&B when asked, and lines on the terminal."""

import fcntl
import json
import os
import shutil
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from switchlora.process import is_primary, together
from switchlora.storage.events import METRICS, as_record, plain_values, read_events
from switchlora.storage.progress import Progress
from switchlora.storage.wandb_log import WandbLog

SUMMARY = "summary.json"
CONFIG = "config.yaml"
POLL_SECONDS = 0.2


class FolderLock:
    """Lock a run folder for one run at a time; a context manager.

    The primary rank holds the lock. It tries for ``patience`` seconds. ValueError when another
    process then still has it.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        self._file: TextIO | None = None
        with together():
            if is_primary():
                self._file = _locked_within(folder, patience)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _locked_within(folder: Path, patience: float) -> TextIO:
    end = time.monotonic() + patience
    while True:
        file = locked(folder)
        if file is not None:
            return file
        if time.monotonic() >= end:
            raise ValueError(
                f"another process is running in {folder}; choose another hydra.run.dir"
            )
        time.sleep(POLL_SECONDS)


class RunLog:
    """The log of one run; a context manager that ends the W&B run with the right exit code.

    Every event is one line with a JSON object in ``metrics.jsonl``, the source of truth. It is
    also one W&B step with the same keys. Only the primary rank writes and talks.

    A resumed run passes ``position``: the value of ``RunLog.position`` in the checkpoint. Later
    lines are cut off, since their updates come again. ``source`` is the folder that the earlier
    lines are copied from (None: ``folder`` itself). ValueError when lines are missing there,
    FileDamaged when one holds no event.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        total_updates: int,
        wandb: Mapping[str, Any] | None = None,
        progress: bool = True,
        position: Mapping[str, Any] | None = None,
        source: Path | None = None,
    ) -> None:
        self.folder = folder
        self._talks = is_primary()
        self._wandb: WandbLog | None = None
        self._progress = Progress(total_updates, enabled=progress and self._talks)
        path = folder / METRICS if self._talks else Path(os.devnull)
        if self._talks:
            folder.mkdir(parents=True, exist_ok=True)
            _cut(path, (source or folder) / METRICS, position["bytes"] if position else 0)
        self._file = path.open("a", buffering=1)  # noqa: SIM115
        if self._talks and wandb:
            known = position["wandb_id"] if position and source in (None, folder) else None
            self._wandb = WandbLog(folder, config, wandb, known, self.line)
            for record in read_events(folder):
                self._wandb.log(record)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def position(self) -> dict[str, Any]:
        """Write the log to the disk; return its length in bytes and the id of the W&B run."""
        self._file.flush()
        if self._talks:
            os.fsync(self._file.fileno())
        wandb_id = None if self._wandb is None else self._wandb.id
        return {"bytes": self._file.tell(), "wandb_id": wandb_id}

    def event(self, event: str, num_updates: int, epoch: float, **metrics: Any) -> None:
        """Record one event with the keys 'event', 'num_updates', 'epoch' and those of ``metrics``.

        Values are numbers, strings, lists or mappings. A mapping of 'columns' and 'data' is a
        table.
        """
        if not self._talks:
            return
        record = as_record(event, num_updates, epoch, metrics)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.log(record)

    def line(self, text: str) -> None:
        """Print one line on the terminal, above the progress bar."""
        if self._talks:
            self._progress.write(text)

    def progress(self, num_updates: int, **postfix: str) -> None:
        """Show on the terminal that ``num_updates`` are done."""
        self._progress.show(num_updates, **postfix)

    def end_progress(self) -> None:
        """Close the progress bar; later lines are printed below it."""
        self._progress.close()

    def images(self, paths: list[Path]) -> None:
        """Send pictures to W&B, under ``figures/<name>``."""
        if self._wandb is not None:
            self._wandb.images(paths)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the values of the whole run to ``summary.json`` and to W&B's summary.

        The file is written whole or not at all.
        """
        if not self._talks:
            return
        plain = plain_values(values)
        text = json.dumps(plain, indent=2, allow_nan=False)
        part = self.folder / f".{SUMMARY}"
        with part.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / SUMMARY)
        if self._wandb is not None:
            self._wandb.summary(plain)


def locked(folder: Path) -> TextIO | None:
    """Make ``folder`` and lock it; return the lock's file, or None if another process has it.

    Closing the file releases the lock. The system also releases it when the process ends, however
    it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    held = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: _close(held()))  # workers may outlive a killed run
    return file


def _close(file: TextIO | None) -> None:
    if file is not None:
        file.close()


def _cut(path: Path, source: Path, size: int) -> None:
    """Make the log ``path`` of the first ``size`` bytes of ``source``, which may be itself."""
    if size and (not source.exists() or source.stat().st_size < size):
        raise ValueError(
            f"{source} is missing or shorter than the checkpoint knows it: {size:,} bytes"
        )
    if source != path and size:
        part = path.with_name(f".{path.name}")
        shutil.copyfile(source, part)
        os.truncate(part, size)
        part.replace(path)
    path.touch()
    os.truncate(path, size)
