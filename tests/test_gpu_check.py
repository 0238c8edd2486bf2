"""The prepared check on a GPU: a step that fails or takes too long does not stop the rest."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
gpu_updates = importlib.import_module("gpu_updates")

STAND_IN = """#!/bin/sh
case "$*" in
    *"-m pytest"*) exit 5;;
    *"--only eager"*) sleep 60;;
esac
echo "$*"
"""


@pytest.fixture
def stand_in(tmp_path):
    """A Python whose tests fail, and whose updates take for ever."""
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def steps_of(out):
    rows = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
    return {name: status for name, status, _ in rows}


def test_no_step_stops_the_rest_and_the_whole_ends_in_time(stand_in, tmp_path):
    script = SCRIPTS / "gpu_check.sh"
    words = [
        "bash",
        "-c",
        f"sed 's/step eager 100/step eager 1/' {script} > $1/s.sh; bash $1/s.sh $2",
    ]
    (tmp_path / "scripts").mkdir()
    begun = time.monotonic()
    done = subprocess.run(
        [*words, "-", tmp_path / "scripts", tmp_path / "out"],
        env={**os.environ, "PYTHON": str(stand_in)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - begun < 30, done.stderr
    steps = steps_of(tmp_path / "out")
    assert steps["tests"] == "5" and steps["eager"] == "124"
    rest = ("compiled", "kernels", "training", "predicted", "tables")
    assert {steps[name] for name in rest} == {"0"}
    for name in steps:
        assert (tmp_path / "out" / f"{name}.log").exists()


def test_steps_for_which_no_time_is_left_are_left_out(stand_in, tmp_path):
    environment = {**os.environ, "PYTHON": str(stand_in), "SECONDS_LEFT": "0"}
    words = ["bash", SCRIPTS / "gpu_check.sh", tmp_path / "out"]
    subprocess.run(words, env=environment, check=True, capture_output=True)
    assert set(steps_of(tmp_path / "out").values()) == {"left out"}


def test_its_limits_add_up_to_ten_minutes_at_most():
    text = (SCRIPTS / "gpu_check.sh").read_text()
    limits = [int(seconds) for seconds in re.findall(r"\bstep [a-z]+ (\d+) ", text)]
    assert len(limits) == 9 and sum(limits) <= 600 and "SECONDS_LEFT:-540" in text


def test_every_arm_is_timed_and_stands_in_the_table(tmp_path):
    program = [sys.executable, SCRIPTS / "gpu_updates.py", "--out", tmp_path]
    subprocess.run([*program, "--small"], check=True)  # autograd takes no fork of a used process
    rows = [json.loads(line) for line in (tmp_path / "updates.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows[: len(gpu_updates.ARMS)]] == list(gpu_updates.ARMS)
    assert all(row["ms"] > 0 for row in rows), rows
    subprocess.run([*program, "--table"], check=True)
    table = (tmp_path / "updates.md").read_text()
    assert "| full | " in table and "| 1.00 |" in table and "tf32" in table


def test_a_cell_that_fails_or_ends_its_process_leaves_the_others_alone(tmp_path, monkeypatch):
    broken = []

    def measure(asked, small):
        if asked.arm == "frozen":
            broken.append("CUDA does nothing more in this process")
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        if asked.arm == "adapter-B":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"ms": 1.0} if not broken else {"failed": broken[0]}

    monkeypatch.setattr(gpu_updates, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["gpu_updates.py", "--small", "--out", str(tmp_path)])
    gpu_updates.main()
    rows = [json.loads(line) for line in (tmp_path / "updates.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == [cell.arm for cell in gpu_updates.small_cells()]
    assert {row["arm"]: row["failed"] for row in rows if "failed" in row} == {
        "frozen": "CUDA error: an illegal memory access was encountered",
        "adapter-B": "its process ended with status -9",
    }
