"""W&B: what the environment says counts, and nothing that fails there ends a run."""

import copy
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from conf_yamls import composed
from runs import DIGITS, SHORT, make_run
from switchlora.analysis.tables.formats import markdown
from switchlora.analysis.tables.table import make_table
from switchlora.run.prepare import telling_words
from switchlora.storage import RunInfo, WandbLog, find_records, wandb_mode, wandb_options
from switchlora.storage.sinks import Patient
from switchlora.storage.wandb_log import BY_ENVIRONMENT
from switchlora.train import train

VARIABLES = (*BY_ENVIRONMENT.values(), "WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY")
NOTHING = {"mode": None, "project": None, "name": None, "group": None, "tags": []}
DEFAULTS = {"project": "p", "name": "n", "tags": ["t"], "job_type": "train"}


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize(
    "variable, value, mode",
    [
        ("WANDB_MODE", "online", "online"),
        ("WANDB_MODE", "dryrun", "offline"),
        ("WANDB_MODE", "disabled", "disabled"),
        ("WANDB_DISABLED", "true", "disabled"),
    ],
)
def test_the_mode_is_the_environments_unless_the_config_says_otherwise(
    monkeypatch, variable, value, mode
):
    assert wandb_mode(None) == "offline"
    monkeypatch.setenv(variable, value)
    assert wandb_mode(None) == mode
    assert wandb_mode("offline") == "offline"


def test_a_mode_that_there_is_not_is_refused_with_its_place(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(ValueError, match="WANDB_MODE is 'on': choose one of offline, online"):
        wandb_mode(None)


@pytest.mark.parametrize("option", ["project", "name", "tags", "job_type"])
def test_an_option_of_the_environment_is_left_to_wandb(monkeypatch, option):
    assert wandb_options(NOTHING, DEFAULTS) == {**DEFAULTS, "mode": "offline"}
    monkeypatch.setenv(BY_ENVIRONMENT[option], "theirs")
    assert option not in wandb_options(NOTHING, DEFAULTS)
    assert wandb_options({**NOTHING, option: "mine"}, DEFAULTS)[option] == "mine"


def test_a_run_has_a_telling_name(monkeypatch):
    monkeypatch.setattr(HydraConfig, "initialized", lambda: False)  # a test before may have begun
    assert telling_words(composed("seed=3")) == ["seed3"]
    assert telling_words(composed("name=mine")) == ["mine", "seed0"]


class Broken:
    """A W&B run whose service has died."""

    id, starting_step = "abc", 0

    def __getattr__(self, name):
        def fail(*_, **__):
            raise ConnectionError("the service is gone")

        return fail


def started(folder, mode, said):
    """A W&B run as the log has it, and what it says."""
    (folder / "metrics.jsonl").touch()
    log = Patient("W&B", WandbLog({"mode": mode}, None), said.append)
    log.start(RunInfo(folder, {}, [], False, said.append))
    return log


@pytest.mark.parametrize("act", ["log", "figures", "summary", "finish"])
def test_a_service_that_dies_is_told_once_and_left(monkeypatch, tmp_path, act):
    monkeypatch.setattr("switchlora.storage.wandb_log._start", lambda *_: Broken())
    said = []
    log = started(tmp_path, "offline", said)
    for _ in range(2):
        getattr(log, act)({"log": {}, "figures": [], "summary": {}, "finish": None}[act])
    (line,) = said
    assert line.startswith("W&B is left, the run goes on without it: ")


def test_without_a_service_there_is_a_run_all_the_same(monkeypatch, tmp_path):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr("switchlora.storage.wandb_log._start", fail)
    said = []
    log = started(tmp_path, "online", said)
    log.log({"loss": 1.0})
    assert [line.split(":")[0] for line in said] == [
        "W&B logs offline",
        "W&B cannot start, the run goes on without it",
    ]


def test_online_without_a_login_is_one_line_and_an_offline_run(tmp_path, capfd):
    few = ("epochs=1", "max_updates=2", "monitor.window=1", "switch/criterion=never")
    small = ("model.depth=1", "model.embed_dim=16", "model.num_heads=1")
    assert make_run(tmp_path, *DIGITS, *few, *small, "log.wandb.mode=online")["num_updates"] == 2
    out, err = capfd.readouterr()
    assert [x for x in out.splitlines() if "W&B" in x or "wandb" in x][0].startswith(
        "W&B logs offline: there is no key"
    )
    assert "Traceback" not in out + err and "wandb" not in err
    assert list(Path(tmp_path).glob("wandb/offline-run-*"))


def test_names_may_be_numbers(tmp_path, monkeypatch):
    """``name=7`` is a whole number to Hydra and to YAML."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    words = (*SHORT, "name=7", "epochs=1", "log/sinks=[mlflow]", "log.wandb.mode=offline")
    words += ("log.sinks.mlflow.experiment=3", "log.sinks.mlflow.name=4", "log.wandb.group=5")
    config = copy.deepcopy(composed(*words, "log.wandb.project=6", "log.wandb.tags=[1,2]"))
    config.method = 8  # as a yaml of one's own may say it
    train(config, tmp_path / "run")
    assert (tmp_path / "run/wandb").exists() and (tmp_path / "run/mlflow_run_id").exists()
    table = make_table(find_records([tmp_path / "run"]))
    assert markdown(table)
