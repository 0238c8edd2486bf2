"""The events of ``metrics.jsonl``: their keys, and how to write and read them."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from switchlora.criteria import Verdict
from switchlora.monitor import LayerStats, Measurement
from switchlora.names import family
from switchlora.storage.reading import FileDamaged, content_of, parse_json

METRICS = "metrics.jsonl"
NEEDED = {"train": "train/loss", "eval": "val/top1"}
"""by kind of event, the key that it must have beside 'event' and 'num_updates'"""
LOST = b'{"event": "lost", "num_updates": 0}\n'
"""what stands in the place of damaged lines"""
WEIGHT_NORM = "weight_norm/"
"""prefix of a key that every target of a 'measure' event has"""


def as_record(
    event: str, num_updates: int, epoch: float, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one event as it stands on a line of ``metrics.jsonl``."""
    return plain_values({"event": event, "num_updates": num_updates, "epoch": epoch, **metrics})


class Placed(NamedTuple):
    """An event, and the place of its line in the log."""

    event: dict[str, Any]
    place: int
    """byte at which the line begins"""
    end: int
    """byte at which the line after it begins"""
    where: str
    """file and number of the line, for messages"""


def read_placed(path: Path | str) -> Iterator[Placed]:
    """Yield the events of a log in order.

    A last line without its end is left out: a run is writing it, or was killed while it did.
    FileDamaged for a line that holds no event.
    """
    path = Path(path)
    place = 0
    *lines, _ = content_of(path).split(b"\n")
    for number, line in enumerate(lines, start=1):
        event = parse_json(line, path, number)
        where = f"{path} is damaged: line {number}"
        _check_event(event, where)
        end = place + len(line) + 1
        yield Placed(event, place, end, where)
        place = end


def read_events(folder: Path | str, event: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events of a run folder in order: those named ``event``, or all."""
    for placed in read_placed(Path(folder) / METRICS):
        if event in (None, placed.event["event"]):
            yield placed.event


def read_history(folder: Path | str) -> list[Measurement]:
    """Return the measurements in the log of a folder, in order.

    FileDamaged when a line is damaged or lacks a number of a measurement.
    """
    folder = Path(folder)
    history = []
    for placed in read_placed(folder / METRICS):
        if placed.event["event"] == "measure":
            history.append(placed_measurement(placed))
    return history


def mended(content: bytes, path: Path) -> tuple[bytes, list[str]]:
    """Return a log without its damaged lines, and what was wrong with each.

    An event 'lost' of the same length stands in their place, so that all others stay where
    checkpoints know them. A damaged line too short for it takes a line beside it along.
    """
    parts: list[bytes] = []
    reasons: list[str] = []
    lost = 0
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", content), start=1):
        reason = _damage(line, path, number)
        if reason is None and not 0 < lost < len(LOST):
            parts += [_lost(lost), line]
            lost = 0
        else:
            lost += len(line)
            reasons.append(reason or f"line {number} is lost with the one before it")
    if 0 < lost < len(LOST) and parts:
        lost += len(parts.pop())
    if 0 < lost < len(LOST):
        raise FileDamaged(f"{path} is damaged: {reasons[-1]}; remove the file to go on without it")
    return b"".join([*parts, _lost(lost)]), reasons


def _lost(size: int) -> bytes:
    """Return a line of ``size`` bytes with an event that says nothing; 0 bytes give none."""
    return LOST.rstrip().ljust(size - 1) + b"\n" if size else b""


def _damage(line: bytes, path: Path, number: int) -> str | None:
    """Return what is wrong with a line of a log, or None."""
    if not line.endswith(b"\n"):
        return f"line {number} has no end"
    try:
        _check_event(parse_json(line[:-1], path, number), f"{path} is damaged: line {number}")
    except FileDamaged as error:
        return str(error).partition("is damaged: ")[2]
    return None


def _check_event(event: Mapping[str, Any], where: str) -> None:
    kind = event.get("event")
    if not isinstance(kind, str):
        raise FileDamaged(f"{where} holds no event")
    if not isinstance(event.get("num_updates"), int):
        raise FileDamaged(f"{where} is an event without 'num_updates'")
    if kind in NEEDED and NEEDED[kind] not in event:
        raise FileDamaged(f"{where} is an event '{kind}' without '{NEEDED[kind]}'")


def plain_values(value: Any) -> Any:
    """Return what JSON can hold: lists for tuples, None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(plain_values, value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


FAMILY_STATISTICS = ("relative_update_norm", "update_stable_rank", "weight_stable_rank")


def window_metrics(measurement: Measurement) -> dict[str, Any]:
    """Return the keys and values of a 'window' event: a measurement without a verdict.

    No criterion reads a 'window' event.

    - ``<statistic>/<target>`` and the medians ``family/<statistic>/<family>``.
    - ``train/window_loss``.
    """
    metrics: dict[str, Any] = {"train/window_loss": measurement.train_loss}
    for name, stats in measurement.layers.items():
        for key, value in vars(stats).items():
            if value not in (None, ()):  # it was not asked for
                metrics[f"{key}/{name}"] = value
        metrics[f"relative_update_norm/{name}"] = stats.relative_update_norm
    return metrics | family_medians(measurement)


def family_medians(measurement: Measurement) -> dict[str, float]:
    """Return the median of each of ``FAMILY_STATISTICS`` over the targets of each family."""
    families: dict[str, list[LayerStats]] = {}
    for name, stats in measurement.layers.items():
        families.setdefault(family(name), []).append(stats)
    medians = {}
    for key in FAMILY_STATISTICS:
        for name, members in families.items():
            medians[f"family/{key}/{name}"] = median(getattr(stats, key) for stats in members)
    return medians


def measurement_metrics(measurement: Measurement, verdict: Verdict) -> dict[str, Any]:
    """Return the keys and values of a 'measure' event.

    They are those of a 'window' event, and ``switch/margin/<target>``, ``switch/fires`` and
    ``switch/reason`` of the ``verdict``.
    """
    metrics = window_metrics(measurement)
    for name, margin in verdict.margins.items():
        metrics[f"switch/margin/{name}"] = margin
    metrics["switch/fires"] = verdict.fires
    metrics["switch/reason"] = verdict.reason
    return metrics


def event_of(measurement: Measurement, verdict: Verdict) -> dict[str, Any]:
    """Return the 'measure' event that holds a measurement; ``measurement_of`` reads it back."""
    metrics = measurement_metrics(measurement, verdict)
    return as_record("measure", measurement.num_updates, measurement.epoch, metrics)


def measurement_of(event: Mapping[str, Any]) -> Measurement:
    """Return the measurement that a 'measure' event holds; KeyError when a number is missing."""
    layers = {}
    for key in event:
        if key.startswith(WEIGHT_NORM):
            name = key.removeprefix(WEIGHT_NORM)
            layers[name] = _layer(event, name)
    return Measurement(
        num_updates=event["num_updates"],
        epoch=event["epoch"],
        train_loss=_read_back(event["train/window_loss"]),
        layers=layers,
    )


def placed_measurement(placed: Placed) -> Measurement:
    """Return the measurement that a 'measure' event of a log holds; FileDamaged names its line."""
    try:
        return measurement_of(placed.event)
    except KeyError as error:
        raise FileDamaged(f"{placed.where} is a measurement without {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise FileDamaged(f"{placed.where} is no measurement: {error}") from error


def _layer(event: Mapping[str, Any], name: str) -> LayerStats:
    stats: dict[str, Any] = {}
    for statistic in fields(LayerStats):
        key = f"{statistic.name}/{name}"
        if key in event or statistic.default is MISSING:
            stats[statistic.name] = _read_back(event[key])
    return LayerStats(**stats)


def _read_back(value: Any) -> Any:
    """Return a value as it was before ``plain_values``: NaN for None, a tuple for a list."""
    if isinstance(value, list):
        return tuple(map(_read_back, value))
    return math.nan if value is None else value
