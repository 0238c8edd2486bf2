"""The words of the command line: what is a group, what a key, and what was probably meant."""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra._internal.config_repository import ConfigRepository

from switchlora.config import folder_of, leaves
from switchlora.names import near

FLAGS = re.compile(
    r"-(m|h|r|i|sc)$|--(multirun|help|hydra-help|version|run|info|resolve|shell-completion|"
    r"experimental-rerun)\b.*"
)
FLAGS_WITH_VALUE = (
    *("--config-dir", "--config-name", "--config-path", "-cd", "-cn", "-cp"),
    *("--cfg", "-c", "--package", "-p"),
)
WORD = re.compile(r"(?P<sign>[+~]*)(?P<key>[\w./]+)(?P<package>@[\w.:]+)?=(?P<value>.*)", re.S)
MISSING_KEY = re.compile(r"Could not override '([\w.]+)'")
MISSING_PLUGIN = re.compile(r"Could not find 'hydra/(launcher|sweeper)/([a-z]+)")
FOLLOWS = re.compile(r"adapter\.(optimizer|scheduler)\.(\w+)$")
MEANT = {"optimizer": "recipe@full=sgd", "full.optimizer": "recipe@full=sgd"}
"""what sets a thing that is no key of its own"""
WITHOUT_DEFAULT = ("method", "experiments")
"""groups of which a run has no choice by itself; Hydra wants a plus before them"""
BASE = "base"
"""the yaml of a group that its others begin with; it is no choice"""
NUMBERS_OR_WORDS = ("monitor.window",)
"""keys that take a number or a word"""


def checked(words: Sequence[str]) -> list[str]:
    """Return the words as Hydra wants them; ValueError with the line that helps for a mistake.

    - A word without '=' is no setting.
    - A group takes one of its choices, with a slash in its name.
    - A new key needs a section that is there.

    ``method=lora`` and ``experiments=demo`` become ``+method=lora`` and ``+experiments=demo``.
    """
    given = list(words)
    own = own_folders(given)
    found = []
    rest = iter(given)
    for word in rest:
        found.append(word)
        if word in FLAGS_WITH_VALUE:
            found.append(next(rest, ""))
        elif not FLAGS.match(word) and not word.startswith(FLAGS_WITH_VALUE):
            found[-1] = checked_word(word, own)
    return found


def own_folders(words: Sequence[str]) -> tuple[Path, ...]:
    """Return the folders of configurations: this program's, and the user's with --config-dir."""
    places = [folder_of("conf"), folder_of("experiments").parent]
    for position, word in enumerate(words):
        if word in ("--config-dir", "-cd") and position + 1 < len(words):
            places.append(Path(words[position + 1]))
        elif word.startswith("--config-dir="):
            places.append(Path(word.partition("=")[2]))
    return tuple(places)


def checked_word(word: str, places: tuple[Path, ...]) -> str:
    """Return one setting as Hydra wants it; ValueError where it can be none."""
    match = WORD.match(word)
    if match is None:
        if word.startswith("~"):
            return word
        raise ValueError(no_setting(word, places))
    sign, key, value = match["sign"], match["key"], match["value"]
    if key.startswith(("hydra.", "hydra/")):
        return word
    choices = choices_of(key, places)
    if value in choices and not sign and key in WITHOUT_DEFAULT:
        return f"+{word}"
    if "/" in key or (choices and key not in WITHOUT_DEFAULT):
        check_choice_of(word, key, value, choices)
    group = key.replace(".", "/")
    if "." in key and not match["package"] and choices_of(group, places) and is_plain(value):
        raise ValueError(
            f"{key} is a group: write {group}=CHOICE, one of "
            f"{', '.join(choices_of(group, places))}; its numbers are {key}.KEY=VALUE"
        )
    top = key.split(".")[0]
    if sign == "+" and not choices and top not in sections():
        raise ValueError(f"there is no key '{key}'; {near_keys(key)}")
    return word


def no_setting(word: str, places: tuple[Path, ...]) -> str:
    """Return a line on a word that sets nothing."""
    name = word.lstrip("-")
    if word.startswith("-") and name:
        return f"'{word}' is no option: write {name}=VALUE without dashes; see switchlora --help"
    for group in WITHOUT_DEFAULT:
        if word in choices_of(group, places):
            return f"'{word}' sets nothing: write +{group}={word}"
    return f"'{word}' sets nothing: write KEY=VALUE, such as epochs=3; see switchlora --help"


def check_choice_of(word: str, group: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` names choices of a group, or nothing."""
    if not choices:
        raise ValueError(f"there is no group '{group}'; {near(group, groups())}")
    for choice in value.split(","):
        if choice not in (*choices, "null", "") and not re.search(r"[\[\](){}$]", value):
            raise ValueError(f"{word}: choose one of {', '.join(choices)}")


def is_plain(value: str) -> bool:
    """Return whether a value is a word or a number: no mapping, no list, no null."""
    return bool(re.fullmatch(r"[\w.+-]+", value)) and value != "null"


@cache
def choices_of(group: str, places: tuple[Path, ...]) -> tuple[str, ...]:
    """Return the choices of a group over all folders, () where none knows it."""
    found = {path.stem for place in places for path in (place / group).glob("*.yaml")} - {BASE}
    nested = {
        f"{path.parent.name}/{path.stem}"
        for place in places
        for path in (place / group).glob("*/*.yaml")
    }
    return tuple(sorted(found | nested)) if found else ()


def groups() -> list[str]:
    """Return the names of this program's groups: each folder of ``conf`` with a yaml."""
    conf = folder_of("conf")
    folders = {path.parent for path in conf.rglob("*.yaml")} - {conf}
    return sorted(folder.relative_to(conf).as_posix() for folder in folders)


class Known(NamedTuple):
    """The first yaml that has a key: its choice, '' for those of every run, and its value."""

    owner: str
    value: Any


@cache
def known_keys() -> dict[str, Known]:
    """Map each key of any yaml to where it is known from."""
    conf = folder_of("conf")
    found = {key: Known("", value) for key, value in leaves(load(conf / "config.yaml"))}
    for group in groups():
        for path in sorted((conf / group).glob("*.yaml")):
            if not path.read_text().startswith("# @package _global_"):
                choice = f"{group}={path.stem}"
                if path.stem == BASE:
                    choice = f"another choice of {group}"
                for key, value in leaves(load(path)):
                    found.setdefault(prefix_of(group, path.stem) + key, Known(choice, value))
    return found


def check_kinds(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a word in the place of a number, a switch or a section of keys."""
    for key, value in leaves(config):
        if not isinstance(value, str | bool | int | float):
            continue
        inside = sorted(name for name in known_keys() if name.startswith(f"{key}."))
        if inside:
            parts = dict.fromkeys(name.removeprefix(f"{key}.").split(".")[0] for name in inside)
            raise ValueError(
                f"{key} is '{value}': it holds {', '.join(parts)}; set one of these, such as "
                f"{inside[0]}=VALUE"
            )
        if isinstance(value, str) and key in known_keys() and key not in NUMBERS_OR_WORDS:
            default = known_keys()[key].value
            if isinstance(default, bool):
                raise ValueError(f"{key} is '{value}': give true or false")
            if isinstance(default, int | float):
                raise ValueError(f"{key} is '{value}': give a number, such as {default}")


def prefix_of(group: str, choice: str) -> str:
    """Return what stands before the keys of a choice, with its dot."""
    if group == "recipe":
        return "adapter." if choice == "adapter" else "full."
    return group.replace("/", ".") + "."


def load(path: Path) -> dict[str, Any]:
    """Return the content of a yaml, its defaults list left out."""
    content = yaml.safe_load(path.read_text()) or {}
    return {key: value for key, value in content.items() if key not in ("defaults", "hydra")}


def sections() -> set[str]:
    """Return the first words of all keys."""
    return {key.split(".")[0] for key in known_keys()} | {"adapter", "switch", "search", "launch"}


def near_keys(key: str) -> str:
    """Return a hint with the keys that end like ``key``, or resemble it."""
    if key in MEANT:
        return f"write {MEANT[key]}"
    last = key.split(".")[-1]
    alike = sorted(name for name in known_keys() if name.split(".")[-1] == last)
    return f"near names: {', '.join(alike[:5])}" if alike else near(key, known_keys())


def explained(message: str) -> str | None:
    """Return a line for Hydra's error on a key or a plugin that is not there; None for others."""
    if plugin := MISSING_PLUGIN.search(message):
        kind, name = plugin.groups()
        return f"this needs a plugin that is not installed: pip install hydra-{name}-{kind}"
    missing = MISSING_KEY.search(message)
    if missing is None:
        return None
    key = missing[1]
    if key in MEANT:
        return f"{key} is no key that takes a value: write {MEANT[key]}"
    if follows := FOLLOWS.match(key):
        phase = f"full.{follows[1]}.{follows[2]}"
        scale = "; adapter.lr_scale scales all rates of the adapter phase" * (follows[2] == "lr")
        return f"adapter.{follows[1]} follows full.{follows[1]}: set {phase}{scale}"
    if key in known_keys() and known_keys()[key].owner:
        return f"{key} belongs to {known_keys()[key].owner}: choose that too"
    return f"there is no key '{key}'; {near_keys(key)}"


@cache
def hide_bases() -> None:
    """Leave the bases out of Hydra's own lists of choices: help, completion, messages."""
    listed = ConfigRepository.get_group_options

    def without_base(*arguments: Any, **options: Any) -> list[str]:
        return [choice for choice in listed(*arguments, **options) if choice != BASE]

    ConfigRepository.get_group_options = without_base  # type: ignore[method-assign]


def prepare_words() -> None:
    """Check the words of this process's command line and put them as Hydra wants them."""
    hide_bases()
    sys.argv[1:] = checked(sys.argv[1:])
