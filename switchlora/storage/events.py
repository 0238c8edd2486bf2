"""The events of ``metrics.jsonl``: their keys, and how to write and read them."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from switchlora.criteria import Verdict
from switchlora.monitor import LayerStats, Measurement
from switchlora.names import family

METRICS = "metrics.jsonl"


def as_record(
    event: str, num_updates: int, epoch: float, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one event as it stands on a line of ``metrics.jsonl``."""
    return plain_values({"event": event, "num_updates": num_updates, "epoch": epoch, **metrics})


class Placed(NamedTuple):
    """An event, and the bytes of its file at which its line begins and ends."""

    place: int
    end: int
    event: dict[str, Any]


def read_placed(path: Path) -> Iterator[Placed]:
    """Yield the events of a log in order.

    A last line without its end is left out: a run is writing it, or was killed while it did.
    ValueError, with folder and line, for a line that holds no event.
    """
    place = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        end = place + len(line)
        if line.endswith(b"\n"):
            event = _event_on(line, f"{path.parent}: line {number} of {path.name}")
            yield Placed(place, end, event)
        place = end


def read_events(folder: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events of a run folder in order: those named ``event``, or all."""
    for placed in read_placed(folder / METRICS):
        if event in (None, placed.event["event"]):
            yield placed.event


def _event_on(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is damaged") from error
    if not isinstance(found, dict) or "event" not in found:
        raise ValueError(f"{where} is damaged: it holds no event")
    return found


def plain_values(value: Any) -> Any:
    """Return what JSON can hold: lists for tuples, None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


FAMILY_STATISTICS = ("relative_update_norm", "update_stable_rank", "weight_stable_rank")


def measurement_metrics(measurement: Measurement, verdict: Verdict) -> dict[str, Any]:
    """Return the keys and values of a 'measure' event.

    - ``<statistic>/<target>`` and the medians ``family/<statistic>/<family>``.
    - ``train/window_loss``.
    - ``switch/margin/<target>``, ``switch/fires`` and ``switch/reason`` of the ``verdict``.
    """
    metrics = window_metrics(measurement)
    metrics |= {f"switch/margin/{name}": margin for name, margin in verdict.margins.items()}
    return metrics | {"switch/fires": verdict.fires, "switch/reason": verdict.reason}


def window_metrics(measurement: Measurement) -> dict[str, Any]:
    """Return the keys and values of a 'window' event: a measurement without a verdict.

    No criterion reads a 'window' event.
    """
    metrics: dict[str, Any] = {"train/window_loss": measurement.train_loss}
    for name, stats in measurement.layers.items():
        metrics |= {f"{key}/{name}": v for key, v in vars(stats).items() if v not in (None, ())}
        metrics[f"relative_update_norm/{name}"] = stats.relative_update_norm
    return metrics | family_medians(measurement)


def family_medians(measurement: Measurement) -> dict[str, float]:
    """Return the median of each of ``FAMILY_STATISTICS`` over the targets of each family."""
    families: dict[str, list[LayerStats]] = {}
    for name, stats in measurement.layers.items():
        families.setdefault(family(name), []).append(stats)
    return {
        f"family/{key}/{name}": median(getattr(stats, key) for stats in members)
        for key in FAMILY_STATISTICS
        for name, members in families.items()
    }


def measurement_of(event: Mapping[str, Any]) -> Measurement:
    """Return the measurement that a 'measure' event holds."""
    names = [key.removeprefix("weight_norm/") for key in event if key.startswith("weight_norm/")]
    return Measurement(
        num_updates=event["num_updates"],
        epoch=event["epoch"],
        train_loss=event["train/window_loss"],
        layers={name: _layer(event, name) for name in names},
    )


def _layer(event: Mapping[str, Any], name: str) -> LayerStats:
    stats: dict[str, Any] = {}
    for item in fields(LayerStats):
        value = event.get(f"{item.name}/{name}", item.default)
        if value is None and item.default is MISSING:
            value = math.nan  # JSON has no NaN: it is written as null
        stats[item.name] = tuple(value) if isinstance(value, list) else value
    return LayerStats(**stats)
