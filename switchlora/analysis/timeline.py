"""Read the course of a run from its events: its phases, its changes and its measurements.

Nothing is drawn here.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from switchlora.names import family

Event = Mapping[str, Any]
MEASURED = ("measure", "window")
BEGINS_PHASE = ("switch", "settle", "take_back")
BEGINS_WINDOW = (*MEASURED, *BEGINS_PHASE, "restart")
CHANGES = (*BEGINS_PHASE, "restart", "grow")
PHASE_BEFORE = {"settle": "joint", "switch": "staged"}
"""the phase that must have come before a change"""
RANK = "switch/rank/"
UPDATE_NORM = "relative_update_norm"


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

    @property
    def length(self) -> int:
        """Number of updates."""
        return self.end - self.begin


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
        for change in self.changes:
            if change.kind in ("switch", "stage"):
                return change.num_updates
        return None

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
    phases = _begun_phases(events)
    return Timeline(
        spans=_spans(events, phases),
        changes=_changes(events, phases),
        switched=_switched(events),
        windows=_windows(events),
    )


def measured_targets(course: Timeline, key: str) -> list[str]:
    """Return all targets for which ``key`` was measured at any time."""
    found: dict[str, None] = {}
    for window in course.windows:
        found |= dict.fromkeys(_names_after(f"{key}/", window.event))
    return list(found)


def by_family(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the targets of each family, in the order in which they come."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family(name), []).append(name)
    return families


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


def _names_after(prefix: str, event: Event) -> list[str]:
    """Return what follows ``prefix`` in those keys of an event that begin with it."""
    keys = [key for key in event if key.startswith(prefix)]
    return [key.removeprefix(prefix) for key in keys]


def _begun_phases(events: Sequence[Event]) -> dict[int, str]:
    """Return the phases that changes begin, by the place of the change among the events."""
    phases = {}
    for place, event in enumerate(events):
        if event["event"] in BEGINS_PHASE:
            phases[place] = _phase_after(events, place)
    return phases


def _phase_after(events: Sequence[Event], place: int) -> str:
    """Return the phase that the change at ``place`` begins.

    The next event with a phase names it. When another change comes first, its kind implies it.
    """
    after = "full" if events[place]["event"] == "take_back" else "adapter"
    for event in events[place + 1 :]:
        if "train/phase" in event:
            return event["train/phase"]
        if event["event"] in BEGINS_PHASE:
            return PHASE_BEFORE.get(event["event"], after)
    return after


def _spans(events: Sequence[Event], phases: Mapping[int, str]) -> tuple[Span, ...]:
    found = []
    phase = "full"
    begin = 0
    for place, following in phases.items():
        update = events[place]["num_updates"]
        if following != phase:
            if update > begin:
                found.append(Span(phase, begin, update))
            phase = following
            begin = update
    last = max((event["num_updates"] for event in events), default=0)
    if last > begin:
        found.append(Span(phase, begin, last))
    return tuple(found)


def _changes(events: Sequence[Event], phases: Mapping[int, str]) -> tuple[Change, ...]:
    found = []
    phase = "full"
    for place, event in enumerate(events):
        kind = event["event"]
        if kind in CHANGES:
            before = phase
            phase = phases.get(place, phase)
            if kind == "switch" and "staged" in (before, phase):
                kind = "stage"
            found.append(Change(kind, event["num_updates"]))
    return tuple(found)


def _switched(events: Sequence[Event]) -> tuple[tuple[str, int], ...]:
    found = []
    for event in events:
        if event["event"] == "switch":
            for name in _names_after(RANK, event):
                found.append((name, event["num_updates"]))
    return tuple(found)


def _windows(events: Sequence[Event]) -> tuple[Window, ...]:
    starts = _window_starts(events)
    found = []
    for event in events:
        if event["event"] in MEASURED and _names_after(f"{UPDATE_NORM}/", event):
            end = event["num_updates"]
            found.append(Window(_last_before(end, starts), end, event))
    return tuple(found)


def _window_starts(events: Sequence[Event]) -> list[int]:
    """Return the updates after which a window begins, in order."""
    starts = {0}
    for event in events:
        if event["event"] in BEGINS_WINDOW:
            starts.add(event["num_updates"])
    return sorted(starts)


def _last_before(update: int, starts: Sequence[int]) -> int:
    """Return the last of sorted ``starts`` before ``update``, or the first if none is before."""
    place = bisect_left(starts, update) - 1
    return starts[max(place, 0)]
