"""The command line speaks: help, version, and examples that work as they are printed."""

import re
import shlex
import subprocess
import sys
from contextlib import suppress

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from conf_yamls import CONF, composed
from switchlora.cli import main
from switchlora.config import as_plain
from switchlora.process import checked
from switchlora.process.words import explained

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


def said(monkeypatch, capsys, word):
    """What the program prints when it is asked for ``word`` alone."""
    monkeypatch.setattr(sys, "argv", ["switchlora", word])
    with suppress(SystemExit):
        main()
    return capsys.readouterr().out


def test_help_begins_with_what_the_program_does_and_names_groups_and_choices(monkeypatch, capsys):
    shown = said(monkeypatch, capsys, "--help")
    assert shown.startswith("switchlora trains a Vision Transformer in full and switches")
    assert "switch/criterion: all_of, any_of," in shown and "powered by Hydra" not in shown
    assert "\ndata: bytes, cifar10," in shown and not re.search(r"\bbase\b", shown)


def test_the_version_is_that_of_the_program(monkeypatch, capsys):
    shown = said(monkeypatch, capsys, "--version")
    assert re.fullmatch(r"switchlora \d+\.\d+\.\d+\n", shown)


@pytest.mark.parametrize(
    "begun,ends",
    [
        ("switch/criterion=update", "switch/criterion=update_norm"),
        ("switch/cri", "switch/criterion="),
        ("data=b", "data=bytes"),
        ("full.optimizer.l", "full.optimizer.lr="),
    ],
)
def test_tab_completes_groups_choices_and_keys(monkeypatch, capsys, begun, ends):
    monkeypatch.setenv("COMP_LINE", f"switchlora {begun}")
    monkeypatch.setattr(sys, "argv", ["switchlora", "-sc", "query=bash"])
    with suppress(SystemExit):
        main()
    assert capsys.readouterr().out.split() == [ends]


MISTAKES = {
    "switch/guard=ful": "switch/guard=ful: choose one of full, ranks, warn",
    "switch/rank=8": "switch/rank=8: choose one of budget, .*fixed",
    "switch.rank=8": "switch.rank is a group: write switch/rank=CHOICE, one of budget.*"
    r"switch.rank.KEY=VALUE",
    "switch.guard=full": "switch.guard is a group: write switch/guard=CHOICE",
    "switch.init=pissa": "switch.init is a group: write switch/init=CHOICE",
    "adapter.refactoring=reflora": "is a group: write adapter/refactoring=CHOICE",
    "switch/guards=full": "there is no group 'switch/guards'; near names: .*switch/guard",
    "data=cifar": "data=cifar: choose one of .*cifar10",
    "data=base": "data=base: choose one of bytes, cifar10",
    "recipe@full=base": "recipe@full=base: choose one of adam, adamw, adapter, apollo, .*, sgd$",
    "+methods=lora": "there is no key 'methods'; near names: .*method",
    "+lr=1e-3": "there is no key 'lr'; near names: full.optimizer.lr",
    "--epochs": "'--epochs' is no option: write epochs=VALUE without dashes",
    "epochs": r"'epochs' sets nothing: write KEY=VALUE, such as epochs=3",
    "train": "'train' sets nothing",
    "demo": r"'demo' sets nothing: write \+experiments=demo",
    "lora": r"'lora' sets nothing: write \+method=lora",
    "full.compile={mode:": r"not every { has its }; quote the whole argument, such as '.*'",
    "switch.keep=[norm,": r"not every \[ has its \]; quote the whole argument",
}


@pytest.mark.parametrize(("word", "line"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistaken_word_gets_the_line_that_helps(word, line):
    with pytest.raises(ValueError, match=line):
        checked([word])


KEYS_THAT_ARE_NOT = {
    "lr": "there is no key 'lr'; near names: full.optimizer.lr",
    "full.lr": "there is no key 'full.lr'; near names: full.optimizer.lr",
    "epoch": "there is no key 'epoch'; near names: .*switch.criterion.epoch",
    "dataset": "there is no key 'dataset'; n",
    "full.optimizer": "write recipe@full=sgd",
    "data.hflip": "data.hflip belongs to another choice of data",
    "adapter.optimizer.lrr": "there is no key 'adapter.optimizer.lrr'; near names: .*optimizer.lr",
    "adapter.optimizer.momentum": "belongs to recipe@full=muon or sgd: choose",
    "switch.criterion.tau": "switch.criterion.tau belongs to switch/criterion=prelora",
}


@pytest.mark.parametrize(("key", "line"), KEYS_THAT_ARE_NOT.items(), ids=KEYS_THAT_ARE_NOT)
def test_hydras_error_on_a_missing_key_becomes_the_line_that_helps(key, line):
    assert re.search(line, explained(f"Could not override '{key}'.\nTo append use +{key}=1"))


@pytest.mark.parametrize(
    "choice,line",
    [
        ("data=imagefolder", "data.num_classes has no value: give data.num_classes=N, the number"),
        ("model=timm", "model.name has no value: give .*any of timm.list_models()"),
    ],
)
def test_a_key_without_a_value_is_told_with_what_to_give(choice, line):
    with pytest.raises(ValueError, match=line):
        as_plain(composed(choice))


@pytest.mark.parametrize(
    "choice,package",
    [
        ("launcher/ray", "hydra-ray-launcher"),
        ("launcher/submitit_slurm", "hydra-submitit-launcher"),
        ("sweeper/optuna", "hydra-optuna-sweeper"),
    ],
)
def test_a_plugin_that_is_not_installed_is_named_by_its_package(choice, package):
    said = explained(f"In 'config': Could not find 'hydra/{choice}'\nAvailable options in")
    assert said.endswith(f"pip install {package}")


def test_hydras_error_on_a_value_that_it_cannot_read_says_to_quote():
    with pytest.raises(Exception, match="input") as unreadable:
        composed("full.compile={mode: default")
    assert explained(str(unreadable.value)).endswith("'full.compile={mode: default}'")


def test_words_that_are_right_stay_as_they_are():
    words = ["data=cifar10", "recipe@full=lion", "switch/rank=energy,fixed", "seed=0,1"]
    words += ["+method=lora", "full.optimizer.lr=1e-3", "switch.guard={act: warn}", "~trunk"]
    words += ["hydra.run.dir=x", "+model.drop_path_rate=0.1", "switch.keep=[norm]"]
    words += ["+launch=joblib", "method=mine", "switch.stages=null", "install=bash"]
    words += ["full.compile={mode: default}", r"switch.targets=['attn\.(qkv']", r"name=a\(b"]
    words += ["-m", "--cfg", "job", "--config-dir", "conf", "-sc"]
    words += ["--info", "--hydra-help", "--cfg=job"]
    assert checked(words) == words


@pytest.mark.parametrize("flag", [["-m"], ["--cfg", "job"], ["--config-dir", "conf"], ["--info"]])
def test_a_flag_may_stand_between_settings(flag):
    words = ["data=digits", *flag, "model=digits", "seed=0"]
    parsed = get_args_parser().parse_args(checked(words))
    assert parsed.overrides == ["data=digits", "model=digits", "seed=0"]


def test_a_system_or_an_experiment_needs_no_plus():
    assert checked(["method=lora", "experiments=demo"]) == ["+method=lora", "experiments=demo"]
    assert checked(["+experiments=demo"]) == ["experiments=demo"]


def test_a_group_of_ones_own_is_known_by_its_folder(tmp_path):
    (tmp_path / "switch/criterion").mkdir(parents=True)
    (tmp_path / "switch/criterion/still.yaml").write_text("_target_: mine.Still\n")
    words = ["switch/criterion=still", "--config-dir", str(tmp_path)]
    assert checked(words) == words
    with pytest.raises(ValueError, match="choose one of"):
        checked(words[:1])


def test_a_yaml_of_ones_own_that_is_no_yaml_is_named_in_one_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/broken.yaml").write_text("_target_: [unclosed\n  x: {")
    words = ["data=broken", "model=digits", "--config-dir", str(tmp_path)]
    command = [sys.executable, "-m", "switchlora", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert re.fullmatch(r"switchlora: .*/data/broken.yaml.* line \d.*\n", done.stderr)


@pytest.mark.parametrize("word", ["switch/guard=ful", "switch/stages=by_margins"])
def test_a_typo_in_a_group_that_may_be_empty_is_refused(word):
    with pytest.raises(Exception, match="Could not find"):
        composed(word)
