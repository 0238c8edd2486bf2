"""The configuration: where its files are, how it is built, which of its keys shape a run."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import yaml
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
    "data.skip_unreadable",
    "data.leakage",
    "monitor.device",
)
"""groups and keys of a configuration that change no result"""
DIGITS = 10
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CHOSEN_LATER = "auto"
"""value of a key for which a run finds one on its device"""
WANTED = {
    "data.num_classes": "N, the number of class folders",
    "model.name": "NAME, any of timm.list_models(), such as swin_tiny_patch4_window7_224",
}
"""what to give for the keys that have no value until a user gives one"""
TARGET, PATH = "_target_", "path"
BY_PATH = "hydra.utils.get_method"
"""returns the function at its ``path`` instead of calling it"""
STARTS = ("pretrained", "checkpoint_path")
"""options of a model that read weights to start from"""


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
    """Return the keys that shape results and differ, as 'key: old there, new here'.

    ``CHOSEN_LATER`` here agrees with what the old run found on its device.
    """
    before = shaping(old)
    after = shaping(new)
    found = []
    for key in sorted(before.keys() | after.keys()):
        there, here = before.get(key), after.get(key)
        if here not in (there, CHOSEN_LATER):
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
    """Return whether a dotted key or a group changes no result.

    The place of the data is free too.
    """
    return re.split(r"[./]", key)[0] in FREE or key in FREE or key.endswith("root")


build = partial(instantiate, _convert_="all")


def build_saved(config: Config, where: str, allow: Collection[str] = ()) -> Any:
    """Build what a file describes; ValueError, by ``where`` and name, for what is not ours.

    A file may be anybody's, and what it names would run. So every name in it must stand in a yaml
    of this program, or in ``allow``: the names that the user gave.
    """
    check_saved(config, where, allow)
    return build(config)


def check_saved(config: Any, where: str, allow: Collection[str] = ()) -> None:
    """Raise ValueError unless all that ``build`` would look up is ours or in ``allow``.

    A reference such as ``${key}`` is refused too: saved configurations have none, and it may
    become any name.
    """
    if isinstance(config, str) and "${" in config:
        raise ValueError(f"{where} is '{config}': a saved configuration has no references")
    for key, value in _inside(config):
        check_saved(value, f"{where}{key}", allow)
    for name in _named(config):
        if name not in our_names() and name not in allow:
            raise ValueError(
                f"{where} is to be built by '{name}', which is no part of this program, and what "
                f"a file names is not run; if it is yours, allow it: --allow {name}, or "
                f"allow=['{name}'] in Python"
            )


@cache
def our_names() -> frozenset[str]:
    """Return all classes and functions that the groups of this program name."""
    return frozenset(names_in_yamls(folder_of("conf")))


def read_yaml(path: Path) -> Any:
    """Return what the yaml at ``path`` holds; ValueError that names a file which is no yaml."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), FAST_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no yaml: {error}") from error


def names_in_yamls(folder: Path) -> set[str]:
    """Return all classes and functions that the yamls in the folders of ``folder`` name."""
    found: set[str] = set()
    for path in folder.glob("*/**/*.yaml"):
        found.update(_all_named(read_yaml(path)))
    return found


def _all_named(config: Any) -> Iterator[str]:
    yield from _named(config)
    for _, value in _inside(config):
        yield from _all_named(value)


def _named(config: Any) -> Iterator[str]:
    """Yield the names that ``build`` looks up for this very mapping, not for those inside."""
    if not isinstance(config, Mapping) or TARGET not in config:
        return
    yield str(config[TARGET])
    if config[TARGET] == BY_PATH:
        yield str(config.get(PATH, config))


def _inside(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the key, as it is written behind that of the whole, and the value of each element."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield f".{key}", value
    if isinstance(config, list | tuple):
        for number, value in enumerate(config):
            yield f"[{number}]", value


def without_start(model: Config) -> dict[str, Any]:
    """Return the configuration of a model that gets its weights later, and reads none itself."""
    return {key: value for key, value in model.items() if key not in STARTS}


def from_environment(config: DictConfig) -> list[str]:
    """Return the keys whose values refer to the environment, but for the place of the data."""
    found = []
    for key, value in leaves(OmegaConf.to_container(config)):
        if "${oc.env:" in str(value) and not key.endswith("root"):
            found.append(key)
    return found


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
