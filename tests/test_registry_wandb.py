"""Versions of a registry in W&B: as artifacts, and with their alias for production."""

import json
import sys

import pytest
import wandb

from runs import make_run, wandb_records
from switchlora import commands
from switchlora.analysis.versions import publish
from switchlora.analysis.wandb_report import wandb_id
from switchlora.registry import PRODUCTION, aliases, entries, read_about, versions
from switchlora.storage import read_record
from test_wandb_log import empty_environment  # noqa: F401

TINY = ("model.embed_dim=16", "model.num_heads=1", "model.depth=1", "switch/criterion=never")
SHORT = ("epochs=1", "max_updates=2", "monitor.window=1", "log.wandb.project=p")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an offline W&B run."""
    folder = tmp_path_factory.mktemp("registry") / "run"
    make_run(folder, *TINY, *SHORT, "log.wandb.mode=offline")
    return folder


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """No reference for drift is measured, which takes the most time of publishing."""
    monkeypatch.setattr(publish, "reference_or_reason", lambda *_: "it was not measured")


@pytest.fixture
def said(monkeypatch, capsys):
    """Calls a command; what it prints, and the line that it exits with."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["switchlora-runs", *map(str, words)])
        try:
            commands.runs()
            code = None
        except SystemExit as stop:
            code = stop.code
        return [*capsys.readouterr().out.splitlines(), *([code] if code else [])]

    return call


def test_an_artifact_holds_the_version_and_belongs_to_the_run_that_trained_it(
    run, tmp_path, said, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    *_, line = said("publish", run, "my models", "--alias", "shadow", "--wandb")
    assert line.startswith(f"'wandb sync {tmp_path}/my models/wandb/offline-run-")
    assert line.endswith("sends v0001 to W&B, as artifact my-models:shadow")
    records = wandb_records(tmp_path / "my models")
    (found,) = (each["artifact"] for each in records if "artifact" in each)
    assert (found["name"], found["type"], found["project"]) == ("my-models", "model", "p")
    assert set(found["aliases"]) == {"shadow", "version-0001", "latest"}
    assert found["run_id"] == wandb_id(read_record(run))
    version = tmp_path / "my models/v0001"
    about = read_about(version)
    assert json.loads(found["metadata"]) == {**about, "version": "v0001"}
    assert about["data"]["sha256"].keys() == {"train", "val", "test"} and "verdict" in about
    sent = {each["path"]: each["local_path"] for each in found["manifest"]["contents"]}
    files = [path for path in version.rglob("*") if path.is_file()]
    assert sent == {path.relative_to(version).as_posix(): str(path) for path in files}


def test_what_is_offline_says_how_production_is_moved_later(run, tmp_path, said):
    registry = tmp_path / "models"
    for _ in range(2):
        said("publish", run, registry)
    later = "W&B is offline: WANDB_MODE=online switchlora-runs promote {} {} --wandb moves"
    for words, version in ((("v0001",), "v0001"), (("v0002",), "v0002")):
        *_, line = said("promote", registry, *words, "--wandb")
        assert line.startswith(later.format(registry, version))
    *_, line = said("rollback", registry, "--wandb")
    assert line.startswith(later.format(registry, "v0001"))


def test_without_a_key_a_version_waits_and_production_is_not_moved(
    run, tmp_path, said, monkeypatch, capsys
):
    monkeypatch.setenv("WANDB_MODE", "online")
    registry = tmp_path / "models"
    *_, line = said("publish", run, registry, "--wandb")
    assert "sends v0001 to W&B" in line and len(list(registry.glob("wandb/offline-run-*"))) == 1
    done, line = said("promote", registry, "--wandb")
    assert done == "v0001 is in production"
    assert line.startswith("promote: production was not moved in W&B; switchlora-runs promote")
    assert "there is no key: 'wandb login'" in line and "\n" not in line


def test_where_wandb_is_disabled_nothing_is_published_with_it(run, tmp_path, said, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (line,) = said("publish", run, tmp_path / "models", "--wandb")
    assert line.startswith("publish: --wandb: the environment disables W&B")
    assert not (tmp_path / "models").exists()


class Artifact:
    """What W&B's server keeps of an artifact: there is none to ask here."""

    def __init__(self, metadata):
        self.metadata, self.aliases, self.saved = metadata, ["candidate"], False

    def save(self):
        self.saved = True


@pytest.mark.parametrize("same", [True, False])
def test_online_the_alias_moves_to_the_artifact_of_the_same_weights(
    run, tmp_path, said, monkeypatch, same
):
    registry = tmp_path / "models"
    said("publish", run, registry)
    about = read_about(registry / "v0001") if same else {"weights_sha256": "0" * 64}
    artifact, asked = Artifact(about), []

    class Api:
        def artifact(self, path, type):
            asked.append((path, type))
            return artifact

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "Api", Api)
    *_, line = said("promote", registry, "--wandb")
    assert asked == [("p/models:version-0001", "model")]
    assert artifact.saved is same and (PRODUCTION in artifact.aliases) is same
    assert aliases(entries(registry))[PRODUCTION] == "v0001" and versions(registry) == ["v0001"]
    if same:
        assert line == "v0001 is in production in W&B too"
    else:
        assert "is of other weights: another registry has this name there" in line
