"""Runs in a registry: published, refused, loaded, and with their adapters taken off."""

import json
import shutil
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from runs import BY_DATE, make_run
from switchlora import commands
from switchlora.analysis.evaluate import evaluated
from switchlora.analysis.takeoff import taken_off
from switchlora.analysis.versions.log import told
from switchlora.analysis.versions.promote import promoted
from switchlora.analysis.versions.publish import published
from switchlora.registry import aliases, check, entries, read_about, versions
from switchlora.storage import find_all, load, load_saved, sha256_of, updates_of

SMALL = (
    *("model.embed_dim=32", "model.num_heads=1", "switch/rank=fixed", "switch.rank.rank=2"),
    *("log.wandb.mode=disabled", "checkpoint.keep=9"),
)
TINY = (*SMALL, "data.eval_size=null", *BY_DATE, "epochs=2", "switch.criterion.epoch=0.5")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that switched."""
    folder = tmp_path_factory.mktemp("finished")
    make_run(folder, *TINY)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed; the copy has no checkpoints."""
    names = shutil.ignore_patterns("checkpoints")
    return shutil.copytree(finished, tmp_path / "run", ignore=names)


@pytest.fixture
def unmeasured(monkeypatch):
    """No reference for drift is measured, which takes the most time of publishing."""
    where = sys.modules[published.__module__]
    monkeypatch.setattr(where, "reference_or_reason", lambda *_: "it was not measured")


def write_card(run, regression, of=None):
    (run / "card").mkdir(exist_ok=True)
    verdict = {"regression": regression, "sentence": "class 3 got worse"}
    card = {"source_sha256": of or sha256_of(run / "model.safetensors"), "verdict": verdict}
    (run / "card/card.json").write_text(json.dumps(card))


def said_by(monkeypatch, *words):
    """Exit status or last line of a command."""
    monkeypatch.setattr(sys, "argv", ["switchlora-runs", *map(str, words)])
    try:
        commands.runs()
    except SystemExit as stop:
        return stop.code
    return None


def test_a_version_is_evaluated_as_its_run_and_loaded_by_timm(finished, tmp_path):
    registry = tmp_path / "registry"
    lines = published(finished, registry)
    assert lines == [
        f"v0001 is published in {registry} as candidate",
        f"no card was made of it: switchlora-runs card {finished} makes one",
        "drift is measured against 144 images of val",
    ]
    version = registry / "candidate"
    assert check(registry / "v0001") > 8
    about = read_about(version)
    summary = json.loads((finished / "summary.json").read_text())
    assert about["weights_sha256"] == sha256_of(finished / "model.safetensors")
    assert about["test"] == summary["test"]
    assert evaluated(version)["top1"] == summary["test"]["top1"]
    model = timm.create_model(f"local-dir:{registry}/v0001", pretrained=True).eval()
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(model(images), load_saved(finished).model(images))
    assert load_saved(version / "adapter").adapted


@pytest.mark.usefixtures("unmeasured")
def test_a_regression_is_refused_unless_there_is_a_reason(run, tmp_path):
    registry = tmp_path / "registry"
    write_card(run, regression=True)
    refused = r"has a regression by its card: class 3 got worse; --force REASON"
    with pytest.raises(ValueError, match=refused):
        published(run, registry)
    assert not registry.exists()
    with pytest.raises(ValueError, match="--force needs a reason"):
        published(run, registry, force=" ")
    lines = published(run, registry, force="class 3 is gone next week")
    assert lines[1].endswith("class 3 got worse; overruled: class 3 is gone next week")
    assert (registry / "v0001/card/card.json").is_file()
    with pytest.raises(ValueError, match=rf"v0001 {refused}"):
        promoted(registry)
    assert promoted(registry, "candidate", force="still") == "v0001 is in production"
    table = told(registry)
    assert "class 3 is gone next week" in table and "still" in table
    assert table.endswith("candidate: v0001, production: v0001")


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("regression", [False, None])
def test_a_run_without_a_regression_is_published_with_its_card(run, tmp_path, regression):
    write_card(run, regression)
    assert len(published(run, tmp_path / "registry")) == 2
    about = read_about(tmp_path / "registry/v0001")
    assert about["verdict"]["regression"] is regression and about["objection"] is None


@pytest.mark.usefixtures("unmeasured")
def test_the_digests_of_the_data_come_along(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    summary["data"] = {"sha256": {"train": "a", "val": "b", "test": "c"}}
    (run / "summary.json").write_text(json.dumps(summary))
    published(run, tmp_path / "registry")
    assert read_about(tmp_path / "registry/v0001")["data"] == summary["data"]


def break_card(run):
    write_card(run, regression=False)
    (run / "card/card.json").write_text('{"verdict": {}}')


def stop(run):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "status": "stopped: no images"}))


def relink(run):
    (run / "config.json").rename(run / "other.json")
    (run / "config.json").symlink_to("other.json")


REFUSED = {
    "has a card of other weights: make it anew": lambda run: write_card(run, False, "0" * 64),
    "card.json is damaged: it has no 'verdict' on a 'regression'": break_card,
    "is not finished: stopped: no images; --force": stop,
    "has no summary.json: only a run that has ended": lambda run: (run / "summary.json").unlink(),
    "has no model.safetensors: there is no": lambda run: (run / "model.safetensors").unlink(),
    "holds no run: config.yaml or metrics.jsonl": lambda run: (run / "metrics.jsonl").unlink(),
    "config.json is no plain file": relink,
}


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_published_is_one_line(run, tmp_path, monkeypatch, said):
    REFUSED[said](run)
    line = said_by(monkeypatch, "publish", run, tmp_path / "registry")
    assert line.startswith("publish: ") and said in line and "\n" not in line
    assert [path.name for path in tmp_path.glob("registry/*")] in ([], [".lock"])


@pytest.mark.parametrize("alias", ["production", "v0002", "../x", ""])
def test_an_alias_that_can_be_none_is_refused(finished, tmp_path, alias):
    with pytest.raises(ValueError, match="--alias"):
        published(finished, tmp_path / "registry", alias)


@pytest.mark.usefixtures("unmeasured")
def test_the_commands_walk_forth_and_back(run, tmp_path, monkeypatch, capsys):
    registry = tmp_path / "registry"
    for words in (("publish", run), ("publish", run, "--alias", "shadow")):
        said_by(monkeypatch, words[0], words[1], registry, *words[2:])
    for words in (("promote",), ("promote", "v0002"), ("rollback", "--why", "slow"), ("verify",)):
        assert said_by(monkeypatch, words[0], registry, *words[1:]) is None
    said_by(monkeypatch, "log", registry)
    out = capsys.readouterr().out
    assert "v0001 is in production again" in out and "v0002: whole," in out and "slow" in out
    assert out.endswith("candidate: v0001, shadow: v0002, production: v0001\n")
    (registry / "v0002/model.safetensors").write_bytes(b"")
    line = said_by(monkeypatch, "verify", registry)
    assert line == (
        f"verify: {registry}/v0002 is damaged: model.safetensors does not match its checksum"
    )
    assert said_by(monkeypatch, "verify", registry, "production") is None
    for words in (("promote", "v0002"), ("promote", "v7"), ("verify", "shadow"), ("rollback",)):
        line = said_by(monkeypatch, words[0], registry, *words[1:])
        assert line.startswith(f"{words[0]}: ")
    assert aliases(entries(registry))["production"] == "v0001"
    assert said_by(monkeypatch, "log", run).endswith(
        "is no registry: switchlora-runs publish RUN REGISTRY makes one"
    )
    assert versions(registry) == ["v0001", "v0002"]


STARTS = {
    "B = 0": (),
    "rounded residuals": ("switch/init=update_svd", "switch.residual_dtype=bf16"),
    "quantised residuals": ("switch.residual_dtype=int8",),
    "restarts": ("switch/restart=relora", "switch.restart.every_epochs=0.5"),
    "a joint phase": ("switch.joint_epochs=0.5",),
}
SHORTER = ("data.eval_size=32", "model.depth=1", "data.train_size=320")


def before_the_switch(run):
    """The weights in the checkpoint of just before the switch, and its path."""
    paths = [path for path in reversed(find_all(run)) if not load(path)["adapters"]]
    return load(paths[-1])["weights"], paths[-1]


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.view(torch.uint8), expected[name].contiguous().view(torch.uint8))


@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_is_taken_off_bit_for_bit(finished, tmp_path, start):
    run = finished
    if STARTS[start]:
        run = tmp_path / "run"
        make_run(run, *TINY, *SHORTER, *STARTS[start])
    expected, checkpoint = before_the_switch(run)
    line = taken_off(run, tmp_path / "model")
    num_updates = updates_of(checkpoint)
    assert line.endswith(f"the model after update {num_updates}, just before the switch")
    assert_same_bits(load_file(tmp_path / "model/model.safetensors"), expected)
    assert evaluated(tmp_path / "model")["loss"] == evaluated(checkpoint)["loss"]
    kept = (run / "before_switch.safetensors").stat().st_size
    whole = (run / "model.safetensors").stat().st_size
    assert kept < 0.3 * whole if start == "B = 0" else kept < 1.05 * whole


def test_of_stages_the_model_of_before_the_first_one_is_kept(tmp_path):
    stages = (
        *("switch/criterion=never", "switch.criterion.path=test_slices.one_by_one"),
        *("switch/stages=by_margin", "switch.stages.interval=1", "switch.split_qkv=true"),
        *("adapter.clip_grad=null", "switch/init=zero_b", "monitor.window=4", "epochs=1"),
    )
    summary = make_run(tmp_path / "run", *SMALL, *SHORTER, *stages)
    assert [stage["num_updates"] for stage in summary["transitions"]] == [4, 8]
    line = taken_off(tmp_path / "run", tmp_path / "model")
    assert line.endswith("the model after update 4, just before the switch")
    expected, checkpoint = before_the_switch(tmp_path / "run")
    assert updates_of(checkpoint) == 4
    assert_same_bits(load_file(tmp_path / "model/model.safetensors"), expected)


@pytest.mark.usefixtures("unmeasured")
def test_an_adapter_is_taken_off_a_version(finished, tmp_path):
    published(finished, tmp_path / "registry")
    taken_off(tmp_path / "registry/candidate", tmp_path / "model")
    expected, _ = before_the_switch(finished)
    assert_same_bits(load_file(tmp_path / "model/model.safetensors"), expected)
    with pytest.raises(ValueError, match="is there already: give a new folder"):
        taken_off(tmp_path / "registry/candidate", tmp_path / "model")


def test_a_model_of_before_the_switch_that_is_damaged_is_refused(run, tmp_path):
    residual = run / "adapter/residual.safetensors"
    weights = load_file(residual)
    weights["blocks.0.mlp.fc1.weight"].view(torch.int32)[3, 3] ^= 1
    save_file(weights, residual)
    with pytest.raises(ValueError, match="do not give the model of before the switch"):
        taken_off(run, tmp_path / "model")
    (run / "before_switch.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"before_switch.safetensors is damaged"):
        taken_off(run, tmp_path / "model")
    (run / "before_switch.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no before_switch.safetensors: it never switched"):
        taken_off(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()
