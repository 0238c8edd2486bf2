"""What makes two runs the same: the keys of a configuration that shape results."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

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


def shaping(config: Config) -> dict[str, Any]:
    """The dotted keys of ``config`` that shape results, with their values."""
    return {key: value for key, value in leaves(config) if not is_free(key)}


def identity(keys: Mapping[str, Any]) -> str:
    """A short name of dotted keys with plain values: the same for the same, in any order."""
    text = json.dumps(keys, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def differences(old: Config, new: Config) -> list[str]:
    """Keys that shape results and differ, as 'key: old there, new here'."""
    before, after = shaping(old), shaping(new)
    return [
        f"{key}: {before.get(key)} there, {after.get(key)} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested mappings; lists are values."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config


def is_free(key: str) -> bool:
    """Whether a dotted key changes no result: where data lies is free too."""
    return key.split(".")[0] in FREE or key.endswith("root")
