"""What a user may type by mistake, and what the one line says."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from conf_yamls import build, by_hydra, composed
from starts import Started, program
from switchlora import commands
from switchlora.cli import main
from switchlora.config import as_plain
from switchlora.process import check_values, checked, one_line
from switchlora.run import prepare
from switchlora.run.saving import how_to_go_on
from switchlora.storage import read_summary, unused_removed
from switchlora.storage.background import Background
from switchlora.sweep import quoted

TYPED = {
    "switch/guard=ful": "choose one of full, ranks, warn",
    "switch/stages=by_margins": "choose one of by_margin",
    "+methods=lora": "there is no key 'methods'; near names: method",
    "+lr=1e-3": "full.optimizer.lr",
    "++epoch=3": "there is no key 'epoch'; near names: ",
    "+log.evry=3": "there is no key 'log.evry'; near names: ",
    "+checkpoint.kep=3": "there is no key 'checkpoint.kep'; near names: ",
    "switch.init=pissa": "switch/init=CHOICE",
    "++switch.init=pissa": "switch/init=CHOICE",
    "switch.init=null": "switch.init is null: it is a group: write switch/init=CHOICE",
    "switch.guard=full": "switch.guard is a group: write switch/guard=CHOICE",
    "switch.rank=8": "write switch/rank=CHOICE",
    "switch/rank=8": "choose one of budget, cuttlefish",
    "adapter.optimizer.lrr=1e-3": "adapter.optimizer.lr",
    "lr=1e-3": "full.optimizer.lr",
    "full.lr=1e-3": "full.optimizer.lr",
    "optimizer=sgd": "recipe@full=sgd",
    "full.optimizer=sgd": "recipe@full=sgd",
    "epoch=3": "epochs",
    "dataset=cifar10": "data",
    "switch.criterion.tau=1": "switch.criterion.tau belongs to switch/criterion=prelora",
    "full.optimizer.lr=-1": "full.optimizer.lr is -1: give a number of at least 0",
    "full.optimizer.lr=1e-4x": "full.optimizer.lr is '1e-4x': give a number of at least 0",
    "full.compile={mode: default": "quote the whole argument",
    "switch.keep=[norm": "quote the whole argument",
    "log.wandb=false": "log.wandb is false: it holds log.wandb.mode",
    "log.wandb.mode=on": "choose one of offline, online, disabled",
    "log/sinks=[tensorbord]": "choose one of mlflow, tensorboard",
    "log.tensorboard=true": "write log/sinks=tensorboard",
    "log.sinks=mlflow": "write log/sinks=tensorboard",
    "data=imagefolder": "give data.num_classes=",
    "model=timm": "any of timm.list_models()",
    "+launch=ray": "write switchlora -m +launch=ray",
    "+search=optuna": "write switchlora -m +search=optuna",
    "hydra/sweeper=optuna": "write switchlora -m hydra/sweeper=optuna",
    "--epochs": "write epochs=VALUE",
    "epochs": "write KEY=VALUE, such as epochs=3",
    "train": "write KEY=VALUE",
    "demo": "write +experiments=demo",
    "~epochs": "epochs is missing",
    "~system": "system is missing",
    "checkpoint=null": "checkpoint is null: it holds",
    "system=3": "system=3: choose one of default",
    "switch/restart=relora switch.restart.init=svd": "switch.restart.init",
    # numbers out of their range
    "seed=1180591620717411303424": "seed is 1180591620717411303424: the largest number",
    "epochs=0": "epochs is 0: give a whole number of at least 1",
    "epochs=2.5": "epochs is 2.5: give a whole number",
    "epochs=true": "epochs is true: give a whole number",
    "ema=1": "ema is 1: give a share from 0 to below 1, or null",
    "full.clip_grad=-1": "full.clip_grad is -1: give a number above 0, or null",
    "adapter.clip_grad=0": "adapter.clip_grad is 0: give a number above 0, or null",
    "full.weight_decay=nan": "full.weight_decay is nan: give a number of at least 0",
    "full.optimizer.lr=nan": "full.optimizer.lr is nan",
    "full.optimizer.lr=inf": "full.optimizer.lr is inf",
    "adapter.optimizer.lr=-1": "adapter.optimizer.lr is -1",
    "full.optimizer.betas=[0.9,1]": "full.optimizer.betas is [0.9, 1]: give two shares",
    "full.accumulation=0": "full.accumulation is 0: give a whole number of at least 1",
    "full.scheduler.warmup_t=-1": "full.scheduler.warmup_t is -1: give a whole number",
    "full.precision=fp8": "full.precision is 'fp8': choose one of auto, fp32, bf16, fp16",
    "data.std=[0]": "data.std is [0]: give a list of numbers above 0",
    "data.mean=0.3": "data.mean is 0.3: give a list of numbers",
    "data.label_smoothing=2": "data.label_smoothing is 2: give a share",
    "data.hflip=1.5": "data.hflip is 1.5: give a number from 0 to 1",
    "data.train_transform=timm": "data.train_transform is 'timm': give options by name, or null",
    "switch.rank.share=1.5": "switch.rank.share is 1.5: give a share above 0, at most 1",
    "switch.criterion.quorum=0": "switch.criterion.quorum is 0: give a share above 0",
    "switch.max_drift=-1": "switch.max_drift is -1: give a number of at least 0",
    "switch.keep=head": "switch.keep is 'head': give a list, [head]",
    "switch.targets=['attn.(q']": "switch.targets: 'attn.(q' is no regular expression",
    "switch/criterion=at_epoch switch.criterion.epoch=nan": "switch.criterion.epoch is nan",
    "switch/criterion=any_of switch.criterion.criteria.1.epoch=-1": "criteria.1.epoch is -1: give",
    "switch/guard=full switch.guard.criterion.quorum=2": "switch.guard.criterion.quorum is 2",
    "switch/rank=prelora switch.rank.r_min=3": "switch.rank.r_min=3",
    "switch/rank=prelora switch.rank.mode=x": "switch.rank.mode is 'x': choose one of family, all",
    "switch.latest=3 switch.earliest=4": "switch.latest=3 is before switch.earliest=4",
    "experiments=demoo": "experiments=demoo: choose one of",
    "data=imagefolder data.num_classes=2 data.train_transform={foo: 1}": (
        "data.train_transform has no 'foo' yet: write +data.train_transform.foo=VALUE"
    ),
    "hydra.run.dir=": "hydra.run.dir is empty",
    "hydra.sweep.dir=null": "hydra.sweep.dir is empty",
    "seed=-1": "seed is -1: give a whole number of at least 0",
    "full.optimizer.lr=1,5e-3": "Ambiguous value for argument 'full.optimizer.lr=1,5e-3'",
    "system.threads=100000000": "system.threads is 100000000: give a whole number from 0 to 4096",
    "log.figures=1": "log.figures is 1: give true or false",
}


def line_for(words):
    """The line that stands in the way of a run with these words; None where there is none."""
    try:
        config = by_hydra(*checked(words))
        check_values(as_plain(config))
        build(config.switch), build(config.full), build(config.adapter)
    except Exception as error:
        return one_line(error)
    return None


def split(typed):
    """The words of a line; a space inside of brackets or braces ends none."""
    return [typed] if "{mode" in typed else re.split(r" (?![^{]*})", typed)


@pytest.mark.parametrize("typed,line", TYPED.items(), ids=TYPED)
def test_what_is_typed_by_mistake_gets_the_line_that_helps(typed, line):
    said = line_for(split(typed))
    assert said is not None and line in said and "\n" not in said, said


RIGHT = [
    "method=lora",
    "experiments=demo",
    "full.compile=true",
    "full.compile={mode: default}",
    "full.optimizer.lr=0",
    "adapter.optimizer.lr=1e-3",
    "recipe@full=sgd",
    "data=digits model=digits epochs=2",
    "data.train_transform={}",
    "+log.wandb.entity=mine",
    "+model.drop_path_rate=0.1",
    "switch/criterion=any_of switch.criterion.criteria.1.epoch=0.5",
    "full.clip_grad=null",
    "name=3",
    "-m +search=optuna",
    "hydra.mode=RUN +launch=joblib",
    "--cfg job +search=optuna",
]


@pytest.mark.parametrize("typed", RIGHT)
def test_what_is_right_gets_none(typed):
    words = split(typed)
    flags = {"-m", "--cfg", "job", "hydra.mode=RUN", "+search=optuna", "+launch=joblib"}
    assert checked(words)
    assert line_for([word for word in words if word not in flags]) is None


def test_an_experiment_that_sweeps_takes_a_launcher_and_one_that_does_not_refuses_it():
    assert checked(["+experiments=systems", "+launch=joblib"])
    with pytest.raises(ValueError, match="write switchlora -m .launch=joblib"):
        checked(["+experiments=demo", "+launch=joblib"])


def test_a_sweep_over_methods_needs_no_sign():
    assert checked(["-m", "method=lora,relora"]) == ["+method=lora,relora", "-m"]


@pytest.mark.parametrize("word", ["epochs=0", "switch.init=null", "+log.evry=3"])
def test_a_mistake_leaves_no_run_folder(tmp_path, monkeypatch, word):
    monkeypatch.setattr(sys, "argv", ["switchlora", word, f"hydra.run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit, match="^switchlora: .*$"):
        main()
    assert not (tmp_path / "run").exists()


SMALL = (
    *("data=digits", "model=digits", "model.depth=1", "model.embed_dim=16", "model.num_heads=1"),
    *("log=quiet", "log.figures=false", "epochs=1", "monitor.window=5"),
    *("switch/rank=fixed", "switch.rank.rank=2"),
)
FOUND_WHILE_BUILDING = [
    "data=imagefolder data.num_classes=3 data.root=/nonexistent",
    "switch.targets=[nope]",
    "model=timm model.name=resnet18 ~model.embed_dim ~model.depth ~model.num_heads",
    "data.batch_size=100000",
    "init_checkpoint=/nonexistent.pth",
    "resume=/nonexistent",
    "switch/criterion=at_start switch/guard=warn",
]


def mistaken(monkeypatch, folder, typed):
    """Call the program with a mistake that is found while the run is built."""
    words = [*SMALL, *typed.split(), f"hydra.run.dir={folder}"]
    monkeypatch.setattr(sys, "argv", ["switchlora", *words])
    with pytest.raises(SystemExit, match="^switchlora: .*$"):
        main()


@pytest.mark.parametrize("typed", FOUND_WHILE_BUILDING)
def test_a_mistake_that_is_found_while_building_leaves_no_run_folder(tmp_path, monkeypatch, typed):
    mistaken(monkeypatch, tmp_path / "runs/demo/one", typed)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_there_before_stays(tmp_path, monkeypatch):
    (tmp_path / "runs/demo").mkdir(parents=True)
    mistaken(monkeypatch, tmp_path / "runs/demo", "data.batch_size=100000")
    mistaken(monkeypatch, tmp_path / "runs/other/one", "data.batch_size=100000")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]


def test_a_folder_in_which_anything_was_written_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), unused_removed(tmp_path / "run"):
        (tmp_path / "run/checkpoints").mkdir(parents=True)
        raise ZeroDivisionError
    assert (tmp_path / "run/checkpoints").exists()


def test_the_command_of_a_stopped_run_works_when_pasted_whatever_its_folder_is_called(
    tmp_path, monkeypatch, capsys, at_update
):
    yamls = tmp_path / "my yamls/model"
    yamls.mkdir(parents=True)
    yamls.joinpath("mine.yaml").write_text("defaults: [digits]\nembed_dim: 8\n")
    folder = tmp_path / r"a=1,b it's (c) [d] \e $HOME"
    words = [*SMALL, "max_updates=4", "model=mine", "switch.keep=[head]", "name='my run'"]
    at_update(3, lambda images: os.kill(os.getpid(), signal.SIGTERM) or images)
    place = f"hydra.run.dir={quoted(str(folder))}"
    monkeypatch.setattr(
        sys, "argv", ["switchlora", "--config-dir", str(yamls.parent), *words, place]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 128 + signal.SIGTERM
    command = capsys.readouterr().err.partition("go on with: ")[2].strip()
    read = ["bash", "-c", f"switchlora() {{ printf '%s\\0' \"$@\"; }}\n{command}"]
    pasted = subprocess.run(read, check=True, capture_output=True, text=True).stdout
    with Started(tmp_path / "said", program, *pasted.split("\0")[:-1]) as started:
        pasted = started.finish()
    assert pasted.returncode == 0, pasted.stderr
    assert read_summary(folder)["status"] == "finished" and "update 3" in pasted.stdout


def test_an_unknown_key_of_a_yaml_of_ones_own_is_told():
    config = {**as_plain(composed()), "epoch": 3}
    with pytest.raises(ValueError, match="there is no key 'epoch'; near names: epochs"):
        check_values(config)


def test_a_tilde_is_the_home_folder_where_a_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["data.root=~/images", "resume=~", "-m", "init_checkpoint=~/a,~/b", "name=a~/b"]
    right = ["data.root=/home/me/images", "resume=/home/me"]
    assert checked(words) == [*right, "init_checkpoint=/home/me/a,/home/me/b", "name=a~/b", "-m"]
    assert checked(["~trunk"]) == ["~trunk"]


def test_an_error_of_the_system_begins_with_its_file(tmp_path):
    with pytest.raises(OSError) as caught:
        tmp_path.read_text()
    assert one_line(caught.value) == f"{tmp_path}: Is a directory"


def test_a_multirun_over_nothing_is_a_mistake(tmp_path):
    words = ("-m", "seed=range(0,0)", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    with Started(tmp_path / "said", program, *words) as started:
        done = started.finish()
    assert done.returncode == 1
    assert "switchlora: the multirun has no job: a word sweeps over nothing" in done.stderr


@pytest.mark.parametrize("name", ["meta", "gpu"])
def test_a_device_that_cannot_train_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"system.device '{name}' cannot be used"):
        prepare(composed("data=digits", "model=digits", f"system.device={name}"), tmp_path)


REPOSITORY = Path(__file__).parents[1]
SHOWN = (
    *(REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "conf").rglob("*.yaml")),
    *sorted((REPOSITORY / "experiments").glob("*.yaml")),
)
EXAMPLE = re.compile(r"`(switchlora [^`\n]*)`|^[\s#$]*(switchlora(?:-\w+)? .*)$", re.MULTILINE)


def examples(path):
    """The command lines that a page or a yaml shows, without comments."""
    for found in EXAMPLE.finditer(path.read_text()):
        line = found[1] or found[2]
        yield re.sub(r"\s+#.*$| \([^)]*\)$", "", line)


def test_every_example_can_be_pasted_into_any_shell():
    """zsh takes a bracket that is not quoted for a pattern, and says that no file matches it."""
    lines = [line for path in SHOWN for line in examples(path)]
    assert len(lines) > 50
    for line in lines:
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
        assert not re.search(r"[\[\]{}*]|=\S*\(", bare), line


@pytest.mark.parametrize(
    "name", ["a=b,c", "it's", "two words", "ü✓", "[x]", "$(x)", "a#b", "~", "-"]
)
def test_the_command_that_goes_on_can_be_pasted_whatever_the_folders_name(name, tmp_path):
    folder = tmp_path / name
    (folder / "checkpoints" / "update-00000001").mkdir(parents=True)
    run = SimpleNamespace(log=SimpleNamespace(folder=folder), writer=Background())
    said = how_to_go_on(run)
    words = shlex.split(said.partition("go on with: ")[2])
    (place,) = (word for word in words if word.startswith("hydra.run.dir="))
    (override,) = OverridesParser.create().parse_overrides([place])
    assert override.value() == str(folder)


@pytest.mark.parametrize(
    "words",
    [
        *(["runs", name, "runs"] for name in ("tables", "report", "curves", "scaling")),
        ["runs", "replay", "runs", "switch.criterion.epoch=1"],
        *(["runs", "drift", "runs", "images"], ["runs", "data", "data=digits"]),
        *(["bench", name] for name in ("update", "switch", "lowrank")),
        *(["bench", name, "runs"] for name in ("phases", "systems")),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_place_that_holds_no_files_is_refused_before_anything_is_computed(
    words, monkeypatch, capsys, tmp_path
):
    file = tmp_path / "file"
    file.touch()
    option = "--output" if words[1] in ("drift", "data") else "--out"
    for place, there in ((file / "x" / "y", file), (Path("/proc/x/y"), "/proc")):
        monkeypatch.setattr(sys, "argv", ["switchlora", *words[1:], option, str(place)])
        with pytest.raises(SystemExit):
            getattr(commands, words[0])()
        (line,) = (x for x in capsys.readouterr().err.splitlines() if "error: " in x)
        named = place.parent if words[1] in ("report", "switch") else place
        assert f"argument {option}: {named}: {there} is no folder that can be written to" in line
    assert list(tmp_path.iterdir()) == [file]


OWN_MODULES = {
    "own_breaks.py": "raise RuntimeError('it broke')\n",
    "own_needs.py": "import what_is_nowhere\n",
    "own_sinks.py": "class Lines:\n    pass\n",
}


@pytest.mark.parametrize(
    "target,line",
    {
        "own_nowhere.Lines": (
            "no module own_nowhere was found for own_nowhere.Lines: set PYTHONPATH to the folder "
            "that has own_nowhere.py, such as PYTHONPATH=."
        ),
        "own_sinks.Line": "own_sinks has no Line; near names: Lines",
        "own_sinks.Lines.nope": (
            "there is no own_sinks.Lines.nope: type object 'Lines' has no attribute 'nope'"
        ),
        "own_breaks.Lines": "own_breaks.Lines cannot be imported: RuntimeError: it broke",
        "own_needs.Lines": (
            "own_needs.Lines cannot be imported: ModuleNotFoundError: "
            "No module named 'what_is_nowhere'"
        ),
    }.items(),
)
@pytest.mark.parametrize("by_path", [False, True])
def test_a_class_or_function_of_ones_own_that_is_not_there_is_told_with_the_reason(
    target, line, by_path, tmp_path, monkeypatch
):
    for name, content in OWN_MODULES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    found = {"_target_": "hydra.utils.get_method", "path": target}
    with pytest.raises(Exception) as caught:
        build({"log": {"sinks": {"mine": found if by_path else {"_target_": target}}}})
    assert one_line(caught.value).startswith(f"log.sinks.mine: {line}")
