"""What a trunk has logged: ``metrics.jsonl`` of a shared full phase, without any verdict in it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchlora.criteria import Verdict
from switchlora.monitor import Measurement
from switchlora.policy import SwitchPolicy
from switchlora.storage import METRICS, as_record, measurement_metrics, measurement_of

UNDECIDED = Verdict(False, {}, "")
Placed = tuple[int, dict[str, Any]]
"""where a line begins, in bytes, and its event"""


class TrunkLog:
    """The log in ``folder``. Only the run that holds the trunk's lock may ``mend`` and ``append``.

    A checkpoint at a measurement belongs in front of that measurement's line.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def history(self) -> list[Measurement]:
        """What has been measured so far."""
        return [measurement_of(event) for _, event in _measured(self.path)]

    def mend(self) -> None:
        """Cut off what a killed run has left behind the last whole measurement."""
        self.path.touch()
        end = place = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            place += len(line)
            if line.endswith(b"\n") and json.loads(line)["event"] == "measure":
                end = place
        os.truncate(self.path, end)

    def append(self, measured: Measurement, metrics: Path) -> None:
        """Add a new measurement, and what a run's ``metrics`` hold since the one before."""
        known = [event["num_updates"] for _, event in _measured(self.path)]
        if measured.num_updates in known:
            return
        events = _events_after(metrics, max(known, default=0))
        lines = [_line(event) for event in events if event["event"] != "measure"]
        with self.path.open("a") as file:
            file.write("".join(lines) + _measure_line(measured, UNDECIDED))
            file.flush()
            os.fsync(file.fileno())

    def place_of(self, num_updates: int) -> int:
        """Where the line of a measurement begins."""
        return next(p for p, event in _measured(self.path) if event["num_updates"] == num_updates)

    def copy_to(self, run: Path, size: int, policy: SwitchPolicy, kept: int) -> int:
        """Give a run the first ``size`` bytes of events, with its own verdicts; bytes there then.

        Its own first ``kept`` bytes, which tell of the same updates, stay as they are.
        """
        history: list[Measurement] = []
        lines = []
        for place, event in _events(self.path):
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
    """The whole lines of a log that another run may be writing."""
    place = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if line.endswith(b"\n"):
            yield place, json.loads(line)
        place += len(line)


def _measured(path: Path) -> Iterator[Placed]:
    return (placed for placed in _events(path) if placed[1]["event"] == "measure")


def _events_after(path: Path, num_updates: int) -> list[dict[str, Any]]:
    """Events of a run behind its measurement at ``num_updates``, or all of them."""
    events = [event for _, event in _events(path)]
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
