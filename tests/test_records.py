"""Runs read back from their folders."""

import math

import pytest

from conf_yamls import composed
from conftest import history, stats
from runs import SHORT
from switchlora.config import identity, shaping
from switchlora.criteria import Verdict
from switchlora.run import prepare
from switchlora.storage import (
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
    (tmp_path / "config.yaml").write_text("{}")
    (event,) = read_record(tmp_path).events()
    assert math.isnan(measurement_of(event).layers["a"].grad_norm)


def test_families_are_told_by_their_medians():
    norms = {"blocks.0.attn.qkv": 0.1, "blocks.1.attn.qkv": 0.4, "blocks.2.attn.qkv": 0.2}
    series = {name: [stats(update_norm=norm)] for name, norm in norms.items()}
    (measured,) = history({**series, "blocks.0.mlp.fc1": [stats(update_norm=0.7)]})
    medians = family_medians(measured)
    assert medians["family/relative_update_norm/attn.qkv"] == 0.2
    assert medians["family/relative_update_norm/mlp.fc1"] == 0.7


def test_runs_are_found_by_their_folder_or_by_their_sweeps(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / "sweep" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("seed: 0")
        (folder / "metrics.jsonl").touch()
    found = find_records([tmp_path / "sweep", tmp_path / "sweep" / "a"])
    assert [record.folder.name for record in found] == ["a", "b"]
    assert not found[0].finished and found[0].config == {"seed": 0}
    with pytest.raises(ValueError, match=r"is no run folder and holds none: give runs or a sweep"):
        find_records([tmp_path])


def test_an_identity_knows_values_and_not_their_order():
    keys = shaping({"a": {"b": 1}, "c": [1, 2], "system": {"threads": 1}, "data": {"root": "x"}})
    assert keys == {"a.b": 1, "c": [1, 2]}
    assert identity(keys) == identity(dict(reversed(keys.items())))
    assert identity(keys) != identity({**keys, "a.b": 2})
