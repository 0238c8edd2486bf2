"""Access to the yamls of a config group, so that tests run over all of them."""

import copy
from functools import cache, partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate

import switchlora.cli  # noqa: F401  (registers the resolver of the search path)

CONF = Path(__file__).parents[1] / "conf"
build = partial(instantiate, _convert_="all")
PARSER = OverridesParser.create()


def names(group):
    """The choices of a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def composed(*overrides):
    """The whole config with overrides: choices of groups first, then values, as Hydra does it."""
    choices = [word for word in overrides if is_choice(word)]
    config = copy.deepcopy(by_hydra(*choices))
    values = [word for word in overrides if not is_choice(word)]
    ConfigLoaderImpl._apply_overrides_to_config(PARSER.parse_overrides(values), config)
    return config


@cache
def by_hydra(*overrides):
    """The whole config as Hydra composes and checks it, which takes a seventh of a second."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[as_hydra_wants(word) for word in overrides])


def as_hydra_wants(word):
    """``word`` as the command line hands it over."""
    return word.removeprefix("+") if word.startswith("+experiments=") else word


def is_choice(word):
    """``word`` chooses from a group."""
    group = word.partition("=")[0].lstrip("+~").partition("@")[0]
    return group == "experiments" or (CONF / group).is_dir()


def build_yaml(group, name, *overrides):
    """The object that a choice of ``switch/<part>`` builds."""
    part = group.split("/")[1]
    return build(composed(f"{group}={name}", *overrides).switch[part])
