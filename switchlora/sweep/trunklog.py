"""The log of a trunk: ``metrics.jsonl`` of a shared full phase, without verdicts."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchlora.criteria import Verdict
from switchlora.monitor import Measurement
from switchlora.policy import SwitchPolicy
from switchlora.storage import (
    METRICS,
    Placed,
    event_of,
    placed_measurement,
    read_history,
    read_placed,
)

UNDECIDED = Verdict(False, {}, "")


class TrunkLog:
    """The log of the trunk in ``folder``.

    Only the run that holds the trunk's lock may ``mend`` and ``append``. A checkpoint made at a
    measurement belongs before the line of this measurement: a run that resumes from it writes the
    line itself.

    FileDamaged, from any method that reads, when a line is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def size(self) -> int:
        """Return the length of the log in bytes; 0 if there is none yet."""
        return self.path.stat().st_size if self.path.exists() else 0

    def history(self) -> list[Measurement]:
        """Return the measurements so far."""
        return read_history(self.path.parent) if self.path.exists() else []

    def mend(self) -> None:
        """Cut off everything after the last whole measurement, left by a killed run."""
        self.path.touch()
        end = 0
        for placed in _measured(self.path):
            end = placed.end
        os.truncate(self.path, end)

    def append(self, measured: Measurement, metrics: Path) -> None:
        """Add a new measurement, and the run's other events since the measurement before.

        ``metrics`` is the log file of the run. A measurement that is there already is not added.
        """
        last = 0
        for placed in _measured(self.path):
            last = placed.event["num_updates"]
            if last == measured.num_updates:
                return
        text = ""
        for event in _events_after(metrics, last):
            if event["event"] != "measure":
                text += _line(event)
        text += _line(event_of(measured, UNDECIDED))
        with self.path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def place_of(self, num_updates: int) -> int:
        """Return the byte at which the line of the measurement at ``num_updates`` begins."""
        for placed in _measured(self.path):
            if placed.event["num_updates"] == num_updates:
                return placed.place
        raise AssertionError(f"{self.path} has no measurement at update {num_updates}")

    def copy_to(self, run: Path, size: int, policy: SwitchPolicy, kept: int) -> int:
        """Copy the trunk's events, its first ``size`` bytes, into the log in folder ``run``.

        The copy has the verdicts of ``policy``; the trunk has none. The first ``kept`` bytes of
        the run's log tell of the same updates and are left as they are. Return the new length of
        the run's log in bytes.
        """
        lines = self._decided_lines(size, policy)
        metrics = run / METRICS
        own = metrics.read_bytes()[:kept] if kept else b""
        missing = lines[own.count(b"\n") :]
        part = run / f".{METRICS}"
        part.write_bytes(own + "".join(missing).encode())
        part.replace(metrics)
        return metrics.stat().st_size

    def _decided_lines(self, size: int, policy: SwitchPolicy) -> list[str]:
        """Return the lines of the first ``size`` bytes, with the verdicts of ``policy``."""
        history: list[Measurement] = []
        lines = []
        for placed in _placed(self.path):
            if placed.place >= size:
                break
            event = placed.event
            if event["event"] == "measure":
                history.append(placed_measurement(placed))
                event = event_of(history[-1], policy.decide(history))
            lines.append(_line(event))
        return lines


def _placed(path: Path) -> Iterator[Placed]:
    """Yield the whole lines of a log, none of a log that is not there."""
    return read_placed(path) if path.exists() else iter(())


def _measured(path: Path) -> Iterator[Placed]:
    for placed in _placed(path):
        if placed.event["event"] == "measure":
            yield placed


def _events_after(path: Path, num_updates: int) -> list[dict[str, Any]]:
    """Return the events after the run's measurement at ``num_updates``; all if there is none."""
    events: list[dict[str, Any]] = []
    for placed in _placed(path):
        event = placed.event
        if event["event"] == "measure" and event["num_updates"] == num_updates:
            events = []
        else:
            events.append(event)
    return events


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"
