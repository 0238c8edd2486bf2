"""The W&B report's layout, on a real offline run and without a network."""

import json
import socket
import sys

import pytest

from runs import BY_DATE, make_run
from switchlora.analysis.wandb_report import AXIS, main, metrics_by_family, wandb_id
from switchlora.storage import read_record

pytest.importorskip("wandb_workspaces", reason="pip install wandb-workspaces")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A run with an offline W&B run in a group."""
    folder = tmp_path_factory.mktemp("wandb") / "sweep"
    wandb = ("log.wandb.mode=offline", "log.wandb.group=mine", "log.wandb.project=p")
    make_run(folder / "a", *BY_DATE, "epochs=2", *wandb)
    return folder


@pytest.fixture
def spec(sweep, tmp_path, monkeypatch):
    """What the command writes, with every connection refused."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(sys, "argv", ["x", str(sweep), "--out", str(tmp_path / "spec.json")])
    main()
    return json.loads((tmp_path / "spec.json").read_text())


def grids(spec):
    """Panel grids of a report's JSON."""
    return [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]


def panels(spec):
    """All panels of a report's JSON."""
    return [p for grid in grids(spec) for p in grid["panelBankSectionConfig"]["panels"]]


def test_every_logged_layer_is_in_the_panel_of_its_family(sweep, spec):
    record = read_record(sweep / "a")
    plots = {
        p["config"]["chartTitle"]: p["config"] for p in panels(spec) if "metrics" in p["config"]
    }
    drawn = {key for p in panels(spec) for key in p["config"].get("metrics", ())}
    for statistic in ("relative_update_norm", "update_stable_rank", "weight_stable_rank"):
        families = metrics_by_family([record], statistic)
        assert set(families) == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"} <= set(plots)
        assert {key for keys in families.values() for key in keys} <= drawn
    logged = {key for event in record.events() for key in event}
    assert drawn <= logged and {"val/top1", "params/trainable"} <= drawn


def test_curves_run_over_optimizer_updates(spec):
    plots = [p["config"] for p in panels(spec) if "metrics" in p["config"]]
    assert plots and {plot["xAxis"] for plot in plots} == {AXIS}


def test_the_runs_are_chosen_by_their_ids_and_grouped(sweep, spec):
    for grid in grids(spec):
        (runset,) = grid["runSets"]
        assert wandb_id(read_record(sweep / "a")) in json.dumps(runset["filters"])
        assert "group" in json.dumps(runset["grouping"])


def test_the_switch_is_told(spec):
    assert "a: update 30 (epoch 1.50)" in json.dumps(spec["blocks"])


def test_a_run_without_wandb_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("log: {wandb: {mode: disabled, project: p}}\n")
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no W&B run: train with log.wandb.mode=offline"):
        main()


def test_publishing_needs_an_owner_and_a_login_and_says_so_in_one_line(
    sweep, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["x", str(sweep), "--publish"])
    with pytest.raises(SystemExit):
        main()
    assert "--publish needs --entity" in capsys.readouterr().err
    for name, value in (("HOME", tmp_path), ("NETRC", tmp_path / "none"), ("WANDB_API_KEY", "")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["x", str(sweep), "--publish", "--entity", "nobody"])
    with pytest.raises(SystemExit, match=r"^wandb-report: W&B refused the report: .*$"):
        main()
