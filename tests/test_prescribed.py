"""A method and an experiment that set the same key: none is overruled without a word."""

from functools import cache

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conf_yamls import CONF, names
from switchlora.config import leaves
from switchlora.process.prescribed import overruled, prescribed
from switchlora.process.words import checked

PLACES = [CONF, CONF.parent]
EXPERIMENTS = sorted(path.stem for path in (CONF.parent / "experiments").glob("*.yaml"))


@cache
def sets(group, name):
    return prescribed(PLACES, group, name)


@cache
def swept_by(experiment):
    """What an experiment sweeps over, with those that it begins with."""
    content = yaml.safe_load((CONF.parent / "experiments" / f"{experiment}.yaml").read_text())
    parents = [word for word in content.get("defaults", []) if word in EXPERIMENTS]
    own = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    inherited = {}
    for name in parents:
        inherited.update(swept_by(name))
    return {**inherited, **own}


def composed_with_hydra(*words):
    """The configuration and Hydra's own part of it, after these words of a command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=checked(words), return_hydra_config=True)
    keys = [str(key) for key in config if key != "hydra"]
    return OmegaConf.masked_copy(config, keys), config.hydra


def with_choices(config, hydra):
    return {**dict(leaves(OmegaConf.to_container(config))), **hydra.runtime.choices}


def meets(method, experiment):
    """The keys in which a method meets an experiment: with another value, or in its sweep."""
    own, others = sets("method", method), sets("experiments", experiment)
    shared = {key for key in own if key in others and own[key] != others[key]}
    return shared | {f"swept {key}" for key in own.keys() & swept_by(experiment).keys()}


def pairs():
    """Each method with those experiments whose shared keys no other experiment has all of."""
    for method in names("method"):
        seen = []
        met = {experiment: meets(method, experiment) for experiment in EXPERIMENTS}
        for experiment in sorted(met, key=lambda name: len(met[name]), reverse=True):
            if not any(met[experiment] <= keys for keys in seen):
                seen.append(met[experiment])
                yield method, experiment


def test_every_key_of_a_method_reaches_the_configuration_of_every_experiment_or_is_refused():
    tried = set()
    for method, experiment in pairs():
        swept = swept_by(experiment)
        both = (f"method={method}", f"experiments={experiment}")
        config, hydra = composed_with_hydra(*both)
        found, own = with_choices(config, hydra), sets("method", method)
        assert {key: found[key] for key in own} == own, both
        said = "\n".join(overruled(config, hydra))
        for key, other in sets("experiments", experiment).items():
            if key in own and own[key] != other and key != "method":
                assert f"method={method} sets {key}={own[key]}, in place of {other}" in said
        for key in own.keys() & swept.keys() - tried:
            tried.add(key)
            value = next(v for v in swept[key].split(", ") if v != str(own[key]))
            config, hydra = composed_with_hydra(f"{key}={value}", *both)
            with pytest.raises(ValueError, match=f"^experiments={experiment} .*{key}.*={method}"):
                overruled(config, hydra)


def test_the_order_of_the_words_and_a_sweep_over_methods_change_nothing():
    """A sweep puts what it sweeps over before the command line."""
    for words in (
        ("+method=cuttlefish", "+experiments=systems"),
        ("+experiments=systems", "+method=cuttlefish"),
    ):
        config, _ = composed_with_hydra(*words)
        assert config.monitor.window == "epoch" and config.epochs == 8


def test_what_the_user_gives_is_no_clash():
    words = ("monitor.window=13", "experiments=systems", "method=cuttlefish")
    config, hydra = composed_with_hydra(*words)
    assert config.monitor.window == 13
    assert not any("monitor.window" in line for line in overruled(config, hydra))
    words = ("monitor.window=13", "monitor.window=26", "experiments=windows", "method=cuttlefish")
    assert not overruled(*composed_with_hydra(*words))


def test_a_method_that_sets_what_the_experiment_asks_is_refused_unless_the_user_says_which(
    tmp_path,
):
    (tmp_path / "method").mkdir()
    mine = tmp_path / "method" / "mine.yaml"
    mine.write_text("# @package _global_\ndefaults: [lora]\nmethod: mine\nepochs: 3\n")
    place = f"hydra.searchpath=[file://{tmp_path},file://{CONF.parent}]"
    words = (place, "+method=mine", "experiments=demo")
    config, hydra = composed_with_hydra(*words)
    with pytest.raises(ValueError, match="^method=mine sets epochs=3 and experiments=demo sets "):
        overruled(config, hydra)
    config, hydra = composed_with_hydra(*words, "epochs=5")
    assert overruled(config, hydra) == [] and config.switch.keep == ["head"]
