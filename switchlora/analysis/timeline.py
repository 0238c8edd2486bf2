"""Read the course of a run from its events: its phases, its changes and its measurements.

Nothing is drawn here.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Event = Mapping[str, Any]
MEASURED = ("measure", "window")
BEGINS_PHASE = ("switch", "settle", "take_back")
CHANGES = (*BEGINS_PHASE, "restart", "grow")
RANK = "switch/rank/"
UPDATE_NORM = "relative_update_norm/"


class Span(NamedTuple):
    """A phase from update ``begin`` to update ``end``."""

    phase: str
    begin: int
    end: int


class Change(NamedTuple):
    """A change of the trained tensors after ``num_updates`` updates."""

    kind: str
    """switch, stage, settle, restart, grow or take_back"""
    num_updates: int


class Window(NamedTuple):
    """A measurement of layers over the updates after ``begin`` up to ``end``."""

    begin: int
    end: int
    event: Event


@dataclass(frozen=True)
class Timeline:
    """The course of a run, in the order of its updates."""

    spans: tuple[Span, ...]
    changes: tuple[Change, ...]
    switched: tuple[tuple[str, int], ...]
    """each target that switched, with the update after which it did"""
    windows: tuple[Window, ...]

    @property
    def switch(self) -> int | None:
        """The update after which the first target switched."""
        return next((c.num_updates for c in self.changes if c.kind in ("switch", "stage")), None)

    @property
    def last_measured(self) -> int:
        """The end of the last window; 0 when nothing was measured."""
        return self.windows[-1].end if self.windows else 0

    @property
    def ends_at_switch(self) -> bool:
        """Whether nothing was measured after the first change. True without any change."""
        return not self.changes or self.changes[0].num_updates >= self.last_measured


def read_timeline(events: Sequence[Event]) -> Timeline:
    """Return the course of the run that logged ``events``."""
    phases = [
        (place, _phase_after(events, place))
        for place, event in enumerate(events)
        if event["event"] in BEGINS_PHASE
    ]
    return Timeline(
        _spans([(events[place]["num_updates"], phase) for place, phase in phases], events),
        _changes(events, dict(phases)),
        tuple(
            (key.removeprefix(RANK), event["num_updates"])
            for event in events
            if event["event"] == "switch"
            for key in event
            if key.startswith(RANK)
        ),
        _windows(events),
    )


def targets_of(event: Event, key: str) -> list[str]:
    """Return the targets for which an event holds the statistic ``key``."""
    return [name.removeprefix(f"{key}/") for name in event if name.startswith(f"{key}/")]


def measured_targets(course: Timeline, key: str) -> list[str]:
    """Return all targets for which ``key`` was measured at any time."""
    return list(
        dict.fromkeys(n for window in course.windows for n in targets_of(window.event, key))
    )


def series(
    windows: Sequence[Window], names: Sequence[str], unit: float = 1.0
) -> tuple[list[int], np.ndarray]:
    """Return the updates, and the values of ``names`` as an array (windows, names).

    A value that was not measured is NaN. A gap between two windows adds a row of NaN, so that a
    drawn line ends there.
    """
    updates: list[int] = []
    rows: list[list[float]] = []
    for window in windows:
        if updates and window.begin > updates[-1]:
            updates.append(window.begin)
            rows.append([math.nan] * len(names))
        updates.append(window.end)
        rows.append([unit * number(window.event.get(name)) for name in names])
    return updates, np.array(rows)


def number(value: float | None) -> float:
    """Return the value, or NaN for None. JSON has no NaN, so events hold None instead."""
    return math.nan if value is None else value


def _phase_after(events: Sequence[Event], place: int) -> str:
    """Return the phase that the change at ``place`` begins.

    The next event with a phase names it. When another change comes first, its kind implies it.
    """
    after = "full" if events[place]["event"] == "take_back" else "adapter"
    for event in events[place + 1 :]:
        if "train/phase" in event:
            return event["train/phase"]
        if event["event"] in BEGINS_PHASE:
            return {"settle": "joint", "switch": "staged"}.get(event["event"], after)
    return after


def _spans(begins: Sequence[tuple[int, str]], events: Sequence[Event]) -> tuple[Span, ...]:
    last = max((event["num_updates"] for event in events), default=0)
    found: list[Span] = []
    begin, phase = 0, "full"
    for update, following in [*begins, (last, "")]:
        if following != phase:
            found += [Span(phase, begin, update)] if update > begin else []
            begin, phase = update, following
    return tuple(found)


def _changes(events: Sequence[Event], phases: Mapping[int, str]) -> tuple[Change, ...]:
    found, phase = [], "full"
    for place, event in enumerate(events):
        if event["event"] in CHANGES:
            before, phase = phase, phases.get(place, phase)
            staged = event["event"] == "switch" and "staged" in (before, phase)
            found.append(Change("stage" if staged else event["event"], event["num_updates"]))
    return tuple(found)


def _windows(events: Sequence[Event]) -> tuple[Window, ...]:
    begins = (*MEASURED, *BEGINS_PHASE, "restart")
    starts = sorted({0, *(e["num_updates"] for e in events if e["event"] in begins)})
    return tuple(
        Window(starts[max(bisect_left(starts, e["num_updates"]) - 1, 0)], e["num_updates"], e)
        for e in events
        if e["event"] in MEASURED and any(key.startswith(UPDATE_NORM) for key in e)
    )
