"""The configuration: where its files are, how it is built, which of its keys shape a run."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

Config = Mapping[str, Any]
FREE = (
    "name",
    "method",
    "resume",
    "max_skipped",
    "system",
    "log",
    "checkpoint",
    "trunk",
    "objectives",
)
"""groups and keys of a configuration that change no result"""
DIGITS = 10
WANTED = {
    "data.num_classes": "N, the number of class folders",
    "model.name": "NAME, any of timm.list_models(), such as swin_tiny_patch4_window7_224",
}
"""what to give for the keys that have no value until a user gives one"""


def shaping(config: Config) -> dict[str, Any]:
    """Return the dotted keys of ``config`` that shape results, with their values."""
    return {key: value for key, value in leaves(config) if not is_free(key)}


def identity(keys: Mapping[str, Any]) -> str:
    """Return a short name of dotted keys with plain values.

    Equal keys and values give the same name, in any order.
    """
    text = json.dumps(keys, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def differences(old: Config, new: Config) -> list[str]:
    """Return the keys that shape results and differ, as 'key: old there, new here'."""
    before = shaping(old)
    after = shaping(new)
    found = []
    for key in sorted(before.keys() | after.keys()):
        there, here = before.get(key), after.get(key)
        if there != here:
            found.append(f"{key}: {there} there, {here} here")
    return found


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything in nested mappings.

    Lists and empty mappings are values: what is empty differs from what is missing.
    """
    is_empty = bool(prefix) and not config
    if not isinstance(config, Mapping) or is_empty:
        yield prefix, config
        return
    for key, value in config.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def is_free(key: str) -> bool:
    """Return whether a dotted key changes no result; the place of the data is free too."""
    return key.split(".")[0] in FREE or key.endswith("root")


build = partial(instantiate, _convert_="all")


def as_plain(config: DictConfig) -> dict[str, Any]:
    """Return a config as plain dicts and lists, with interpolations resolved.

    ValueError for a key that has no value yet.
    """
    for key, value in leaves(OmegaConf.to_container(config)):
        if value == "???":
            raise ValueError(f"{key} has no value: give {key}={WANTED.get(key, 'VALUE')}")
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def folder_of(name: str) -> Path:
    """Return the folder ``conf`` or ``experiments``, in the package or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
