"""Sinks: what a run logs is in TensorBoard and in MLflow too, and none of them ends a run."""

import sys
from collections import defaultdict

import numpy as np
import pytest

from conf_yamls import composed
from conftest import acting
from runs import DIGITS, make_run
from switchlora.cli import main
from switchlora.config import as_plain
from switchlora.process import check_values, checked
from switchlora.storage import MLflow, RunInfo, RunLog, read_events, read_summary
from switchlora.storage.sinks import numbers
from switchlora.sweep import job_values, readable

TINY = (
    *("model.depth=1", "model.embed_dim=16", "model.num_heads=1", "epochs=1", "monitor.window=5"),
    *("switch/criterion=at_epoch", "switch.criterion.epoch=0.5", "switch/rank=fixed"),
    *("switch.rank.rank=2", "checkpoint.every_updates=7", "log.figures=true"),
)
BOTH = "log/sinks=[tensorboard,mlflow]"
VARIABLES = ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI")


class Killed(BaseException):
    """Ends a run without a checkpoint."""


def killing(_):
    raise Killed


@pytest.fixture
def patched(monkeypatch, tmp_path):
    """An environment in which MLflow writes into a folder of the test."""
    pytest.importorskip("mlflow")
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    return monkeypatch


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run with both sinks that was killed four updates after a checkpoint, and went on."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("resumed")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_TRACKING_URI", f"file:{folder / 'mlruns'}")
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
        at_update = acting(patch)
        at_update(18, killing)
        with pytest.raises(Killed):
            make_run(folder / "run", *TINY, BOTH, "resume=auto")
        assert len(list(read_events(folder / "run", "train"))) == 17
        at_update(None, None)
        make_run(folder / "run", *TINY, BOTH, "resume=auto")
    return folder


def curves(folder):
    """By key, the (update, value) of every number in metrics.jsonl."""
    found = defaultdict(list)
    for event in read_events(folder):
        for key, value in numbers(event).items():
            found[key].append((event["num_updates"], value))
    return found


def test_tensorboard_has_each_number_once_also_after_a_kill(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(
        str(resumed / "run/tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()
    found = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    for key, points in curves(resumed / "run").items():
        there = found.pop(key)
        assert [step for step, _ in there] == [step for step, _ in points], key
        assert np.allclose([x for _, x in there], [x for _, x in points], rtol=1e-6), key
    best = read_summary(resumed / "run")["val"]["best_top1"]
    assert found["summary/val.best_top1"] == [(20, pytest.approx(best))]
    assert {"summary/test.top1", "summary/cost.train_flops"} <= set(found)
    pictures = {path.stem for path in (resumed / "run/figures").glob("*.png")}
    assert pictures and {f"figures/{name}" for name in pictures} == set(read.Tags()["images"])
    plugins = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"full.optimizer.lr" in plugins


def test_mlflow_has_each_number_once_also_after_a_kill(resumed, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(f"file:{resumed / 'mlruns'}")
    experiment = client.get_experiment_by_name("theirs")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name.endswith("seed0")
    assert run.data.params["full.optimizer.lr"] == "0.001" and run.data.params["epochs"] == "1"
    for key, points in curves(resumed / "run").items():
        history = client.get_metric_history(run.info.run_id, key)
        assert [(each.step, each.value) for each in history] == points, key
    summary = read_summary(resumed / "run")
    assert run.data.metrics["summary/val.best_top1"] == summary["val"]["best_top1"]
    assert run.data.metrics["events"] == len(list(read_events(resumed / "run")))
    files = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert files == {"summary.json", "config.yaml", "figures"}
    pictures = {path.name for path in (resumed / "run/figures").glob("*.png")}
    sent = client.list_artifacts(run.info.run_id, "figures")
    assert {each.path.rpartition("/")[2] for each in sent} == pictures


def about(folder, said):
    return RunInfo(folder, {"seed": 0}, ["prelora", "seed0"], False, said.append)


def test_what_the_config_says_of_mlflow_counts_more_than_the_environment(patched, tmp_path):
    from mlflow import MlflowClient

    patched.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    patched.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'theirs'}")
    (tmp_path / "metrics.jsonl").touch()
    here = f"file:{tmp_path / 'here'}"
    sink = MLflow(tracking_uri=here, experiment="mine", name="me")
    sink.start(about(tmp_path, []))
    sink.finish(ValueError)
    client = MlflowClient(here)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_name, run.info.status) == ("me", "FAILED")
    assert not (tmp_path / "theirs").exists()


def test_an_experiment_of_the_environment_counts_by_its_id_too(patched, tmp_path):
    from mlflow import MlflowClient

    patched.setenv("MLFLOW_EXPERIMENT_ID", MlflowClient().create_experiment("theirs"))
    (tmp_path / "metrics.jsonl").touch()
    MLflow().start(about(tmp_path, []))
    (run,) = MlflowClient().search_runs(
        [MlflowClient().get_experiment_by_name("theirs").experiment_id]
    )
    assert run.info.run_name == "prelora_seed0"


def test_a_server_that_is_not_there_is_one_line(patched, tmp_path):
    patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    patched.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    lines = lines_of(tmp_path, patched, mlflow=MLflow())
    (line,) = [line for line in lines if "mlflow" in line]
    assert line.startswith("mlflow cannot start, the run goes on without it: ")


def lines_of(folder, patch, **sinks):
    """What a log with sinks says while it passes on two events, a summary and no pictures."""
    said = []
    patch.setattr(RunLog, "line", lambda self, text: said.append(text))
    with RunLog(folder, {}, total_updates=1, sinks=sinks, progress=False) as log:
        for number in (1, 2):
            log.event("train", number, 0.1, **{"train/loss": 1.0})
        log.figures([])
        log.summary({})
    return said


class Recorder:
    """A sink of one's own that notes what it gets, and fails at ``fails``."""

    got: list[str] = []

    def __init__(self, fails=None):
        self.fails = fails

    def note(self, act):
        self.got.append(act)
        if act == self.fails:
            raise ConnectionError("the server is gone")

    def start(self, run):
        self.got.clear()
        self.note("start")

    def log(self, event):
        self.note("log")

    def figures(self, paths):
        self.note("figures")

    def summary(self, values):
        self.note("summary")

    def finish(self, error):
        self.note("finish")


ACTS = ["start", "log", "log", "figures", "summary", "finish"]


@pytest.mark.parametrize("act", dict.fromkeys(ACTS))
def test_a_sink_that_fails_is_told_once_and_left(tmp_path, monkeypatch, act):
    (line,) = lines_of(tmp_path, monkeypatch, mine=Recorder(fails=act))
    failing = "cannot start" if act == "start" else "is left"
    assert line == f"mine {failing}, the run goes on without it: the server is gone"
    assert Recorder.got == ACTS[: ACTS.index(act) + 1]
    assert len(list(read_events(tmp_path))) == 2


def test_only_the_primary_rank_starts_a_sink(tmp_path, monkeypatch):
    monkeypatch.setattr("switchlora.storage.runlog.is_primary", lambda: False)
    Recorder.got.clear()
    assert not lines_of(tmp_path, monkeypatch, mine=Recorder()) and not Recorder.got


def test_a_sink_of_ones_own_is_named_on_the_command_line(tmp_path):
    mine = ("+log.sinks.mine._target_=test_sinks.Recorder", "max_updates=2")
    check_values(as_plain(composed(*DIGITS, *mine)))
    make_run(tmp_path, *TINY, "log.figures=false", *mine)
    import test_sinks  # the class that Hydra found, which another way of importing may double

    assert test_sinks.Recorder.got[0] == "start" and test_sinks.Recorder.got[-1] == "finish"
    assert test_sinks.Recorder.got.count("log") == len(list(read_events(tmp_path)))


@pytest.mark.parametrize("package", ["tensorboard", "mlflow"])
def test_a_package_that_is_not_installed_is_told_before_there_is_a_folder(
    package, tmp_path, monkeypatch
):
    monkeypatch.setattr("switchlora.process.schema.find_spec", lambda _: None)
    words = [f"log/sinks=[{package}]", f"hydra.run.dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["switchlora", *words])
    with pytest.raises(SystemExit, match=f"log/sinks={package} .*: pip install {package}$"):
        main()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "word", ["log/sinks=tensorbord", "log/sinks=[tensorbord]", "log/sinks=[mlflow, wandb]"]
)
def test_a_sink_that_there_is_not_is_told_with_those_that_there_are(word):
    with pytest.raises(ValueError, match="choose one of mlflow, tensorboard"):
        checked([word])


def test_a_job_of_a_sweep_has_its_own_name_and_the_same_folder(tmp_path):
    values = job_values(composed(*DIGITS, "log/sinks=[mlflow]"), tmp_path, tmp_path / "job")
    assert values["log.sinks.mlflow.name"] == "job"
    named = composed(*DIGITS, "log/sinks=[mlflow]", "log.sinks.mlflow.name=n")
    assert "log.sinks.mlflow.name" not in job_values(named, tmp_path, tmp_path / "job")
    assert readable("log/sinks=mlflow") == ""
