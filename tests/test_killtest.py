"""Runs that are killed by SIGKILL and resumed, and the comparison that would notice a loss."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starts import serve_forks
from switchlora.storage import STATE, SUMS, find_all, load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import killtest

from switchlora.analysis import compare

SHORT = ("epochs=2", "switch.criterion.epoch=1.3")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of an uninterrupted run and of killed ones, and the result of the kill test."""
    folder = tmp_path_factory.mktemp("killtest")
    pipelines = {"memory": killtest.PIPELINES["memory"]}
    serve_forks()  # the kill test's own would have to compose the configuration for each start
    return folder, killtest.killtest(folder, 5, 0, SHORT, pipelines, killtest.start_fork)


def test_five_kills_are_recovered_bit_equal(killed):
    _, result = killed
    assert result["troubles"] == []
    assert result["total"].startswith("5 of 5 kills recovered bit-equal")
    kinds = {kill["kind"] for kill in result["kills"]}
    assert kinds == set(killtest.KINDS) - {killtest.START} or result["rounds"] > 1
    assert all(kill["resumed_from"] for kill in result["kills"])


def test_a_start_after_the_last_file_of_a_run_went_on_from_its_end(tmp_path):
    output = tmp_path / "said"
    output.write_text(f"{tmp_path} holds a finished run; nothing to do")
    assert killtest.Watch(tmp_path, output).resumed_from() == "the end"


def alter_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"].view(torch.int32)[3] ^= 1  # the last bit
    save_file(weights, folder / "model.safetensors")


def alter_a_moment(folder):
    alter_state(folder, lambda state: state["moments"]["head.bias"]["exp_avg"][3].neg_())


def alter_a_random_state(folder):
    alter_state(folder, lambda state: state["random"][0]["torch"][100].bitwise_xor_(1))


def alter_state(folder, change):
    """Change the last checkpoint in a way that its checksum does not tell."""
    path = find_all(folder)[0]
    state = load(path)
    change(state)
    torch.save(state, path / STATE)
    digest = hashlib.sha256((path / STATE).read_bytes()).hexdigest()
    others = [x for x in (path / SUMS).read_text().splitlines() if not x.endswith(f"  {STATE}")]
    (path / SUMS).write_text("\n".join([*others, f"{digest}  {STATE}"]) + "\n")


def drop_a_line(folder):
    lines = metrics(folder)
    write_metrics(folder, [*lines[:20], *lines[21:]])


def double_a_line(folder):
    lines = metrics(folder)
    write_metrics(folder, [*lines, lines[-1]])


def alter_a_loss(folder):
    lines = metrics(folder)
    record = json.loads(lines[20])
    record["train/loss"] += 1e-15
    write_metrics(folder, [*lines[:20], json.dumps(record), *lines[21:]])


def leave_two_wandb_runs(folder):
    (folder / "wandb" / "offline-run-20260101_000000-abc").mkdir(parents=True)


def metrics(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def write_metrics(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    "alter,words",
    [
        (alter_a_weight, "model.safetensors: head.bias differs"),
        (alter_a_moment, "the last checkpoint: moments head.bias exp_avg differs"),
        (alter_a_random_state, "the last checkpoint: random 0 torch differs"),
        (drop_a_line, "metrics.jsonl: "),
        (double_a_line, "metrics.jsonl: only changed has line 0"),
        (alter_a_loss, "metrics.jsonl: line 021 train/loss differs"),
        (leave_two_wandb_runs, "wandb: offline runs differs (0 and 1)"),
    ],
)
def test_the_comparison_fails_with_one_line_that_names_what_differs(
    killed, tmp_path, monkeypatch, alter, words
):
    reference, changed = killed[0] / "memory", tmp_path / "changed"
    shutil.copytree(killed[0] / "round-1", changed)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(reference), str(changed)])
    compare.main()
    alter(changed)
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert str(stop.value.code).startswith(words) and "\n" not in str(stop.value.code)


def test_a_run_that_does_not_start_is_told_with_its_last_line(tmp_path):
    with pytest.raises(killtest.Trouble, match=r"memory.log: ended with status 1.*epochs is 0"):
        killtest.killtest(tmp_path, 1, 0, ("epochs=0",), {"memory": ()}, start=killtest.start_fork)
