"""Everything from an installed wheel, used from another folder, without the repository."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TINY = (
    *("data=digits", "model=digits", "model.depth=1", "model.embed_dim=16", "model.num_heads=1"),
    *("data.train_size=320", "epochs=2", "monitor.window=2", "full.scheduler.warmup_t=2"),
    *("switch/criterion=at_epoch", "switch.criterion.epoch=0.4", "switch/rank=fixed"),
    *(
        "switch.rank.rank=2",
        "log.progress=false",
        "log.cost_model=false",
        "log.wandb.mode=disabled",
        "log.figures=false",  # the command draws them
    ),
    "hydra.sweep.dir=sweep",
)
COMMANDS = """
import sys
import switchlora
from switchlora import commands

print(switchlora.__file__)

def call(run, *words):
    sys.argv = ["command", *words]
    print("$", *words, flush=True)
    try:
        run()
    except SystemExit as stop:
        print(stop.code, flush=True)

(one,) = sys.argv[1:]
for words in (
    ["eval", one],
    ["tables", "sweep", "--out", "tables"],
    ["report", "sweep", "--out", "page.html"],
    ["curves", "sweep", "--out", "curves"],
    ["figures", one],
    ["replay", one, "switch/criterion=at_epoch", "switch.criterion.epoch=0.2,0.4"],
    ["scaling", "sweep", "--out", "scaling"],
    ["compare", one, one],
):
    call(commands.runs, *words)
small = ["--widths", "64", "--tokens", "8", "--rounds", "1", "--out", "lowrank"]
call(commands.bench, "lowrank", *small)
for name in ("update", "switch", "systems"):
    call(commands.bench, name, "--help")

import torch
from importlib.metadata import metadata
from switchlora.storage import environment

print("commit", environment(torch.device("cpu"), 0)["git"])
print(metadata("switchlora").get_payload())
"""
LEFT = ("tables/table.md", "page.html", "lowrank/speed.md")
SAID = (
    "its own test split",
    *("0.2", "is neither dense nor low-rank", "bit-equal"),
    *(f"usage: switchlora-bench {name}" for name in ("update", "switch", "systems")),
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder ``bin`` of an environment with the wheel, beside the packages of this one."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    offline = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    build = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", str(place)]
    subprocess.run([*pip, *build, str(REPOSITORY)], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    python = place / "venv/bin/python"
    (packages,) = (place / "venv/lib").glob("*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = place.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    return python.parent


def run(folder, *words):
    """What a command says; it must succeed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def used(installed, tmp_path_factory):
    """A folder in which a sweep and every command ran, and what these said."""
    folder = tmp_path_factory.mktemp("used")
    swept = run(folder, installed / "switchlora", "-m", *TINY, "seed=1")
    runs = sorted(str(path.parent) for path in folder.glob("sweep/*/summary.json"))
    return folder, swept, run(folder, installed / "python", "-c", COMMANDS, *runs)


@pytest.mark.slow
def test_a_sweep_and_every_command_on_it_work_from_a_wheel_in_another_folder(installed, used):
    folder, swept, said = used
    assert "1 jobs in sweep" in swept and "new: 1" in swept
    where = said.partition("\n")[0]
    assert str(REPOSITORY) not in where and str(installed.parent) in where
    for name in LEFT:
        assert (folder / name).stat().st_size > 100, (name, said)
    assert list(folder.glob("curves/*.png"))
    assert all(words in said for words in SAID), said


def test_a_wheel_knows_its_commit_and_its_readme_stands_alone(used):
    commit, _, readme = used[-1].rpartition("\ncommit ")[-1].partition("\n")
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    here = subprocess.run(described, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    assert commit == (here or "None")
    assert "switchlora" in readme and not re.search(r"\]\((?!https?:|#)", readme)


@pytest.mark.parametrize(
    ("program", "typo"), [("switchlora-runs", "tabels"), ("switchlora-bench", "phaess")]
)
def test_the_commands_list_themselves_and_name_the_nearest_to_a_typo(installed, program, typo):
    assert f"usage: {program} COMMAND" in run("/", installed / program)
    done = subprocess.run([installed / program, typo], capture_output=True, text=True)
    assert done.returncode == 1 and f"no command '{typo}'; near names" in done.stderr
