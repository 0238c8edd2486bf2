"""Runs read back from their folders."""

import math
import os
import re

import pytest

from conf_yamls import composed
from conftest import history, stats
from runs import SHORT
from switchlora.config import identity, shaping
from switchlora.criteria import Verdict
from switchlora.run import prepare
from switchlora.storage import (
    FileDamaged,
    RunLog,
    family_medians,
    find_records,
    measurement_metrics,
    measurement_of,
    read_record,
)
from switchlora.train import fit


def test_the_history_read_back_is_the_history_that_the_criterion_read(tmp_path):
    run = prepare(composed(*SHORT, "switch/criterion=never", "monitor.exact=true"), tmp_path)
    with run.log:
        fit(run)
    assert run.state.history and read_record(tmp_path).history() == run.state.history


def test_what_json_has_no_number_for_comes_back_as_nan(tmp_path):
    (measured,) = history({"a": [stats(grad_norm=math.nan)]})
    with RunLog(tmp_path, {}, total_updates=1, progress=False) as log:
        metrics = measurement_metrics(measured, Verdict(False, {}, ""))
        log.event("measure", measured.num_updates, measured.epoch, **metrics)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (event,) = read_record(tmp_path).events()
    assert math.isnan(measurement_of(event).layers["a"].grad_norm)


def test_families_are_told_by_their_medians():
    norms = {"blocks.0.attn.qkv": 0.1, "blocks.1.attn.qkv": 0.4, "blocks.2.attn.qkv": 0.2}
    series = {name: [stats(update_norm=norm)] for name, norm in norms.items()}
    (measured,) = history({**series, "blocks.0.mlp.fc1": [stats(update_norm=0.7)]})
    medians = family_medians(measured)
    assert medians["family/relative_update_norm/attn.qkv"] == 0.2
    assert medians["family/relative_update_norm/mlp.fc1"] == 0.7


def write_run(folder):
    """A run folder that is whole, and has no event yet."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "metrics.jsonl").touch()
    return folder


def test_runs_are_found_by_their_folder_or_by_their_sweeps(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / "sweep" / name)
    found = find_records([tmp_path / "sweep", tmp_path / "sweep" / "a"])
    assert [record.folder.name for record in found] == ["a", "b"]
    assert not found[0].finished and found[0].config == {"seed": 0}
    with pytest.raises(ValueError, match=r"is no run folder and holds none: give runs or a sweep"):
        find_records([tmp_path])


DAMAGED = {
    "summary.json": {
        b"": "line 1 is empty",
        b'{\n  "status": "finished",\n  "val": {"top': "line 3 is no JSON",
        b'{"status": "\xff"}': "line 1 is not UTF-8",
        b"[1]": "line 1 holds no JSON object",
        b"[" * 100_000: "line 1 is nested too deeply",
        b'{"status": "finished", "val": {}}': "it has no 'phases'",
        b"{}": "it has no 'status'",
    },
    "config.yaml": {
        b"": "it holds no mapping",
        b"data:\n  root: x\nepo": "line 3 has no end, the rest is missing",
        b"data: [1\nepochs: 2\n": "line 2 is no YAML: expected ',' or ']'",
        b"seed: 1\nseed: 2\n": "line 2 is no YAML: found duplicate key seed",
        b"name: \xff\n": "line 1 is not UTF-8",
        b"name: \x00\n": "unacceptable character #x0000",
        b"name: ${\n": "no viable alternative",
        b"- 1\n": "it holds no mapping",
        b"7\n": "Invalid loaded object type: int",
        b"[" * 5000 + b"\n": "line 1 is nested too deeply",
    },
    "metrics.jsonl": {b"[1]\n": "line 1 holds no JSON object", b"\xff\n": "line 1 is not UTF-8"},
}
KINDS = [(name, content) for name, kinds in DAMAGED.items() for content in kinds]


@pytest.mark.parametrize("name, content", KINDS, ids=lambda word: str(word[:20]))
def test_a_damaged_file_is_named_with_what_is_wrong_and_the_other_runs_can_stay(
    tmp_path, name, content
):
    write_run(tmp_path / "sweep" / "whole")
    damaged = write_run(tmp_path / "sweep" / "damaged") / name
    damaged.write_bytes(content)
    reason = f"{damaged} is damaged: {DAMAGED[name][content]}"
    with pytest.raises(FileDamaged, match=re.escape(reason)) as caught:
        for record in find_records([tmp_path / "sweep"]):
            list(record.events())
    assert "\n" not in str(caught.value)
    said = []
    (record,) = find_records([tmp_path / "sweep"], said.append)
    assert record.folder.name == "whole"
    assert said == [f"left out: {caught.value}"]
    with pytest.raises(ValueError, match="every run was left out"):
        find_records([damaged.parent], said.append)


def test_a_file_that_the_system_cannot_read_is_named(tmp_path):
    (write_run(tmp_path / "run") / "summary.json").mkdir()
    with pytest.raises(FileDamaged, match="summary.json cannot be read: Is a directory"):
        read_record(tmp_path / "run")


def test_a_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(write_run(tmp_path / "run") / "summary.json")
    with pytest.raises(FileDamaged, match="summary.json cannot be read: it is a pipe or a device"):
        read_record(tmp_path / "run")


def test_an_identity_knows_values_and_not_their_order():
    keys = shaping({"a": {"b": 1}, "c": [1, 2], "system": {"threads": 1}, "data": {"root": "x"}})
    assert keys == {"a.b": 1, "c": [1, 2]}
    assert identity(keys) == identity(dict(reversed(keys.items())))
    assert identity(keys) != identity({**keys, "a.b": 2})
