"""Apply Hydra overrides to a run's own policy, and refuse those that cannot be replayed."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from switchlora.config import build_saved, is_free, leaves, names_in_yamls
from switchlora.policy import SwitchPolicy
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import Record

REPLAYED = ("switch", "adapter")
"""parts of a configuration that do not affect the full phase"""
BASE = "replayed_run"
AS_CONFIGURED = "as configured"
Setting = tuple[str, ...]  # overrides with one value each, not a sweep of values


def split(words: Sequence[str]) -> list[Setting]:
    """Return every combination of the swept values, as ``switchlora -m`` would make runs."""
    overrides = parsed(words)
    (combinations,) = BasicSweeper.split_arguments(overrides, None)
    return list(map(tuple, combinations))


def parsed(words: Sequence[str]) -> list[Override]:
    """Parse overrides with Hydra."""
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(list(words))


def labels(settings: Sequence[Setting]) -> list[str]:
    """Return short names of settings: the overrides that differ between them, shortened."""
    shared: set[str] = set()
    if len(settings) > 1:
        shared = set.intersection(*map(set, settings))
    names = []
    short_names = []
    for setting in settings:
        own = [word for word in setting if word not in shared]
        names.append(", ".join(own) or AS_CONFIGURED)
        short_names.append(", ".join(map(short, own)) or AS_CONFIGURED)
    distinct = len(set(short_names)) == len(short_names)
    return short_names if distinct else names


def short(word: str) -> str:
    """Return an override without the path of its key: 'tau=1', or 'prelora' for a choice."""
    key, _, value = word.partition("=")
    return value if "/" in key else f"{key.split('.')[-1]}={value}"


def policy_of(
    record: Record, setting: Setting, config_dir: Path | None, allow: Setting = ()
) -> SwitchPolicy:
    """Return the run's own policy with a setting's changes.

    Raise ValueError when a change needs a new run, or when the run names a class or function that
    neither this program nor the user names.
    """
    overrides = parsed(setting)
    refuse_other_full_phase(record, overrides)
    try:
        policy = composed(base_of(record, overrides), setting, config_dir, allow)
    except USER_ERRORS as error:
        raise ValueError(f"{record.folder.name}: {one_line(error)}{hint(overrides)}") from error
    except RecursionError as error:
        raise ValueError(f"{record.folder.name}: its configuration refers to itself") from error
    for key in ("targets", "split_qkv"):
        own = record.config["switch"].get(key, getattr(policy, key))
        if getattr(policy, key) != own:
            raise ValueError(
                f"switch.{key} says what is measured: {record.folder.name} has the statistics "
                f"of {key}={own} only; train a run with the other value"
            )
    return policy


def hint(overrides: Sequence[Override]) -> str:
    """Return a hint for an override of a criterion's value that names no criterion, or ''."""
    keys = set(map(path_of, overrides))
    if "switch" in keys or "switch.criterion" in keys:
        return ""
    if not any(".criterion." in key for key in keys):
        return ""
    return "; without switch/criterion=... it is the run's own criterion that is replayed"


def refuse_other_full_phase(record: Record, overrides: Sequence[Override]) -> None:
    """Raise ValueError for the first override that would have changed the history itself."""
    trained = dict(leaves(record.config))
    for override in overrides:
        key = path_of(override)
        same = key in trained and trained[key] == override.value()
        if key.split(".")[0] in REPLAYED or same or is_free(key):
            continue
        refused = f"{override.input_line} cannot be replayed"
        if key == "monitor.window":
            raise ValueError(
                f"{refused}: {record.folder.name} measured windows of {trained[key]}, from which "
                "others cannot be made; train a run with it"
            )
        raise ValueError(
            f"{refused}: it would change the full phase, of which there is only the logged "
            "history; give switch.* and adapter.* only"
        )


def path_of(override: Override) -> str:
    """Return the dotted place in the configuration that an override changes."""
    return override.package or override.key_or_group.replace("/", ".")


def base_of(record: Record, overrides: Sequence[Override]) -> str:
    """Return the run's configuration as JSON, for Hydra to compose.

    The parts that an override chooses anew are replaced by entries in a defaults list. Runs that
    differ only in seed or name give the same JSON.
    """
    own = {**record.config, "seed": None, "name": None}
    config = json.loads(json.dumps(own))  # a deep copy of plain values
    defaults: list[Any] = ["_self_"]
    for choice in outer_choices(overrides):
        remove(path_of(choice), config)
        defaults.append({choice.get_key_element(): choice.value()})
    config.pop("hydra", None)
    return json.dumps({**config, "defaults": defaults})


def outer_choices(overrides: Sequence[Override]) -> list[Override]:
    """Return the overrides that choose a yaml, without those inside a place that is chosen."""
    choices = list(filter(is_choice, overrides))
    outer = []
    for choice in choices:
        if not any(below(choice, other) for other in choices):
            outer.append(choice)
    return outer


def remove(key: str, config: dict[str, Any]) -> None:
    """Remove the dotted ``key`` from nested dictionaries, if it is there."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config.get(parent, {})
    config.pop(last, None)


@cache
def composed(base: str, setting: Setting, config_dir: Path | None, allow: Setting) -> SwitchPolicy:
    """Let Hydra apply ``setting`` to a base from ``base_of``, and return the policy."""
    ConfigStore.instance().store(BASE, json.loads(base))
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    switch = compose(BASE, overrides=[*setting, *search]).switch
    plain: Any = OmegaConf.to_container(switch, resolve=True)
    return build_saved(plain, "switch", {*allow, *named_by_user(setting, config_dir)})


def named_by_user(setting: Setting, config_dir: Path | None) -> set[str]:
    """Return the values of the command line, and what the user's own yamls name."""
    named = {word.partition("=")[2].strip("'\"") for word in setting}
    return named | (names_in_yamls(config_dir) if config_dir else set())


def is_choice(override: Override) -> bool:
    """Return whether an override chooses a yaml of a group instead of giving a value."""
    key = override.key_or_group
    return "/" in key or override.package is not None or key == "switch"


def below(choice: Override, other: Override) -> bool:
    """Return whether the place that ``choice`` changes lies within that of ``other``."""
    return path_of(choice).startswith(f"{path_of(other)}.")
