"""The log of a run: metrics.jsonl always, sinks when asked, and lines on the terminal."""

import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from switchlora.names import some
from switchlora.process import is_primary, together
from switchlora.storage.events import METRICS, as_record, mended, plain_values
from switchlora.storage.files import open_here, write_whole
from switchlora.storage.progress import Progress
from switchlora.storage.retention import free_name
from switchlora.storage.sinks import Patient, RunInfo, Sink
from switchlora.storage.wandb_log import WandbLog

SUMMARY = "summary.json"
CONFIG = "config.yaml"
POLL_SECONDS = 0.2
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
"""errors of a file system without locks"""


class NoLocks(OSError):
    """A file system offers no locks, such as Lustre as it is often mounted."""


class FolderLock:
    """Lock a run folder for one run at a time; a context manager.

    The primary rank holds the lock. It tries for ``patience`` seconds. ValueError when another
    process then still has it. On a file system without locks a line says so, and the run goes on.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        self._file: TextIO | None = None
        with together():
            if is_primary():
                try:
                    self._file = _locked_within(folder, patience)
                except NoLocks as error:
                    print(f"{error}: take care that no second run is started in it", flush=True)

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
    """The log of one run; a context manager that tells the sinks how the run ended.

    Every event is one line with a JSON object in ``metrics.jsonl``, the source of truth. Each of
    ``sinks``, by name, gets the same events. Only the primary rank writes and talks. ``words`` are
    what tells the run from others.

    A resumed run passes ``position``: the value of ``RunLog.position`` in the checkpoint. Later
    lines are cut off, since their updates come again. ``source`` is the folder that the earlier
    lines are copied from (None: ``folder`` itself). ValueError when lines are missing there.

    The run itself needs no line of its log. So a damaged one does not hold it up: it is left out
    and told, and the damaged file is kept beside the log.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        total_updates: int,
        sinks: Mapping[str, Sink] | None = None,
        words: Sequence[str] = (),
        progress: bool = True,
        position: Mapping[str, Any] | None = None,
        source: Path | None = None,
    ) -> None:
        self.folder = folder
        self._talks = is_primary()
        self._sinks: list[Patient] = []
        self._wandb: WandbLog | None = None
        self._progress = Progress(total_updates, enabled=progress and self._talks)
        path = folder / METRICS if self._talks else Path(os.devnull)
        told: list[str] = []
        if self._talks:
            folder.mkdir(parents=True, exist_ok=True)
            told = _begin(path, (source or folder) / METRICS, position)
        self._digest = hashlib.sha256(path.read_bytes())
        self._file = path.open("a", buffering=1)  # noqa: SIM115
        if self._talks:
            goes_on = position is not None and source in (None, folder)
            about = RunInfo(folder, config, words, goes_on, self.line)
            self._start(sinks or {}, about)
        for line in told:
            self.line(line)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.close()
        self._file.close()
        for sink in self._sinks:
            sink.finish(kind)

    def _start(self, sinks: Mapping[str, Sink], about: RunInfo) -> None:
        for name, sink in sinks.items():
            if isinstance(sink, WandbLog):
                self._wandb = sink
            patient = Patient(name, sink, self.line)
            patient.start(about)
            self._sinks.append(patient)

    def position(self) -> dict[str, Any]:
        """Write the log to the disk; return its bytes, their digest, and the id of the W&B run."""
        self._file.flush()
        if self._talks:
            os.fsync(self._file.fileno())
        wandb_id = None if self._wandb is None else self._wandb.id
        return {
            "bytes": self._file.tell(),
            "sha256": self._digest.hexdigest(),
            "wandb_id": wandb_id,
        }

    def event(self, event: str, num_updates: int, epoch: float, **metrics: Any) -> None:
        """Record one event with the keys 'event', 'num_updates', 'epoch' and those of ``metrics``.

        Values are numbers, strings, lists or mappings. A mapping of 'columns' and 'data' is a
        table.
        """
        if not self._talks:
            return
        record = as_record(event, num_updates, epoch, metrics)
        text = json.dumps(record, allow_nan=False) + "\n"
        self._file.write(text)
        self._digest.update(text.encode())
        for sink in self._sinks:
            sink.log(record)

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

    def figures(self, paths: Sequence[Path]) -> None:
        """Pass pictures to the sinks."""
        for sink in self._sinks:
            sink.figures(paths)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the values of the whole run to ``summary.json`` and pass them to the sinks.

        The file is written whole or not at all.
        """
        if not self._talks:
            return
        plain = plain_values(values)
        text = json.dumps(plain, indent=2, allow_nan=False)
        write_whole(self.folder / SUMMARY, text + "\n")
        for sink in self._sinks:
            sink.summary(plain)


def locked(folder: Path) -> TextIO | None:
    """Make ``folder`` and lock it; return the lock's file, or None if another process has it.

    Closing the file releases the lock. The system also releases it when the process ends, however
    it ends. NoLocks on a file system that has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.fdopen(open_here(folder / ".lock"), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        if error.errno not in UNSUPPORTED:
            raise
        raise NoLocks(f"the file system of {folder} has no locks ({error.strerror})") from error
    held = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: _close(held()))  # workers may outlive a killed run
    return file


def _close(file: TextIO | None) -> None:
    if file is not None:
        file.close()


def _begin(path: Path, source: Path, position: Mapping[str, Any] | None) -> list[str]:
    """Make the log ``path`` of the bytes of ``source``, maybe itself, that a checkpoint knows.

    Return lines for the user: what was damaged or changed in them.
    """
    size = position["bytes"] if position else 0
    content = source.read_bytes()[:size] if size and source.exists() else b""
    if len(content) < size:
        give_up = f"truncate -s {size} {shlex.quote(str(source))}"
        raise ValueError(
            f"{source} is missing or shorter than the checkpoint knows it: {size:,} bytes; put it "
            f"back, or give up the lines that are missing: {give_up}"
        )
    whole, reasons = mended(content, source)
    told = _told_of_damage(path, source, reasons)
    if source != path or reasons:
        part = path.with_name(f".{path.name}")
        part.unlink(missing_ok=True)
        part.write_bytes(whole)
        part.replace(path)
    path.touch()
    os.truncate(path, size)
    known = position.get("sha256") if position else None
    if not reasons and known not in (None, hashlib.sha256(content).hexdigest()):
        told.append(f"{source} was changed after the checkpoint was saved; it is taken as it is")
    return told


def _told_of_damage(path: Path, source: Path, reasons: Sequence[str]) -> list[str]:
    """Keep a damaged log beside ``path``; return a line on what is wrong with it, if anything."""
    if not reasons:
        return []
    kept = free_name(path.parent, f"damaged-{path.name}")
    shutil.copyfile(source, kept)
    return [f"{source} is damaged: {some(reasons)}; the run goes on without, {kept} has all"]
