"""The words of the command line: what is a group, what a key, and what was probably meant."""

import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.config_repository import ConfigRepository

from switchlora.config import folder_of, leaves, read_yaml
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
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
HOME = re.compile(r"(?<=[=,])~(?=[/,]|$)")
NO_BRACKETS = re.compile(r"\\.|'[^']*'|\"[^\"]*\"", re.S)
"""parts of a word in which Hydra sees no brackets"""
MISSING_KEY = re.compile(r"Could not override '([\w.]+)'")
MISSING_INSIDE = re.compile(
    r"Key '(?P<option>\w+)' is not in struct\s+full_key: (?P<place>[\w.]+)\.\1\b"
)
"""an option that a section given as a value lacks"""
MISSING_PLUGIN = re.compile(r"Could not find 'hydra/(launcher|sweeper)/([a-z]+)")
UNREADABLE = re.compile(r"(no viable alternative|mismatched|extraneous|token recognition error).*")
ADDS = re.compile(r"(?P<sign>\+\+?|~)full\.(?P<leaf>(optimizer|scheduler)\.[\w.]+)(=.*)?", re.S)
FOLLOWED = ("full.optimizer.", "full.scheduler.")
"""what the keys begin with that the adapter phase follows one by one"""
MEANT = {
    "optimizer": "recipe@full=sgd",
    "full.optimizer": "recipe@full=sgd",
    "log.sinks": "log/sinks=tensorboard",
    "log.tensorboard": "log/sinks=tensorboard",
    "log.mlflow": "log/sinks=mlflow",
    "tensorboard": "log/sinks=tensorboard",
    "mlflow": "log/sinks=mlflow",
}
"""what sets a thing that is no key of its own"""
WITHOUT_DEFAULT = ("method", "experiments")
"""groups of which a run has no choice by itself; both are known with and without a plus"""
BASE = "base"
"""the yaml of a group that its others begin with; it is no choice"""
FOR_MULTIRUNS = re.compile(r"\+{0,2}(search|launch|hydra/sweeper|hydra/launcher)=.*")
ALLOWS_THESE = re.compile(r"-\w*m|--multirun|hydra\.mode=.*|-h|-i|-c|-sc|--(?!config|package).*")
"""a multirun, or that nothing is run"""
EXPERIMENT = re.compile(r"\+{0,2}experiments=(?P<name>[\w./]+)")
QUOTE = "quote the whole argument, such as 'full.compile={mode: default}'"


def prepare_words() -> None:
    """Check the words of this process's command line and put them as Hydra wants them."""
    hide_bases()
    sys.argv[1:] = checked(sys.argv[1:])


def checked(words: Sequence[str]) -> list[str]:
    """Return the words as Hydra wants them; ValueError with the line that helps for a mistake.

    - A word without '=' is no setting.
    - A group takes one of its choices, with a slash in its name.
    - A new key needs a section that is there.
    - Flags go behind the settings, since Hydra takes no settings on both sides of a flag.

    ``method=lora`` becomes ``+method=lora``, ``+experiments=demo`` becomes ``experiments=demo``.
    Before a word stands its ``follower``. ``~/`` behind '=' is the home folder: most shells leave
    it as it is.
    """
    places = own_folders(words)
    check_multirun(words, places)
    settings: list[str] = []
    flags: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in FLAGS_WITH_VALUE:
            flags += [word, next(rest, "")]
        elif FLAGS.match(word) or word.startswith(FLAGS_WITH_VALUE):
            flags.append(word)
        else:
            word = HOME.sub(lambda _: os.path.expanduser("~"), word)
            settings += [*follower(word, words), checked_word(word, places)]
    return settings + flags


def check_multirun(words: Sequence[str], places: Sequence[Path]) -> None:
    """Raise ValueError for what only a multirun reads, in the words of a single run."""
    only = list(filter(FOR_MULTIRUNS.fullmatch, words))
    if not only or any(map(ALLOWS_THESE.fullmatch, words)):
        return
    if not is_sweep(words, places):
        raise ValueError(f"{only[0]} does nothing in a single run: write switchlora -m {only[0]}")


def is_sweep(words: Sequence[str], places: Sequence[Path]) -> bool:
    """Return whether the words choose an experiment that is a multirun by itself."""
    for match in filter(None, map(EXPERIMENT.fullmatch, words)):
        for place in places:
            path = place / "experiments" / f"{match['name']}.yaml"
            if path.is_file():
                hydra = read_yaml(path).get("hydra", {})
                return hydra.get("mode") == "MULTIRUN"
    return False


def own_folders(words: Sequence[str]) -> tuple[Path, ...]:
    """Return the folders of configurations: this program's, and the user's with --config-dir."""
    places = [folder_of("conf"), folder_of("experiments").parent]
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        if word in ("--config-dir", "-cd") and following:
            places.append(Path(following))
        elif word.startswith("--config-dir="):
            places.append(Path(word.removeprefix("--config-dir=")))
    return tuple(places)


def checked_word(word: str, places: tuple[Path, ...]) -> str:
    """Return one setting as Hydra wants it; ValueError where it can be none."""
    check_brackets(word)
    match = WORD.match(word)
    if match is None:
        if word.startswith("~"):
            return word
        raise ValueError(no_setting(word, places))
    key = match["key"]
    if key in FOLDERS and match["value"] in ("", "null", "''", '""'):
        raise ValueError(
            f"{key} is empty: the files of a run would lie where you are; give a name"
        )
    if key.startswith(("hydra.", "hydra/")):
        return word
    choices = choices_of(key, places)
    if key == "experiments":
        check_choice_of(word, key, match["value"], choices)
        return word.lstrip("+")
    if key == "method":
        names_choices = all(value in choices for value in match["value"].split(","))
        return f"+{word}" if names_choices and not match["sign"] else word
    if choices or "/" in key:
        check_choice_of(word, key, match["value"], choices)
        return word
    if key in MEANT and is_plain(match["value"]):
        raise ValueError(f"{key} is no key that takes a value: write {MEANT[key]}")
    if "." in key and not match["package"]:
        check_is_no_group(key, match["value"], places)
    if "+" in match["sign"] and key.split(".")[0] not in sections():
        raise ValueError(f"there is no key '{key}'; {near_keys(key)}")
    return word


def check_brackets(word: str) -> None:
    """Raise ValueError for a word that a shell has cut off inside a bracket."""
    plain = NO_BRACKETS.sub("", word)
    for left, right in ("()", "[]", "{}"):
        if plain.count(left) != plain.count(right):
            raise ValueError(f"{word}: not every {left} has its {right}; {QUOTE}")


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
    if re.search(r"[(){}$]", value):
        return
    for choice in re.sub(r"[\[\]\s'\"]", "", value).split(","):
        if choice not in (*choices, "null", ""):
            raise ValueError(f"{word}: choose one of {', '.join(choices)}")


def check_is_no_group(key: str, value: str, places: tuple[Path, ...]) -> None:
    """Raise ValueError for a word or a number as the value of a key that is a group."""
    group = key.replace(".", "/")
    choices = choices_of(group, places)
    if choices and is_plain(value):
        raise ValueError(
            f"{key} is a group: write {group}=CHOICE, one of {', '.join(choices)}; "
            f"its numbers are {key}.KEY=VALUE"
        )


def is_plain(value: str) -> bool:
    """Return whether a value is a word or a number: no mapping, no list, no null."""
    return bool(re.fullmatch(r"[\w.+-]+", value)) and value != "null"


def follower(word: str, words: Sequence[str]) -> list[str]:
    """Return the word with which the adapter phase follows a key that ``word`` adds or deletes.

    For ``+full.optimizer.eps=1e-6`` it is ``+adapter.optimizer.eps=${full.optimizer.eps}``. There
    is none if ``words`` set that key, or choose a recipe of its own for the adapter phase.
    """
    added = ADDS.fullmatch(word)
    if added is None:
        return []
    sign, leaf = added["sign"], added["leaf"]
    keys = {word.lstrip("+~").split("=")[0] for word in words}
    if f"adapter.{leaf}" in keys or "recipe@adapter" in keys:
        return []
    value = "" if sign == "~" else f"=${{full.{leaf}}}"
    return [f"{sign}adapter.{leaf}{value}"]


@cache
def choices_of(group: str, places: tuple[Path, ...]) -> tuple[str, ...]:
    """Return the choices of a group over all folders, () where none knows it."""
    found = set()
    for place in places:
        folder = place / group
        for path in (*folder.glob("*.yaml"), *folder.glob("*/*.yaml")):
            found.add(path.relative_to(folder).with_suffix("").as_posix())
    found.discard(BASE)
    is_group = any("/" not in name for name in found)
    return tuple(sorted(found)) if is_group else ()


def groups() -> list[str]:
    """Return the names of this program's groups: each folder of ``conf`` with a yaml."""
    conf = folder_of("conf")
    return sorted({path.parent.relative_to(conf).as_posix() for path in conf.glob("*/**/*.yaml")})


class Known(NamedTuple):
    """The choices that have a key, '' for a key of every run, and its value in the first yaml."""

    owner: str
    value: Any


@cache
def known_keys() -> dict[str, Known]:
    """Map each key of any yaml to where it is known from.

    Yamls that set keys of several groups, such as methods, come last.
    """
    conf = folder_of("conf")
    found: dict[str, Known] = {}
    add_keys(found, conf / "config.yaml", "", "")
    for names_whole_keys in (False, True):
        for group in groups():
            for path in sorted((conf / group).glob("*.yaml")):
                if sets_whole_keys(path) is names_whole_keys:
                    prefix = "" if names_whole_keys else prefix_of(group, path.stem)
                    add_keys(found, path, prefix, owner_of(group, path.stem))
    for key in filter(lambda key: key.startswith(FOLLOWED), list(found)):
        found[key.replace("full", "adapter", 1)] = found[key]
    return found


def sets_whole_keys(path: Path) -> bool:
    """Return whether a yaml's keys stand as they are, whatever its group."""
    return path.read_text().startswith("# @package _global_")


def owner_of(group: str, choice: str) -> str:
    """Return the words that choose a yaml."""
    if choice == BASE:
        return f"another choice of {group}"
    package = "@full" if group == "recipe" else ""
    return f"{group}{package}={choice}"


def add_keys(found: dict[str, Known], path: Path, prefix: str, owner: str) -> None:
    """Add the keys of a yaml. A key that several choices of a group have belongs to them all."""
    content = read_yaml(path) or {}
    group, _, choice = owner.rpartition("=")
    for key, value in leaves(content):
        if key.split(".")[0] in ("defaults", "hydra") or value == {}:
            continue
        known = found.setdefault(prefix + key, Known(owner, value))
        if group and known.owner.startswith(f"{group}=") and known.owner != owner:
            found[prefix + key] = known._replace(owner=f"{known.owner} or {choice}")


def prefix_of(group: str, choice: str) -> str:
    """Return what stands before the keys of a choice, with its dot."""
    if group == "recipe":
        return "adapter." if choice == "adapter" else "full."
    return group.replace("/", ".") + "."


def sections() -> set[str]:
    """Return the first words of all keys."""
    return {key.split(".")[0] for key in known_keys()} | {"search", "launch"}


def near_keys(key: str) -> str:
    """Return a hint with the keys that end like ``key``, or resemble it."""
    if key in MEANT:
        return f"write {MEANT[key]}"
    last = key.split(".")[-1]
    first = [name for name in known_keys() if "." not in name]
    alike = get_close_matches(key, first, n=2)
    alike += [name for name in known_keys() if name.split(".")[-1] == last]
    return f"near names: {', '.join(alike[:5])}" if alike else near(key, known_keys())


def spelled_out(message: str, section: str) -> str:
    """Return a message of what ``section`` builds, with the names of its keys in full.

    A key stands at the beginning or before '='.

    >>> spelled_out("quorum is 2: give a share above 0, at most 1", "switch.criterion")
    'switch.criterion.quorum is 2: give a share above 0, at most 1'
    """
    above = section.rpartition(".")[0]

    def in_full(word: re.Match) -> str:
        for key in (f"{section}.{word[0]}", f"{above}.{word[0]}"):
            if key in known_keys():
                return key
        return word[0]

    return re.sub(r"^[\w.]+|[\w.]+(?==)", in_full, message)


def explained(message: str) -> str | None:
    """Return a line for one of Hydra's errors; None for others.

    It knows what a missing key, a missing plugin and an argument without quotes look like.
    """
    if unreadable := UNREADABLE.search(message):
        return f"a value cannot be read ({unreadable[0]}); {QUOTE}"
    if plugin := MISSING_PLUGIN.search(message):
        kind, name = plugin.groups()
        return f"this needs a plugin that is not installed: pip install hydra-{name}-{kind}"
    missing = MISSING_KEY.search(message)
    if missing is None:
        return None
    key = missing[1]
    if key in MEANT:
        return f"{key} is no key that takes a value: write {MEANT[key]}"
    inside = MISSING_INSIDE.search(message)
    if inside and inside["place"] == key:
        option = inside["option"]
        return f"{key} has no '{option}' yet: write +{key}.{option}=VALUE"
    owner = known_keys()[key].owner if key in known_keys() else ""
    if owner:
        return f"{key} belongs to {owner}: choose that too"
    return f"there is no key '{key}'; {near_keys(key)}"


@cache
def hide_bases() -> None:
    """Leave the bases out of Hydra's own lists of choices: help, completion, messages."""
    listed = ConfigRepository.get_group_options

    def without_base(*arguments: Any, **options: Any) -> list[str]:
        return [choice for choice in listed(*arguments, **options) if choice != BASE]

    ConfigRepository.get_group_options = without_base  # type: ignore[method-assign]
