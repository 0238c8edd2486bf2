"""The schema of the configuration: complete, and everything that it lets through can be built."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate

from conf_yamls import CONF, composed, names
from switchlora.config import as_plain, differences
from switchlora.criteria import AtEpoch, PreLoRA, UpdateNorm
from switchlora.learner import PARALLEL
from switchlora.process import check_values
from switchlora.process.schema import KINDS, OPEN, canonical, kind_of
from switchlora.process.words import groups, known_keys
from switchlora.run.lengths import Length, doubts

PACKAGE = Path(__file__).parents[1] / "switchlora"
BUILT = re.compile(r"(^|\.)_\w+_$|\.path$")
"""keys that say what is built"""


def test_every_key_of_every_yaml_has_a_kind_that_takes_its_value():
    wrong = []
    for key, known in known_keys().items():
        section = canonical(key).rpartition(".")[0]
        kind, value = kind_of(key), known.value
        above = any(kind_of(key[: dot.start()]) for dot in re.finditer(r"\.", key))
        is_built = isinstance(value, str | list) and re.search(r"\$\{|_target_|\?\?\?", str(value))
        if BUILT.search(key) or is_built or section in OPEN or above or value is None:
            continue
        if kind is None or not kind.fits(value):
            wrong.append((key, value))
    assert not wrong


@pytest.mark.parametrize("group", [name for name in groups() if name not in ("launch", "search")])
def test_every_choice_of_every_group_is_right(group):
    for name in names(group):
        if name == "base" or (group, name) in {("model", "timm"), ("data", "imagefolder")}:
            continue
        word = f"recipe@full={name}" if group == "recipe" else f"{group}={name}"
        words = ["data=bytes"] if (group, name) == ("model", "bytes") else []
        words += ["model=bytes"] if (group, name) == ("data", "bytes") else []
        if (group, name) != ("recipe", "adapter"):
            new = "+" if group.startswith("method") else ""
            below = ["+method=prelora"] if group == "method/prelora_bug" else []
            check_values(as_plain(composed(*below, *words, f"{new}{word}")))


@pytest.mark.parametrize("path", sorted((CONF.parent / "experiments").glob("*.yaml")))
def test_every_experiment_is_right(path):
    check_values(as_plain(composed(f"+experiments={path.stem}")))


def test_the_schema_names_the_choices_of_the_code():
    from switchlora.learner.recipe import AUTO, PRECISIONS, RECOMPUTED
    from switchlora.policy.guard import ACTIONS
    from switchlora.policy.stages import GROUPS

    choices = {
        "system.parallel": PARALLEL,
        "full.precision": (AUTO, *PRECISIONS),
        "full.activation_checkpointing": RECOMPUTED,
        "switch.guard.act": ACTIONS,
        "switch.stages.by": GROUPS,
    }
    for key, known in choices.items():
        assert KINDS[key].words.startswith(f"one of {', '.join(known)}")


def texts_of(node):
    """The text of an error's message, with '{}' where values come in."""
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            pieces = [p.value if isinstance(p, ast.Constant) else "{}" for p in part.values]
            yield "".join(map(str, pieces))
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def messages():
    """(file, whether it stands in __post_init__, text) of what errors and checks say."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in ("analysis", "bench"):
            continue
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        inside = [f for f in functions if f.name == "__post_init__"]
        completed = {id(node) for function in inside for node in ast.walk(function)}
        for node in ast.walk(tree):
            is_check = isinstance(node, ast.Call) and "check_" in ast.unparse(node.func)
            if isinstance(node, ast.Raise) and node.exc or is_check:
                said = node.exc if isinstance(node, ast.Raise) else (node.args or [node.func])[0]
                for text in texts_of(said):
                    yield path.name, id(node) in completed, text


FIRST_WORDS = {key.split(".")[0] for key in KINDS} | {"adapter"}
NOT_KEYS = {"resume.py", "words.py", "cli.py", "jobs.py", "config.py", "inputs.py", "measure.py"}
"""files whose messages show command lines or Python"""
FILES = (".safetensors", ".json", ".jsonl", ".yaml")


def is_key(word, completed):
    """Whether a command line may have this word before its '='."""
    sections = {key[: dot.start()] for key in known_keys() for dot in re.finditer(r"\.", key)}
    known = {*known_keys(), *KINDS, *sections, *groups(), "hydra.run.dir"}
    if "{}" in word or word in known or word.lstrip("+") in known:
        return True
    return completed and any(key.endswith(f".{word}") for key in known)


def test_every_key_that_a_message_names_can_be_pasted():
    """A message of ``__post_init__`` gets the names of its keys in full: ``spelled_out``."""
    found, wrong = 0, []
    for file, completed, text in messages():
        assigned = re.findall(r"([+\w./{}]+)=(?=[\w{\[])", text)
        dotted = re.findall(r"(?<![\w./{}-])([a-z]+(?:\.[a-zA-Z_]+)+)\b(?!\()", text)
        dotted = [word for word in dotted if not word.endswith(FILES)]
        keys = [word for word in dotted if word.split(".")[0] in FIRST_WORDS]
        for word in [*assigned, *keys]:
            found += 1
            if file not in NOT_KEYS and not is_key(word, completed):
                wrong.append((file, word, text))
    assert found > 60 and not wrong


def test_an_empty_mapping_is_not_what_is_missing():
    old, new = composed(), composed("data.train_transform={}")
    found = differences(as_plain(old), as_plain(new))
    assert found == ["data.train_transform: None there, {} here"]
    assert not differences(as_plain(new), as_plain(new))


@pytest.mark.parametrize(
    "words,line",
    [
        (
            ("switch/criterion=at_epoch", "switch.criterion.epoch=100"),
            "switch.criterion.epoch=100",
        ),
        (("switch/criterion=at_epoch", "switch.criterion.epoch=1.99"), "epoch=1.99 is not before"),
        (
            ("full.scheduler.warmup_t=100",),
            "full.scheduler.warmup_t=100 is no shorter than the run",
        ),
        (("full.scheduler.warmup_t=24",), "warmup_t=24 goes on past update 20"),
        (("switch.earliest=40",), "switch.earliest=40 is not before the end"),
        (("switch.latest=19",), "switch.latest=19 comes before the first measurement"),
        (("switch.criterion.patience=7",), "switch.criterion needs 8 windows of 5 updates"),
        (("switch.joint_epochs=2",), "switch.joint_epochs=2 is no shorter than the run"),
        (("switch/restart=relora",), "switch.restart.every_epochs=2 is no shorter"),
        (("adapter.rewarmup_updates=40",), "adapter.rewarmup_updates=40 is no shorter"),
    ],
)
def test_settings_are_compared_with_the_length_of_the_run(words, line):
    config = composed("full.scheduler.warmup_t=10", *words)
    policy = instantiate(config.switch, _convert_="all")
    (said,) = doubts(as_plain(config), policy, Length(updates=40, per_epoch=20, window=5))
    assert line in said


def test_a_run_too_short_for_its_criterion_is_told_the_window_with_which_it_can_switch():
    config = composed("full.scheduler.warmup_t=1", "switch.criterion.patience=3")
    policy = instantiate(config.switch, _convert_="all")
    length = Length(updates=400, per_epoch=80, window=100)
    (said,) = doubts(as_plain(config), policy, length)
    assert said.endswith(
        "; give monitor.window=99 or less, or make more than 400 updates (5 epochs)"
    )
    assert not doubts(as_plain(config), policy, length._replace(window=99))
    assert not doubts(as_plain(config), policy, length._replace(updates=401))
    (said,) = doubts(as_plain(config), policy, length._replace(updates=3))
    assert said.endswith("never switches; make more than 400 updates (5 epochs)")


@pytest.mark.parametrize("criterion", [UpdateNorm(), AtEpoch(1), PreLoRA()], ids=str)
def test_a_run_that_is_long_enough_is_not_doubted(criterion):
    config = composed()
    policy = replace(instantiate(config.switch, _convert_="all"), criterion=criterion)
    assert not doubts(as_plain(config), policy, Length(4000, 400, 100))


def test_a_rising_learning_rate_is_no_doubt_where_no_criterion_judges():
    config = composed("switch/criterion=never", "full.scheduler.warmup_t=24")
    policy = instantiate(config.switch, _convert_="all")
    assert not doubts(as_plain(config), policy, Length(updates=40, per_epoch=20, window=5))


def test_the_reference_shows_what_a_key_takes():
    text = (CONF.parent / "docs/configuration.md").read_text()
    assert "| `full.clip_grad` | `1.0` | a number above 0, or null |" in text
    assert yaml.safe_load((CONF / "recipe/base.yaml").read_text())["clip_grad"] == 1.0


@pytest.mark.parametrize(
    "word,line",
    [
        ("epochs=many", "epochs is 'many'"),
        ("max_updates=-1", "max_updates is -1"),
        ("monitor.window=0", "monitor.window is 0"),
        ("monitor.window=often", "monitor.window is 'often'"),
        ("full.precision=fp8", "full.precision is 'fp8': choose one of auto, fp32, bf16"),
        ("ema=2", "ema is 2"),
        (
            "switch.criterion.patience=0",
            "switch.criterion.patience is 0: give a whole number of at least 1",
        ),
        ("adapter.lr_scale=0", "adapter.lr_scale is 0: give a number above 0"),
        (
            "full.compile=default",
            "full.compile is 'default': give auto, true, false, null, graphs, or",
        ),
        ("adapter.optimizer.lr=much", "adapter.optimizer.lr is 'much': give a number"),
        ("adapter.optimizer=sgd", "adapter.optimizer is 'sgd': it holds .*lr"),
        ("full.optimizer.lr=1e-4x", "full.optimizer.lr is '1e-4x': give a number"),
        ("log.progress=maybe", "log.progress is 'maybe': give true or false"),
        ("log.wandb=false", "log.wandb is false: it holds log.wandb.mode"),
        ("log.wandb.mode=on", "log.wandb.mode is 'on': choose one of offline, online"),
        ("switch.targets=attn.qkv", r"switch.targets is 'attn.qkv': give a list, \[attn.qkv\]"),
    ],
)
def test_a_value_that_its_key_does_not_take_gets_one_line(word, line):
    with pytest.raises(ValueError, match=line) as caught:
        check_values(as_plain(composed(word)))
    assert "\n" not in str(caught.value)
