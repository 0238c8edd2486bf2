"""Group runs into the rows of a table, and name each row by what distinguishes it.

The runs of one row differ only in their seed.
"""

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
OF_METHODS = ("switch.", "adapter.", "monitor.")  # keys that the name of a method stands for
FULL_TRAINING = "full training"
UNUSED_BY_FULL_TRAINING = ("switch.", "adapter.")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The runs of one configuration.

    ``settings`` are the keys that distinguish it from the other rows.
    """

    label: str
    settings: Settings
    records: tuple[Record, ...]
    cells: dict[str, Cell]
    """the cells by column key; a column without a number for this row is missing"""

    @property
    def trains_in_full(self) -> bool:
        """Whether its criterion is 'never'."""
        return settings_of(self.records[0].config)[CRITERION] == NEVER

    @property
    def never_switched(self) -> bool:
        """Whether all of its runs trained in full to their end."""
        return not any(record.result["switch"]["fired"] for record in self.records)


@dataclass(frozen=True)
class Table:
    """The columns and rows of a table, and notes on its numbers."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def make_rows(records: Sequence[Record]) -> tuple[list[Row], list[str]]:
    """Return rows without cells, full training first, and notes on duplicate runs.

    Of several runs with the same configuration and seed only the first counts. No seed then has
    double weight.
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
    """Return the settings of each row, with its ``method`` when the rows have different methods.

    A row without a method gets the name of its criterion instead.
    """
    found = [settings_of(row[0].config) for row in members]
    methods = [next(filter(None, (r.config.get(METHOD) for r in row)), None) for row in members]
    if len(set(methods)) < 2:
        return found
    criteria = [FULL_TRAINING if s[CRITERION] == NEVER else s[CRITERION] for s in found]
    named = zip(found, methods, criteria, strict=True)
    return [{METHOD: method or criterion, **settings} for settings, method, criterion in named]


def natural(text: str) -> list[tuple[float, str]]:
    """Return a sort key that orders the numbers inside a text by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)", text)
    return [(float(p), "") if i % 2 else (-1.0, p) for i, p in enumerate(parts)]


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Return the dotted keys that affect a run's results, except the seed.

    An object is given by the name of its yaml: ``switch.criterion._target_:
    switchlora.criteria.UpdateNorm`` becomes ``switch.criterion: update_norm``.
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
    """Return the name of the yaml in conf that an object was built from.

    When several yamls build the same class, the one that agrees in most values is taken. Without
    any such yaml, return the name of the object's class or function.
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
    """Return the name and values of every yaml of a config group, such as 'switch.criterion'."""
    files = sorted(CONF.joinpath(*group.split(".")).glob("*.yaml"))
    loaded = ((file.stem, OmegaConf.to_container(OmegaConf.load(file))) for file in files)
    return [(stem, dict(leaves(content))) for stem, content in loaded]


def telling_settings(all_settings: Sequence[Settings]) -> list[Settings]:
    """Keep, for each row, only the settings that distinguish it.

    - A key is compared among the rows that use the same classes.
    - For full training, switch and adapter keys are dropped, except the criterion.
    - A value that the full and the adapter phase share is listed once.
    - A switch, adapter or monitor key is compared only among the rows of one method.
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
    """Return one label per row: its method and criterion, then short keys with their values."""
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
    """Return the last parts of a dotted key, as few as distinguish it from the other ``keys``."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        tail = parts[-depth:]
        if sum(other.split(".")[-depth:] == tail for other in keys) == 1:
            return ".".join(tail)
    return key


def value_text(value: Any) -> str:
    """Return a short text for a value of a configuration."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, Mapping):
        inner = {k: v for k, v in value.items() if k not in ("_target_", "path")}
        named = str(value.get("path", value.get("_target_", ""))).rpartition(".")[2]
        return f"{named}({', '.join(f'{k}={value_text(v)}' for k, v in inner.items())})"
    return "none" if value is None else str(value)
