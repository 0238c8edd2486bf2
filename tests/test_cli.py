"""The command line speaks: help, version, and examples that work as they are printed."""

import re
import shlex
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from conf_yamls import CONF, composed

HELP = OmegaConf.load(CONF / "config.yaml").hydra.help.template
EXAMPLES = re.findall(r"^  switchlora (.*?)(?:  .*)?$", HELP, re.M)
KEYS = re.findall(r"^  ((?:[a-z_]+(?:\.[a-z_]+)*(?:, )?)+)(?:   .*)?$", HELP, re.M)


def words_of(example):
    """The overrides of an example, the first of several values of each."""
    words = [word for word in shlex.split(example) if not word.startswith(("-", "hydra."))]
    return [word.split(",")[0] for word in words]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_help_composes(example):
    assert composed(*words_of(example)).epochs > 0


def test_every_key_of_the_help_is_a_key():
    names = [name for line in KEYS for name in line.split(", ")]
    assert {"full.optimizer.lr", "switch.latest", "log.wandb.mode"} <= set(names)
    nothing = object()
    for name in names:
        assert OmegaConf.select(composed(), name, default=nothing) is not nothing, name


def said(*words):
    done = subprocess.run(
        [sys.executable, "-m", "switchlora", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_begins_with_what_the_program_does_and_names_groups_and_choices():
    shown = said("--help")
    assert shown.startswith("switchlora trains a Vision Transformer in full and switches")
    assert "switch/criterion: all_of, any_of," in shown and "powered by Hydra" not in shown


def test_the_version_is_that_of_the_program():
    assert re.fullmatch(r"switchlora \d+\.\d+\.\d+\n", said("--version"))


@pytest.mark.parametrize("word", ["switch/guard=ful", "switch/stages=by_margins"])
def test_a_typo_in_a_group_that_may_be_empty_is_refused(word):
    with pytest.raises(Exception, match="Could not find"):
        composed(word)
