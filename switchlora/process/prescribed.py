"""Keys that a method and an experiment both set: which of the two stands, and what is refused.

Hydra composes the method after the experiment, in whatever order they are given: ``experiments``
stands in the defaults of ``conf/config.yaml``, methods are added behind it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from switchlora.config import leaves, read_yaml
from switchlora.process import distributed
from switchlora.process.talking import say

OF_METHODS = ("length", "monitor", "switch", "adapter")
"""what belongs to the method, which knows its authors' values; the task, such as data, epochs and
the schedule, belongs to the experiment"""
OVERRIDE = "override /"


def tell_overruled(config: DictConfig, hydra: HydraConf | DictConfig) -> None:
    """Say what the method sets in place of the experiment; ValueError for what neither may."""
    for line in overruled(config, hydra):
        if distributed.is_primary():
            say(line)


def overruled(config: DictConfig, hydra: HydraConf | DictConfig) -> list[str]:
    """Return a line for each key of the experiment in whose place the method's value stands.

    ValueError where the method's value would be lost, or would change the experiment's task. A
    key that the command line sets is the user's, and no clash.
    """
    chosen = hydra.runtime.choices
    method, experiment = chosen.get("method"), chosen.get("experiments")
    if not method or not experiment:
        return []
    sources = hydra.runtime.config_sources
    places = [Path(source.path) for source in sources if source.schema == "file"]
    names = f"method={method}", f"experiments={experiment}"
    its = prescribed(places, "method", method)
    others = prescribed(places, "experiments", experiment)
    swept = hydra.sweeper.get("params") or {}
    words = [word.partition("=")[0].lstrip("+~") for word in hydra.overrides.task]
    found = {**dict(leaves(OmegaConf.to_container(config))), **chosen}
    lines = []
    for key, value in its.items():
        by_user = words.count(key) > (key in swept)
        if key == "method" or by_user:
            continue
        if key in swept and found.get(key) != value:
            raise ValueError(lost(key, value, *names))
        if key in others and others[key] != value:
            lines.append(replaced(key, value, others[key], *names))
    return lines


def lost(key: str, value: Any, method: str, experiment: str) -> str:
    """Return a line on a value of the method that the experiment's sweep would replace."""
    return (
        f"{experiment} sweeps over {key}, which {method} sets to {value}: take another method, "
        f"or give {key}=VALUE yourself"
    )


def replaced(key: str, value: Any, other: Any, method: str, experiment: str) -> str:
    """Return a line on a value of the experiment that the method replaces.

    ValueError for a key that belongs to the experiment.
    """
    if re.split(r"[./]", key)[0] not in OF_METHODS:
        raise ValueError(
            f"{method} sets {key}={value} and {experiment} sets {key}={other}: the key belongs to "
            f"the experiment; take it out of the method, or give {key}=VALUE yourself"
        )
    return f"{method} sets {key}={value}, in place of {other} of {experiment}"


def prescribed(places: Sequence[Path], group: str, name: str) -> dict[str, Any]:
    """Return what a yaml of a group sets, with the yamls that it begins with.

    Choices stand under their group, 'switch/rank', and values under their dotted key. The yaml is
    in a folder of ``places``.
    """
    paths = [place / group / f"{name}.yaml" for place in places]
    path = next(filter(Path.is_file, paths))
    content = read_yaml(path)
    found: dict[str, Any] = {}
    for parent in filter(is_parent, content.get("defaults", [])):
        found.update(prescribed(places, group, parent))
    found.update(choices_in(content.get("defaults", [])))
    for key, value in leaves(content):
        if key.split(".")[0] not in ("defaults", "hydra"):
            found[key] = value
    return found


def is_parent(entry: str | Mapping[str, str]) -> bool:
    """Return whether an entry of a list of defaults is another yaml of the same group."""
    return isinstance(entry, str) and entry != "_self_"


def choices_in(defaults: Sequence[str | Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the groups that a list of defaults overrides, with their choices."""
    for entry in defaults:
        if not isinstance(entry, str):
            for key, choice in entry.items():
                yield key.removeprefix(OVERRIDE), choice
