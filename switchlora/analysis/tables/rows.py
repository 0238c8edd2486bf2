"""Rows of a table: runs that differ in nothing but their seed, named by what sets them apart."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from switchlora.analysis.figures import run_labels
from switchlora.analysis.tables.columns import Cell, Column
from switchlora.config import folder_of, identity, leaves, shaping
from switchlora.storage import Record

CONF = folder_of("conf")
CRITERION, NEVER = "switch.criterion", "never"
METHOD = "method"
OF_METHODS = ("switch.", "adapter.", "monitor.")  # what a method consists of: its name tells it
FULL_TRAINING = "full training"
UNUSED_BY_FULL_TRAINING = ("switch.", "adapter.")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """Runs of one configuration; ``settings`` are the keys that set it apart from other rows."""

    label: str
    settings: Settings
    records: tuple[Record, ...]
    cells: dict[str, Cell]
    """by column key; without the columns that it has no number for"""

    @property
    def trains_in_full(self) -> bool:
        """Whether its criterion is 'never'."""
        return settings_of(self.records[0].config)[CRITERION] == NEVER

    @property
    def never_switched(self) -> bool:
        """Whether all of its runs have trained in full to their end."""
        return not any(record.result["switch"]["fired"] for record in self.records)


@dataclass(frozen=True)
class Table:
    """Rows by columns, and what a reader must know about the numbers."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def make_rows(records: Sequence[Record]) -> tuple[list[Row], list[str]]:
    """Rows without cells, full training first, and notes on runs that are there twice.

    Of runs with the same configuration and seed only the first counts: no seed weighs double.
    """
    groups: dict[str, dict[int, Record]] = {}
    notes = []
    for record in sorted(records, key=lambda each: natural(str(each.folder))):
        keys = shaping(record.config)
        seed = keys.pop("seed", 0)
        row = groups.setdefault(identity(keys), {})
        if seed in row:
            first, second = run_labels([row[seed].folder, record.folder])
            notes.append(f"{second}: not counted, the same configuration and seed as {first}.")
        row.setdefault(seed, record)
    members = [tuple(row[seed] for seed in sorted(row)) for row in groups.values()]
    told = telling_settings(with_methods(members))
    rows = [
        Row(label, settings, row, {})
        for label, settings, row in zip(labels(told), told, members, strict=True)
    ]
    return sorted(rows, key=lambda row: (not row.trains_in_full, natural(row.label))), notes


def with_methods(members: Sequence[Sequence[Record]]) -> list[Settings]:
    """The settings of each row, its ``method`` among them where rows have several of them.

    A row that none was chosen for is called by its criterion.
    """
    found = [settings_of(row[0].config) for row in members]
    methods = [next(filter(None, (r.config.get(METHOD) for r in row)), None) for row in members]
    if len(set(methods)) < 2:
        return found
    criteria = [FULL_TRAINING if s[CRITERION] == NEVER else s[CRITERION] for s in found]
    named = zip(found, methods, criteria, strict=True)
    return [{METHOD: method or criterion, **settings} for settings, method, criterion in named]


def natural(text: str) -> list[tuple[float, str]]:
    """A key that sorts the numbers in a text by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)", text)
    return [(float(p), "") if i % 2 else (-1.0, p) for i, p in enumerate(parts)]


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The dotted keys that shape results, but the seed; objects by the names of their groups.

    ``switch.criterion._target_: switchlora.criteria.UpdateNorm`` becomes ``switch.criterion:
    update_norm``.
    """
    keys = {key: value for key, value in shaping(config).items() if key != "seed"}
    settings = {}
    for key, value in keys.items():
        parent, _, last = key.rpartition(".")
        if last == "_target_":
            settings[parent] = group_name(parent, keys)
        elif not (last == "_partial_" or (last == "path" and f"{parent}._target_" in keys)):
            settings[key] = value
    return settings


def group_name(parent: str, keys: Mapping[str, Any]) -> str:
    """Name of the yaml in conf that an object was built from, or else of its class or function.

    Where several yamls build the same class, the one that agrees in most values.
    """
    kind = (keys[f"{parent}._target_"], keys.get(f"{parent}.path"))
    best, agreeing = kind[1] or kind[0], -1
    for stem, values in yamls(parent):
        if (values.get("_target_"), values.get("path")) == kind:
            agree = sum(keys.get(f"{parent}.{key}") == value for key, value in values.items())
            if agree > agreeing:
                best, agreeing = stem, agree
    return best.rpartition(".")[2]


@cache
def yamls(group: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and values of every yaml of a config group, such as 'switch.criterion'."""
    files = sorted(CONF.joinpath(*group.split(".")).glob("*.yaml"))
    loaded = ((file.stem, OmegaConf.to_container(OmegaConf.load(file))) for file in files)
    return [(stem, dict(leaves(content))) for stem, content in loaded]


def telling_settings(all_settings: Sequence[Settings]) -> list[Settings]:
    """Of each row's settings those that set it apart from rows with objects of the same kinds.

    Full training uses no key of the switch or of the adapter, so these say nothing there. What
    full and adapter phase share is told once. What a method consists of is told where it sets two
    rows of that method apart.
    """
    told = []
    for settings in all_settings:
        found = {k: v for k, v in settings.items() if _tells(k, settings, all_settings)}
        told.append({k: v for k, v in found.items() if not _told_of_full(k, v, found)})
        if not found:
            told[-1] = {CRITERION: settings[CRITERION]}
    if len({repr(settings) for settings in told}) == len(told):
        return told
    differ = {k for s in all_settings for k in s if any(o.get(k) != s[k] for o in all_settings)}
    return [{k: v for k, v in s.items() if k in differ} for s in all_settings]


def _tells(key: str, settings: Settings, all_settings: Sequence[Settings]) -> bool:
    if key.startswith(OF_METHODS):
        all_settings = [o for o in all_settings if o.get(METHOD) == settings.get(METHOD)]
    if key.startswith(UNUSED_BY_FULL_TRAINING) and key != CRITERION:
        if settings.get(CRITERION) == NEVER:
            return False
        all_settings = [other for other in all_settings if other.get(CRITERION) != NEVER]
    parts = key.split(".")
    parents = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    alike = (o for o in all_settings if all(o.get(p) == settings.get(p) for p in parents))
    return any(other.get(key) != settings[key] for other in alike)


def _told_of_full(key: str, value: Any, found: Settings) -> bool:
    twin = key.replace("adapter.", "full.", 1)
    return key.startswith("adapter.") and twin in found and found[twin] == value


def labels(told: Sequence[Settings]) -> list[str]:
    """One label a row: its method or criterion, then short keys with their values."""
    keys = {key for settings in told for key in settings}
    return [_label(settings, keys) for settings in told]


def _label(settings: Settings, keys: set[str]) -> str:
    criterion = settings.get(CRITERION)
    words = [settings[METHOD]] if METHOD in settings else []
    words += [] if criterion is None else [FULL_TRAINING if criterion == NEVER else criterion]
    others = (key for key in settings if key not in (METHOD, CRITERION))
    words += [f"{short_key(key, keys)}={value_text(settings[key])}" for key in others]
    return ", ".join(words)


def short_key(key: str, keys: set[str]) -> str:
    """The last parts of a dotted key: as few as tell it from the other ``keys``."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        tail = parts[-depth:]
        if sum(other.split(".")[-depth:] == tail for other in keys) == 1:
            return ".".join(tail)
    return key


def value_text(value: Any) -> str:
    """A value of a configuration, short."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, Mapping):
        inner = {k: v for k, v in value.items() if k not in ("_target_", "path")}
        named = str(value.get("path", value.get("_target_", ""))).rpartition(".")[2]
        return f"{named}({', '.join(f'{k}={value_text(v)}' for k, v in inner.items())})"
    return "none" if value is None else str(value)
