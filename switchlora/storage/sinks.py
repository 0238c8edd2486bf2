"""Sinks: where the events of a run go beside metrics.jsonl. None of them ever ends a training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from switchlora.config import leaves
from switchlora.process import one_line

AXES = ("num_updates", "epoch")
"""what places an event, and is no measurement"""
SUMMARISED = ("val.", "test.", "cost.")
"""what the keys of a summary begin with whose numbers sinks show beside the events"""


@dataclass(frozen=True)
class RunInfo:
    """What a sink learns of the run when it starts."""

    folder: Path
    config: Mapping[str, Any]
    words: Sequence[str]
    """what tells the run from others, such as its criterion, model, data and seed"""
    goes_on: bool
    """whether the run goes on in its own folder after an interruption"""
    say: Callable[[str], None]
    """print a line on the terminal"""


class Sink(Protocol):
    """Takes what a run logs. Any of these may raise: the sink is then left, the run goes on."""

    def start(self, run: RunInfo) -> None:
        """Begin, or go on where an earlier process ended.

        ``read_events(run.folder)`` yields the events so far. Those that an interrupted process
        logged after its last checkpoint are not among them: they come again by ``log``.
        """

    def log(self, event: Mapping[str, Any]) -> None:
        """Take the next event, a line of metrics.jsonl."""

    def figures(self, paths: Sequence[Path]) -> None:
        """Take the pictures that are drawn at the end."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Take the values of the whole run; they stand in summary.json already."""

    def finish(self, error: type[BaseException] | None) -> None:
        """End; ``error`` is what stopped the run, if anything did."""


class Patient:
    """A sink that ends no training: what fails is told in one line, and the sink is left."""

    def __init__(self, name: str, sink: Sink, say: Callable[[str], None]) -> None:
        self.name = name
        self._sink: Sink | None = sink
        self._say = say

    def start(self, run: RunInfo) -> None:
        """Start the sink."""
        self._attempt(lambda sink: sink.start(run), "cannot start")

    def log(self, event: Mapping[str, Any]) -> None:
        """Pass the next event on."""
        self._attempt(lambda sink: sink.log(event))

    def figures(self, paths: Sequence[Path]) -> None:
        """Pass pictures on."""
        self._attempt(lambda sink: sink.figures(paths))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Pass the values of the whole run on."""
        self._attempt(lambda sink: sink.summary(values))

    def finish(self, error: type[BaseException] | None) -> None:
        """End the sink."""
        self._attempt(lambda sink: sink.finish(error))

    def _attempt(self, act: Callable[[Sink], None], failing: str = "is left") -> None:
        """Do something with the sink; leave it when that fails."""
        if self._sink is None:
            return
        try:
            act(self._sink)
        except Exception as error:
            self._sink = None
            self._say(f"{self.name} {failing}, the run goes on without it: {one_line(error)}")


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """Return what an event measured, as numbers."""
    found = {}
    for key, value in event.items():
        if isinstance(value, int | float) and key not in AXES:
            found[key] = float(value)
    return found


def summary_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary that compare runs, under 'summary/<key>'."""
    found = {}
    for key, value in leaves(values):
        if isinstance(value, int | float) and key.startswith(SUMMARISED):
            found[f"summary/{key}"] = float(value)
    return found
