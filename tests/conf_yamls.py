"""Access to the yamls of a config group, so that tests run over all of them."""

from functools import cache, partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import switchlora.cli  # noqa: F401  (registers the resolver of the search path)

CONF = Path(__file__).parents[1] / "conf"
build = partial(instantiate, _convert_="all")


def names(group):
    """The choices of a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def composed(*overrides):
    """The whole config with overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def build_yaml(group, name, *overrides):
    """The object that a choice of ``switch/<part>`` builds."""
    part = group.split("/")[1]
    return build(composed(f"{group}={name}", *overrides).switch[part])
