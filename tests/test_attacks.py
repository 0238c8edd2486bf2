"""Files that somebody else made or that went wrong: nothing in them runs, each ends in a line."""

import copy
import os
import pickle
import stat
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from conf_yamls import composed
from runs import DIGITS
from switchlora.analysis.replay.replay import replay
from switchlora.analysis.tables.formats import no_formula, on_one_line
from switchlora.bench.systems import step_of
from switchlora.config import build_saved, from_environment
from switchlora.errors import CheckpointUnusable
from switchlora.run import prepare, save
from switchlora.storage import (
    STATE,
    SUMS,
    FolderLock,
    find_all,
    find_records,
    load_model,
    read_record,
    runlog,
    save_merged,
    tensors,
)
from switchlora.storage.files import sha256_of, write_whole

TINY = (
    *(*DIGITS, "model.depth=1", "model.embed_dim=16", "model.num_heads=1", "epochs=1"),
    *("switch/rank=fixed", "switch.rank.rank=1", "full.scheduler.warmup_t=2"),
)
EVIL = {"_target_": "os.mkdir", "path": "ran"}
WITHIN = {
    "itself": EVIL,
    "in a list": {"_target_": "switchlora.criteria.AllOf", "criteria": [EVIL]},
    "by a path": {"_target_": "hydra.utils.get_method", "path": "os.mkdir"},
    "by an argument": {"_target_": "hydra.utils.get_method", "_args_": ["os.mkdir"]},
    "by a reference": {"_target_": "${oc.decode:os.mkdir}", "path": "ran"},
    "as an escaped reference": {"_target_": "switchlora.criteria.AllOf", "criteria": r"\${x}"},
    "as a part of ours": {"_target_": "switchlora.storage.checkpoint.os.mkdir", "path": "ran"},
    "as a list": {"_target_": ["os.mkdir"], "path": "ran"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that has a checkpoint before its first update."""
    folder = tmp_path_factory.mktemp("made")
    run = prepare(composed(*TINY, "monitor.window=2"), folder)
    with run.log:
        save(run)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What an attack makes would be made here."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("ran").exists()


@pytest.mark.parametrize("kind", WITHIN)
def test_what_a_file_names_is_not_run(kind, made, tmp_path):
    with pytest.raises(ValueError, match="no part of this program|has no references"):
        build_saved(WITHIN[kind], "switch.criterion")
    state = torch.load(find_all(made)[0] / STATE, weights_only=True)
    state["config"]["model"] = WITHIN[kind]
    with pytest.raises(CheckpointUnusable, match="update-00000000: model"):
        load_model(written(tmp_path / "update-00000000", state))
    record = copy.deepcopy(read_record(made))
    record.config["switch"]["criterion"] = WITHIN[kind]
    record.config["defaults"] = ["evil"]
    with pytest.raises(ValueError):
        replay([record], [])
    with pytest.raises(ValueError, match="switch"):
        step_of(record, tmp_path / "timed", ())


def test_what_the_user_names_is_built(made, tmp_path, monkeypatch):
    name = "collections.OrderedDict"
    assert build_saved({"_target_": name, "a": 1}, "model", [name]) == {"a": 1}
    state = torch.load(find_all(made)[0] / STATE, weights_only=True)
    state["config"]["model"] = {"_target_": "torch.nn.Identity"}
    path = written(tmp_path / "update-00000000", state)
    with pytest.raises(CheckpointUnusable, match=r"allow=\['torch.nn.Identity'\]"):
        load_model(path)
    with pytest.raises(CheckpointUnusable, match="wrong content"):  # it was built
        load_model(path, allow=["torch.nn.Identity"])
    state["config"]["model"] = {"_target_": "own_nowhere.Perceptron"}
    path = written(tmp_path / "update-00000001", state)
    with pytest.raises(CheckpointUnusable, match="no module own_nowhere was found .* PYTHONPATH"):
        load_model(path, allow=["own_nowhere.Perceptron"])
    record = copy.deepcopy(read_record(made))
    record.config["switch"]["criterion"] = {"_target_": "builtins.dict"}
    (answer,) = replay([record], ["switch/criterion=never"])
    assert answer.fires_at is None


def test_a_model_reads_no_other_weights_than_its_checkpoint_has(made, tmp_path):
    state = torch.load(find_all(made)[0] / STATE, weights_only=True)
    state["config"]["model"]["checkpoint_path"] = "evil.pth"
    assert load_model(written(tmp_path / "update-00000000", state))


def test_the_metadata_of_a_sharded_checkpoint_runs_nothing(tmp_path):
    dcp.save({"weights/a": torch.zeros(2)}, checkpoint_id=tmp_path)
    assert "weights/a" in tensors.PlainReader(tmp_path).read_metadata().state_dict_metadata
    (tmp_path / ".metadata").write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match="names os.mkdir, which is not run"):
        tensors.PlainReader(tmp_path).read_metadata()


def written(path, state):
    """A checkpoint with right checksums."""
    path.mkdir(parents=True, exist_ok=True)
    torch.save(state, path / STATE)
    (path / SUMS).write_text(f"{sha256_of(path / STATE)}  {STATE}\n")
    return path


FILES = {
    "metrics.jsonl": b'{"event": "train", "num_updates": 1, "epoch": 0.1, "train/loss": 2.0}\n'
    * 3,
    "summary.json": b'{"status": "finished", "val": {"top1": 1.0}, "phases": {"full": {}}}\n',
    "config.yaml": b"seed: 0\nname: x\nswitch:\n  criterion:\n    path: a.never\n",
}


def test_a_run_that_a_command_fails_on_is_left_out_with_a_line(tmp_path):
    for run in ("odd", "whole"):
        (tmp_path / run).mkdir()
        for name, content in FILES.items():
            (tmp_path / run / name).write_bytes(content)
    (tmp_path / "odd" / "config.yaml").write_text("name: 3\n")
    said = []
    (record,) = find_records([tmp_path], said.append, lambda record: record.config["switch"])
    assert record.folder.name == "whole"
    assert said == [f"left out: {tmp_path / 'odd'} holds something odd (KeyError: 'switch')"]


def test_a_file_system_without_locks_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(runlog.fcntl, "flock", refuse)
    with FolderLock(tmp_path / "run"):
        pass
    said = capsys.readouterr().out
    assert "has no locks (Operation not supported): take care that no second run" in said


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_links_are_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "precious")
    (tmp_path / ".config.yaml").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=".lock is a symbolic link, and links are not followed"):
        FolderLock(tmp_path)
    write_whole(tmp_path / "config.yaml", "seed: 0\n")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "config.yaml").read_text() == "seed: 0\n"


def test_written_files_follow_the_umask(vit, tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            path = save_merged(vit, tmp_path / f"{mask}.safetensors")
            write_whole(tmp_path / f"{mask}.yaml", "")
        finally:
            os.umask(before)
        for file in (path, tmp_path / f"{mask}.yaml"):
            assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_label_splits_no_row_and_is_no_formula():
    assert on_one_line("a\r\n b\x85c") == "a b c"
    assert no_formula("=HYPERLINK(1)") == "'=HYPERLINK(1)" and no_formula("a=1") == "a=1"


def test_a_value_from_the_environment_is_told(monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    assert from_environment(composed("+log.token='${oc.env:TOKEN}'")) == ["log.token"]
