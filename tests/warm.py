"""What tests read, parse and compose again and again, remembered; the fork server does it once."""

import copy
from functools import cache
from io import StringIO
from pathlib import Path

import hydra._internal.config_loader_impl as loading
import omegaconf
import pytest
import yaml
from hydra import initialize_config_dir
from hydra._internal.defaults_list import DefaultsList
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.grammar_parser import parse


@cache
def parsed(text):
    """What a yaml holds, as OmegaConf reads it."""
    return yaml.load(text, get_yaml_loader())


def parse_interpolations_once(patch):
    """Each ``${...}`` is parsed once, which takes a tenth of the time of a short run."""
    for module in (omegaconf.base, omegaconf._utils):
        patch.setattr(module, "parse", cache(parse))


def parse_yamls_once(patch):
    """Each yaml is parsed once, which takes a quarter of the time in which Hydra composes."""
    load = OmegaConf.load

    def load_or_remember(file):
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        content = parsed(text)
        return OmegaConf.create(content) if isinstance(content, dict) else load(StringIO(text))

    patch.setattr(OmegaConf, "load", load_or_remember)


class ComposedOnce:
    """Hydra's composition, where the yamls of the same choices are merged once, and then copied.

    That is four fifths of the time in which Hydra composes. Values come on top, as ever.
    """

    HERE = f"file://{Path(__file__).parents[1]}"
    MOST = 40
    """choices whose configurations stay in memory"""

    def __init__(self):
        self.find = loading.create_defaults_list
        self.merge = loading.ConfigLoaderImpl._compose_config_from_defaults_list
        self.found, self.merged = {}, {}

    def create_defaults_list(self, repo, config_name, overrides_list, **how):
        """The yamls to merge, in their order, and the overrides that are no choices."""
        places = [source.full_path() for source in repo.get_sources()]
        is_ours = config_name == "config" and all(map(stays, places))
        choices = [word for word in overrides_list if is_choice(repo, word)]
        key = (config_name, *how.values(), *places, *(word.input_line for word in choices))
        if not is_ours or (key not in self.found and len(self.found) > self.MOST):
            return self.find(repo, config_name, overrides_list, **how)
        if key not in self.found:
            self.found[key] = self.find(repo, config_name, choices, **how)
        found = self.found[key]
        values = [word for word in overrides_list if is_value(repo, word)]
        return DefaultsList(found.defaults, found.defaults_tree, values, found.overrides)

    def compose(self, loader, defaults, repo):
        """What ``_compose_config_from_defaults_list`` of a loader returns."""
        if not any(found.defaults is defaults for found in self.found.values()):
            return self.merge(loader, defaults, repo)
        if id(defaults) not in self.merged:
            self.merged[id(defaults)] = self.merge(loader, defaults, repo)
        return copy.deepcopy(self.merged[id(defaults)])


def stays(place):
    """Whether no test writes yamls in a place of configurations."""
    return not place.startswith("file:") or place.startswith(ComposedOnce.HERE)


def is_choice(repo, word):
    """Whether an override chooses a yaml of a group."""
    if word.is_sweep_override() or isinstance(word.value(), dict):
        return False
    return repo.group_exists(word.key_or_group)


def is_value(repo, word):
    """Whether an override sets a value."""
    return not word.is_sweep_override() and not is_choice(repo, word)


def merge_once(patch):
    """The yamls of the same choices are merged once."""
    once = ComposedOnce()
    patch.setattr(loading, "create_defaults_list", once.create_defaults_list)
    patch.setattr(
        loading.ConfigLoaderImpl,
        "_compose_config_from_defaults_list",
        lambda self, defaults, repo: once.compose(self, defaults, repo),
    )


def warm_up():
    """Do once what each fork of this process would do again."""
    from conf_yamls import CONF
    from runs import DIGITS
    from switchlora.config import our_names
    from switchlora.process.words import known_keys

    patch = pytest.MonkeyPatch()
    parse_interpolations_once(patch)
    parse_yamls_once(patch)
    merge_once(patch)
    known_keys()
    our_names()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for own in ((), ("switch/criterion=at_epoch",), ("switch/criterion=loss_plateau",)):
            words = [*DIGITS, *own]
            for mode in (RunMode.MULTIRUN, RunMode.RUN):  # a start asks for its mode first
                loader.load_configuration("config", words, mode)
