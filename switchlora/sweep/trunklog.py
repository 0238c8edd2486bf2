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
    as_record,
    measurement_metrics,
    measurement_of,
    read_placed,
)

UNDECIDED = Verdict(False, {}, "")


class TrunkLog:
    """The log of the trunk in ``folder``.

    Only the run that holds the trunk's lock may ``mend`` and ``append``. A checkpoint made at a
    measurement belongs before the line of this measurement: a run that resumes from it writes the
    line itself.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def size(self) -> int:
        """Return the length of the log in bytes; 0 if there is none yet."""
        return self.path.stat().st_size if self.path.exists() else 0

    def history(self) -> list[Measurement]:
        """Return the measurements so far."""
        return [measurement_of(placed.event) for placed in _measured(self.path)]

    def mend(self) -> None:
        """Cut off everything after the last whole measurement, left by a killed run."""
        self.path.touch()
        ends = [placed.end for placed in _measured(self.path)]
        os.truncate(self.path, max(ends, default=0))

    def append(self, measured: Measurement, metrics: Path) -> None:
        """Add a new measurement, and the run's other events since the measurement before.

        ``metrics`` is the log file of the run. A measurement that is there already is not added.
        """
        known = [placed.event["num_updates"] for placed in _measured(self.path)]
        if measured.num_updates in known:
            return
        events = _events_after(metrics, max(known, default=0))
        lines = [_line(event) for event in events if event["event"] != "measure"]
        with self.path.open("a") as file:
            file.write("".join(lines) + _measure_line(measured, UNDECIDED))
            file.flush()
            os.fsync(file.fileno())

    def place_of(self, num_updates: int) -> int:
        """Return the byte at which the line of the measurement at ``num_updates`` begins."""
        found = (p for p in _measured(self.path) if p.event["num_updates"] == num_updates)
        return next(found).place

    def copy_to(self, run: Path, size: int, policy: SwitchPolicy, kept: int) -> int:
        """Copy the trunk's events, its first ``size`` bytes, into the log in folder ``run``.

        The copy has the verdicts of ``policy``; the trunk has none. The first ``kept`` bytes of
        the run's log tell of the same updates and are left as they are. Return the new length of
        the run's log in bytes.
        """
        history: list[Measurement] = []
        lines = []
        for place, _, event in _events(self.path):
            if place >= size:
                break
            if event["event"] == "measure":
                history.append(measurement_of(event))
                lines.append(_measure_line(history[-1], policy.decide(history)))
            else:
                lines.append(_line(event))
        own = (run / METRICS).read_bytes()[:kept].decode() if kept else ""
        part = run / f".{METRICS}"
        part.write_text(own + "".join(lines[own.count("\n") :]))
        part.replace(run / METRICS)
        return (run / METRICS).stat().st_size


def _events(path: Path) -> Iterator[Placed]:
    """Yield the whole lines of a log, none of a log that is not there."""
    return read_placed(path) if path.exists() else iter(())


def _measured(path: Path) -> Iterator[Placed]:
    return (placed for placed in _events(path) if placed.event["event"] == "measure")


def _events_after(path: Path, num_updates: int) -> list[dict[str, Any]]:
    """Return the events after the run's measurement at ``num_updates``; all if there is none."""
    events = [placed.event for placed in _events(path)]
    known = [
        number
        for number, event in enumerate(events)
        if event["event"] == "measure" and event["num_updates"] == num_updates
    ]
    return events[known[-1] + 1 :] if known else events


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"


def _measure_line(measured: Measurement, verdict: Verdict) -> str:
    metrics = measurement_metrics(measured, verdict)
    return _line(as_record("measure", measured.num_updates, measured.epoch, metrics))
