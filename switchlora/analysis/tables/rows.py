"""Group runs into the rows of a table, and name each row by what distinguishes it.

The runs of one row differ only in their seed.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from switchlora.analysis.figures import run_labels
from switchlora.analysis.tables.columns import Cell, Column
from switchlora.config import folder_of, identity, leaves, shaping
from switchlora.storage import Record

CONF = folder_of("conf")
CRITERION, NEVER = "switch.criterion", "never"
METHOD = "method"
LENGTH = "length"
OF_METHODS = ("switch.", "adapter.", "monitor.")  # keys that the name of a method stands for
FULL_TRAINING = "full training"
OPTIMIZER = "full.optimizer"
SMALLER_STATES = ("GaLore", "Fira", "Apollo")
"""optimizers that train in full with a smaller state: no baseline, but what a switch must beat"""
OF_OPTIMIZERS = (*SMALLER_STATES, "LoRARite")
"""optimizers that are a method, whose name stands for the keys of the full phase too"""
THRESHOLDS = {
    "update_norm": "switch.criterion.fraction",
    "prelora": "switch.criterion.tau",
}
"""by criterion, the threshold that at 0 keeps it from firing"""
UNUSED_BY_FULL_TRAINING = ("switch.", "adapter.")
NUMBER = r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
Settings = dict[str, Any]
NaturalKey = list[tuple[float, str]]
Members = list[tuple[Record, ...]]
"""the runs of each row"""


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
        """Whether its criterion is 'never', or one that cannot fire and did not.

        False for an optimizer whose state is smaller than that of full training.
        """
        if not self.records or self.has_smaller_state:
            return False
        return bool(named_full(self.records)[CRITERION] == NEVER)

    @property
    def has_smaller_state(self) -> bool:
        """Whether its optimizer keeps the moments of matrices in a subspace."""
        return bool(self.records) and _optimizer(self.records[0]) in SMALLER_STATES

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
    references: Mapping[Path, Sequence[Record]] = field(default_factory=dict)
    """by folder of a run, the runs of full training that it is compared with"""


def make_rows(records: Sequence[Record]) -> tuple[list[Row], list[str]]:
    """Return rows without cells, full training first, and notes on duplicate runs.

    Of several runs with the same configuration and seed only the first counts. No seed then has
    double weight.
    """
    members, notes = by_configuration(records)
    settings = telling_settings(with_methods(members))
    rows = []
    named = zip(labels(settings), settings, members, strict=True)
    for label, told, runs in named:
        rows.append(Row(label, told, runs, {}))
    return sorted(rows, key=_full_training_first), notes


def _optimizer(record: Record) -> str:
    """Return the name of the class of the full phase's optimizer."""
    return str(settings_of(record.config).get(OPTIMIZER, ""))


def _full_training_first(row: Row) -> tuple[bool, NaturalKey]:
    return not row.trains_in_full, natural(row.label)


def by_configuration(records: Sequence[Record]) -> tuple[Members, list[str]]:
    """Return the runs of each configuration by seed, and notes on duplicate runs."""
    groups: dict[str, dict[int, Record]] = {}
    notes = []
    in_order = sorted(records, key=lambda record: natural(str(record.folder)))
    for record in in_order:
        configuration = identity(without_seed(record.config))
        by_seed = groups.setdefault(configuration, {})
        first = by_seed.setdefault(record.config["seed"], record)
        if first is not record:
            name, again = run_labels([first.folder, record.folder])
            notes.append(f"{again}: not counted, the same configuration and seed as {name}.")
    members = []
    for by_seed in groups.values():
        members.append(tuple(by_seed[seed] for seed in sorted(by_seed)))
    return members, notes


def without_seed(config: Mapping[str, Any]) -> Settings:
    """Return the dotted keys that shape a run's results, except the seed."""
    keys = shaping(config)
    keys.pop("seed", None)
    return keys


def with_methods(members: Members) -> list[Settings]:
    """Return the settings of each row, with its ``method`` when the rows have different methods.

    A row without a method gets the name of its criterion instead.
    """
    found = list(map(named_full, members))
    if len(set(map(repr, found))) < len(found):
        found = [named_full(row, keep=True) for row in members]
    methods = list(map(method_of, members))
    if len(set(methods)) < 2:
        return found
    named = []
    for settings, method in zip(found, methods, strict=True):
        named.append({METHOD: method or criterion_name(settings), **settings})
    return named


def named_full(row: Sequence[Record], keep: bool = False) -> Settings:
    """Return the settings of a row; those of full training when its criterion cannot fire.

    ``keep`` keeps the keys of that criterion.
    """
    settings = settings_of(row[0].config)
    if not cannot_fire(settings) or any(map(_fired, row)):
        return settings
    kept = {}
    for key, value in settings.items():
        if keep or not key.startswith(f"{CRITERION}."):
            kept[key] = value
    return {**kept, CRITERION: NEVER}


def cannot_fire(settings: Settings) -> bool:
    """Return whether a criterion's threshold or date is one that no run reaches."""
    threshold = settings.get(THRESHOLDS.get(settings.get(CRITERION, ""), ""))
    if threshold is not None:
        return threshold <= 0
    date = settings.get(f"{CRITERION}.epoch")
    if settings.get(CRITERION) != "at_epoch" or date is None:
        return False
    return date >= settings.get("epochs", math.inf)


def _fired(record: Record) -> bool:
    switch = (record.summary or {}).get("switch") or {}
    return bool(switch.get("fired"))


def method_of(row: Sequence[Record]) -> str | None:
    """Return the ``method`` that the first of a row's runs with a method has."""
    for record in row:
        if record.config.get(METHOD):
            return record.config[METHOD]
    return None


def criterion_name(settings: Settings) -> str:
    """Return how a label names a row's criterion."""
    criterion = settings[CRITERION]
    return FULL_TRAINING if criterion == NEVER else criterion


def natural(text: str) -> NaturalKey:
    """Return a sort key that orders the numbers inside a text by their value."""
    key: NaturalKey = []
    for place, part in enumerate(re.split(NUMBER, text)):
        is_number = place % 2 == 1
        if is_number:
            key.append((float(part), ""))
        else:
            key.append((-1.0, part))
    return key


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Return the dotted keys that affect a run's results, except the seed.

    An object is given by the name of its yaml: ``switch.criterion._target_:
    switchlora.criteria.UpdateNorm`` becomes ``switch.criterion: update_norm``.
    """
    keys = without_seed(config)
    settings = {}
    for key, value in keys.items():
        parent, _, last = key.rpartition(".")
        names_object = last == "path" and f"{parent}._target_" in keys
        if last == "_target_":
            settings[parent] = group_name(parent, keys)
        elif last != "_partial_" and not names_object:
            settings[key] = value
    return settings


def group_name(parent: str, keys: Mapping[str, Any]) -> str:
    """Return the name of the yaml in conf that an object was built from.

    When several yamls build the same class, the one that agrees in most values is taken. Without
    any such yaml, return the name of the object's class or function.
    """
    target = keys[f"{parent}._target_"]
    path = keys.get(f"{parent}.path")
    best = path or target
    most = -1
    for stem, values in yamls(parent):
        if values.get("_target_") != target or values.get("path") != path:
            continue
        agreeing = 0
        for key, value in values.items():
            if keys.get(f"{parent}.{key}") == value:
                agreeing += 1
        if agreeing > most:
            best = stem
            most = agreeing
    return best.rpartition(".")[2]


@cache
def yamls(group: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and values of every yaml of a config group, such as 'switch.criterion'."""
    folder = CONF.joinpath(*group.split("."))
    found = []
    for file in sorted(folder.glob("*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(file))
        found.append((file.stem, dict(leaves(content))))
    return found


def telling_settings(all_settings: Sequence[Settings]) -> list[Settings]:
    """Keep, for each row, only the settings that distinguish it.

    - A key is compared among the rows that use the same classes.
    - For full training, switch and adapter keys are dropped, except the criterion.
    - A value that the full and the adapter phase share is listed once.
    - A switch, adapter or monitor key is compared only among the rows of one method. So is a key
      of the full phase whose optimizer is a method.
    """
    told = [_distinguishing(settings, all_settings) for settings in all_settings]
    if len(set(map(repr, told))) == len(told):
        return told
    differ: set[str] = set()
    for settings, other in product(all_settings, repeat=2):
        for key, value in settings.items():
            if other.get(key) != value:
                differ.add(key)
    if any(settings.get(CRITERION) == NEVER for settings in all_settings):
        differ.add(CRITERION)
    return [_subset(settings, differ) for settings in all_settings]


def _distinguishing(settings: Settings, all_settings: Sequence[Settings]) -> Settings:
    telling = [key for key in settings if _tells(key, settings, all_settings)]
    if not telling:
        return {CRITERION: settings[CRITERION]}
    found = _subset(settings, telling)
    return {key: value for key, value in found.items() if not _repeats_full(key, found)}


def _subset(settings: Settings, keys: Collection[str]) -> Settings:
    return {key: value for key, value in settings.items() if key in keys}


def _tells(key: str, settings: Settings, all_settings: Sequence[Settings]) -> bool:
    """Return whether a key has another value in a row that it can be compared with."""
    for other in all_settings:
        if other.get(key) != settings[key] and _comparable(key, settings, other):
            return True
    return False


def _comparable(key: str, settings: Settings, other: Settings) -> bool:
    """Return whether ``key`` belongs to the same object in two rows that both use it."""
    if other.get(METHOD) != settings.get(METHOD):
        optimizers = {settings.get(OPTIMIZER), other.get(OPTIMIZER)}
        is_of_optimizer = key.startswith("full.") and optimizers.intersection(OF_OPTIMIZERS)
        if key.startswith(OF_METHODS) or is_of_optimizer:
            return False
    if key.startswith(UNUSED_BY_FULL_TRAINING) and key != CRITERION:
        criteria = (settings.get(CRITERION), other.get(CRITERION))
        if NEVER in criteria:
            return False
    parent = key.rpartition(".")[0]
    while parent:
        if other.get(parent) != settings.get(parent):
            return False
        parent = parent.rpartition(".")[0]
    return True


def _repeats_full(key: str, settings: Settings) -> bool:
    """Return whether a key of the adapter phase has the value that it has in the full phase."""
    twin = key.replace("adapter.", "full.", 1)
    is_of_adapter = key.startswith("adapter.")
    return is_of_adapter and twin in settings and settings[twin] == settings[key]


def labels(told: Sequence[Settings]) -> list[str]:
    """Return one label per row: its method and criterion, then short keys with their values."""
    keys: set[str] = set().union(*told)
    return [_label(settings, keys) for settings in told]


def _label(settings: Settings, keys: set[str]) -> str:
    words = []
    if METHOD in settings:
        words.append(str(settings[METHOD]))
    if CRITERION in settings:
        words.append(criterion_name(settings))
    for key, value in settings.items():
        is_whole = key == LENGTH and value == 1
        if key not in (METHOD, CRITERION) and not is_whole:
            words.append(f"{short_key(key, keys)}={value_text(value)}")
    return ", ".join(words)


def short_names(labels: Sequence[str]) -> list[str]:
    """Return the labels of rows without the first word that all rows with several words share."""
    heads = {label.split(", ")[0] for label in labels if ", " in label}
    if len(heads) != 1:
        return list(labels)
    (head,) = heads
    return [label.removeprefix(f"{head}, ") for label in labels]


def run_names(records: Sequence[Record]) -> list[str]:
    """Return names of runs by their settings and seeds, such as 'fraction=0.3, seed 0'.

    Runs are named by their folders when their settings do not tell them apart.
    """
    folders = run_labels([record.folder for record in records])
    if not all(CRITERION in settings_of(record.config) for record in records):
        return folders
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(identity(without_seed(record.config)), []).append(record)
    told = telling_settings(with_methods(list(map(tuple, groups.values()))))
    of_groups = dict(zip(groups, _short_labels(told), strict=True))
    names = []
    for record in records:
        label = of_groups[identity(without_seed(record.config))]
        names.append(f"{label}, seed {record.config.get('seed', 0)}")
    counts = Counter(names)
    for place, folder in enumerate(folders):
        if counts[names[place]] > 1:
            names[place] = f"{names[place]} ({folder})"
    return names


def _short_labels(told: Sequence[Settings]) -> list[str]:
    """Return labels of rows: no criterion where the rows that switch differ in one other key."""
    switching = [settings for settings in told if settings.get(CRITERION) != NEVER]
    keys: set[str] = set().union(*switching)
    criteria = {settings.get(CRITERION) for settings in switching}
    keys -= {CRITERION}
    if METHOD in keys or len(keys) != 1 or len(criteria) != 1:
        return labels(told)
    (key,) = keys
    short = []
    for settings, label in zip(told, labels(told), strict=True):
        if settings in switching:
            label = f"{short_key(key, keys)}={value_text(settings[key])}"
        short.append(label)
    return short


def short_key(key: str, keys: set[str]) -> str:
    """Return the last parts of a dotted key, as few as distinguish it from the other ``keys``."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        tail = ".".join(parts[-depth:])
        alike = [other for other in keys if f".{other}".endswith(f".{tail}")]
        if alike == [key]:
            return tail
    return key


def value_text(value: Any) -> str:
    """Return a short text for a value of a configuration."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, Mapping):
        return _object_text(value)
    return "none" if value is None else str(value)


def _object_text(value: Mapping[str, Any]) -> str:
    """Return the name of an object's class or function, and its arguments."""
    path = value.get("path", value.get("_target_", ""))
    name = str(path).rpartition(".")[2]
    arguments = []
    for key, argument in value.items():
        if key not in ("_target_", "path"):
            arguments.append(f"{key}={value_text(argument)}")
    return f"{name}({', '.join(arguments)})"
