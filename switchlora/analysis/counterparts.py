"""Find the full training that a run is to be seen beside: runs of its setting without a switch.

They are found in two places: beside the run's folder, as in a sweep, and among the recorded ones
in ``experiments/*/curves.jsonl``, each line of which is what ``as_recorded`` returns.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchlora.analysis.timeline import number
from switchlora.config import folder_of, shaping
from switchlora.errors import ODD
from switchlora.storage import Record, is_run, read_record

OF_SWITCH = ("switch.", "adapter.", "monitor.", "method")
LENGTH = ("epochs", "length", "max_updates")
RECORDED = "curves.jsonl"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Counterpart:
    """The validations of a run that trained in full to its end."""

    label: str
    shortened: bool
    """whether it trained for fewer updates"""
    evals: tuple[Mapping[str, Any], ...]

    def points(self, key: str) -> tuple[list[int], list[float]]:
        """Return the updates and the values of the validations that have ``key``."""
        told = [event for event in self.evals if key in event]
        updates = [event["num_updates"] for event in told]
        return updates, [number(event[key]) for event in told]


def find_counterparts(folder: Path) -> list[Counterpart]:
    """Return the full training of the same setting, then shortened ones, the longest first.

    They have the run's data, model, recipe and seed. Of several of one length the last counts.
    """
    if not is_run(folder):
        return []
    record = read_record(folder)
    found: dict[int, Counterpart] = {}
    for counterpart in (*_recorded(record), *_beside(record)):
        is_itself = trained_in_full(record) and not counterpart.shortened
        if counterpart.evals and not is_itself:
            found[counterpart.evals[-1]["num_updates"]] = counterpart
    longest_first = [found[updates] for updates in sorted(found, reverse=True)]
    return sorted(longest_first, key=lambda counterpart: counterpart.shortened)


def _beside(record: Record) -> Iterator[Counterpart]:
    """Yield the counterparts among the folders beside the run's own."""
    mine = record.folder.resolve()
    for path in sorted(mine.parent.glob("*")):
        if path == mine or not is_run(path):
            continue
        try:
            yield from _counterpart(record, read_record(path))
        except (ValueError, OSError, *ODD):
            continue  # a damaged neighbour is no reason to draw nothing


def _counterpart(record: Record, other: Record) -> Iterator[Counterpart]:
    """Yield the ``other`` run if it is a counterpart."""
    if not trained_in_full(other) or setting(record) != setting(other):
        return
    shortened = length(record) != length(other)
    yield from _named(record, tuple(other.events("eval")), shortened)


def _recorded(record: Record) -> Iterator[Counterpart]:
    """Yield the counterparts among the recorded runs."""
    mine = shaping(record.config)
    for path in sorted(folder_of("experiments").glob(f"*/{RECORDED}")):
        for line in path.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            lasting = {key: told["settings"].pop(key, mine.get(key)) for key in LENGTH}
            if told["settings"].items() <= mine.items():
                shortened = any(mine.get(key) != value for key, value in lasting.items())
                yield from _named(record, tuple(told["evals"]), shortened, ", recorded")


def _named(
    record: Record, evals: tuple[Mapping[str, Any], ...], shortened: bool, where: str = ""
) -> Iterator[Counterpart]:
    """Yield the counterpart with these validations; none that is shorter and yet no less long."""
    label = "full training"
    if shortened:
        if not evals or evals[-1]["num_updates"] >= last_update(record):
            return
        label = f"full training of {evals[-1]['num_updates']:,} updates"
    yield Counterpart(f"{label}{where}", shortened, evals)


def as_recorded(record: Record) -> dict[str, Any]:
    """Return a run of full training as a line of ``curves.jsonl`` holds it."""
    return {"settings": _without_switch(record), "evals": list(record.events("eval"))}


def trained_in_full(record: Record) -> bool:
    """Return whether a finished run trained all its parameters to its end."""
    if not record.finished:
        return False
    return not record.result["switch"]["fired"] and not record.result.get("transitions")


def setting(record: Record) -> Settings:
    """Return what shapes full training, with its seed, but not how long it lasts."""
    found = _without_switch(record)
    for key in LENGTH:
        found.pop(key, None)
    return found


def _without_switch(record: Record) -> Settings:
    """Return the keys that shape results, without those of the switch and what follows it."""
    found = {}
    for key, value in shaping(record.config).items():
        if not key.startswith(OF_SWITCH):
            found[key] = value
    return found


def length(record: Record) -> tuple[Any, ...]:
    """Return how long a run was to train."""
    return tuple(record.config.get(key) for key in LENGTH)


def last_update(record: Record) -> int:
    """Return the last update that a run logged."""
    return max((event["num_updates"] for event in record.events()), default=0)
