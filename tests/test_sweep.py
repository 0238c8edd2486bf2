"""A multirun whose jobs fail, are killed, and are started again."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from omegaconf import OmegaConf

from conf_yamls import composed
from runs import DIGITS
from starts import PATIENCE, Started, multirun
from switchlora.analysis.tables import table as tables
from switchlora.config import identity, shaping
from switchlora.storage import find_records
from switchlora.sweep import JOB, job_folder, job_values, objectives, readable
from switchlora.sweep.jobs import _begun, _wait_for

JOBS = (
    *DIGITS,
    *("data.train_size=640", "epochs=2", "monitor.window=5", "full.scheduler.warmup_t=5"),
    *("system.threads=1", "switch/criterion=at_epoch", "log.every=1"),
)


def started(folder, *overrides):
    """``switchlora -m`` of the jobs in ``folder``."""
    words = ("-m", *JOBS, f"hydra.sweep.dir={folder}", *overrides)
    return Started(f"{folder}.said", multirun, *words)


def outcome_of(folder, *overrides):
    """Exit status and everything that was said."""
    with started(folder, *overrides) as process:
        done = process.finish()
    return done.returncode, done.stdout + done.stderr


def outcomes(folder):
    """What became of each job, by the seed or the epoch of its switch."""
    return {p.parent.name: json.loads(p.read_text())["outcome"] for p in folder.glob(f"*/{JOB}")}


def wait_for_updates(folder, count):
    end = time.monotonic() + PATIENCE
    while sum(1 for path in folder.glob("*/metrics.jsonl") for _ in path.open()) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_started_again_ends_as_one_that_was_left_alone(
    tmp_path, monkeypatch
):
    epochs = "switch.criterion.epoch=0.5,1"
    status, said = outcome_of(tmp_path / "whole", epochs)
    assert status == 0 and "2 jobs in" in said and "new: 2" in said
    with started(tmp_path / "killed", epochs):
        wait_for_updates(tmp_path / "killed", 12)
    status, said = outcome_of(tmp_path / "killed", epochs)
    assert status == 0 and "new: 1" in said and "resumed: " in said, said
    tables_of = [table(tmp_path / name, monkeypatch) for name in ("killed", "whole")]
    assert tables_of[0] == tables_of[1]
    status, said = outcome_of(tmp_path / "killed", epochs)
    assert status == 0 and "finished before: 2" in said
    assert set(outcomes(tmp_path / "killed").values()) == {"skipped"}


def table(folder, monkeypatch):
    """The bytes of a sweep's table, without what a clock or the memory says."""
    words = ["tables.py", str(folder), "--no-times", "--out", str(folder / "tables")]
    monkeypatch.setattr(sys, "argv", words)
    tables.main()
    files = sorted((folder / "tables").glob("*.*"))
    assert files
    return {file.name: file.read_bytes() for file in files if file.suffix != ".png"}


@pytest.mark.slow
def test_a_job_that_fails_takes_no_other_along_and_is_retried(tmp_path):
    folder = tmp_path / "sweep"
    jobs = ("switch.criterion.epoch=1", "data.batch_size=100000,64")
    status, said = outcome_of(folder, *jobs)
    assert status == 1 and "Traceback" not in said
    assert re.search("  failed: .*_batch_size-100000_", said)
    assert "data.batch_size=100000 must lie between 1 and the 640 training images" in said
    assert sorted(outcomes(folder).values()) == ["failed", "new"]
    (failed,) = (name for name, outcome in outcomes(folder).items() if outcome == "failed")
    status, said = outcome_of(folder, *jobs)
    assert status == 1 and "finished before: 1" in said
    assert outcomes(folder)[failed] == "failed"


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of two trials of Optuna's."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="it is not installed")
    folder = tmp_path_factory.mktemp("searched")
    words = ("+search=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1")
    status, said = outcome_of(folder, *words, "switch.criterion.epoch=interval(0.3, 1.7)")
    assert status == 0, said
    return folder


@pytest.mark.slow
def test_trials_of_a_search_are_runs_as_those_of_any_sweep(searched):
    records = find_records([searched])
    assert len(records) == 2 and all(record.finished for record in records)
    for record in records:
        wandb = record.config["log"]["wandb"]
        assert wandb["name"] == record.folder.name and wandb["group"] == f"run-{searched.name}"
        updates = [event["num_updates"] for event in record.events("train")]
        assert updates == list(range(1, 21)), "whole, whoever computed the full phase"


@pytest.mark.slow
def test_optuna_seeks_accuracy_against_cost(searched):
    results = OmegaConf.load(searched / "optimization_results.yaml")
    summaries = [record.summary for record in find_records([searched])]
    values = {(s["val"]["top1"], float(s["cost"]["train_flops"])) for s in summaries}
    assert {tuple(solution["values"]) for solution in results.solutions} <= values


def job_config(*overrides, sweep="nowhere"):
    config = OmegaConf.create(OmegaConf.to_container(composed(*DIGITS, *overrides)))
    hydra = {"overrides": {"task": [*DIGITS, *overrides]}, "sweep": {"dir": str(sweep)}}
    return OmegaConf.merge(config, {"hydra": hydra})


def test_the_folder_of_a_job_tells_its_settings_and_its_identity():
    words = ("+experiments=thresholds", "switch.criterion.fraction=0.5", "seed=1", "name=mine")
    folder = job_folder(_root_=job_config(*words))
    assert folder.startswith("data-digits_model-digits_depth-1_embed_dim-32_fraction-0.5_seed-1_")
    config = OmegaConf.to_container(composed(*DIGITS, *words), resolve=True)
    assert folder.endswith(identity(shaping(config)))


def test_what_changes_no_result_changes_no_identity():
    names = {
        job_folder(_root_=job_config("seed=1", *words)).rpartition("_")[2]
        for words in (
            (),
            ("name=other",),
            ("system.workers=2",),
            ("trunk.dir=null",),
            ("resume=auto",),
        )
    }
    assert len(names) == 1
    assert job_folder(_root_=job_config("seed=2")).rpartition("_")[2] not in names


@pytest.mark.parametrize(
    "word, name",
    [
        ("switch.criterion.tau=0.5", "tau-0.5"),
        ("switch/criterion=prelora", "criterion-prelora"),
        ("switch.train_factors=[A,B]", "train_factors-A-B"),
        ("experiments=thresholds", ""),
        ("system.workers=2", ""),
        ("resume=runs/x", "resume-runs-x"),
        ("log=quiet", ""),
    ],
)
def test_overrides_make_readable_names_without_what_a_shell_or_hydra_would_read(word, name):
    assert readable(word) == name


def test_a_job_shares_its_trunk_and_its_wandb_group_with_the_sweep(tmp_path):
    values = job_values(composed(*DIGITS), tmp_path, tmp_path / "job")
    assert values == {
        "resume": "auto",
        "trunk.dir": str(tmp_path / "trunk"),
        "log.wandb.group": f"run-{tmp_path.name}",
        "log.wandb.name": "job",
    }
    own = ("resume=runs/x", "trunk.dir=null", "log.wandb.group=g", "log.wandb.name=n")
    assert job_values(composed(*DIGITS, *own), tmp_path, tmp_path / "job") == {}


def test_where_a_job_starts_and_what_data_it_reads_make_another_job():
    names = {
        job_folder(_root_=job_config("seed=1", *words))
        for words in ((), ("resume=runs/x",), ("resume=runs/y",), ("system.threads=2",))
    }
    assert len(names) == 4
    assert len({name.rpartition("_")[2] for name in names}) == 4


def test_the_same_job_in_other_words_keeps_its_folder(tmp_path):
    first = job_folder(_root_=job_config("seed=1", "epochs=3", sweep=tmp_path))
    (tmp_path / first).mkdir()
    assert job_folder(_root_=job_config("epochs=3", "seed=1", sweep=tmp_path)) == first


def test_a_note_that_cannot_be_read_counts_as_an_interruption(tmp_path):
    (tmp_path / JOB).write_text("")
    (tmp_path / "metrics.jsonl").touch()
    assert _begun(tmp_path, {}) == "resumed"
    assert not (tmp_path / JOB).exists()


def interrupt_once_it_waits(process):
    """Send Ctrl-C to this program when its main thread waits for a process; then let that end."""
    main = threading.main_thread().ident
    while sys._current_frames()[main].f_code.co_filename != subprocess.__file__:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    process.stdin.close()


def test_ctrl_c_leaves_the_job_the_time_to_save():
    words = [sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(7)"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
        threading.Thread(target=interrupt_once_it_waits, args=(process,)).start()
        assert _wait_for(process) == 7
    finally:
        signal.signal(signal.SIGINT, before)


def test_objectives_are_numbers_of_the_summary():
    summary = {"val": {"top1": 50.0}, "cost": {"train_flops": 10, "train_seconds": None}}
    assert objectives(composed(), summary) == 50.0
    both = composed("objectives=[val.top1,cost.train_flops]")
    assert objectives(both, summary) == (50.0, 10.0)
    with pytest.raises(ValueError, match=r"no number 'cost.train_seconds'; near names: cost"):
        objectives(composed("objectives=[cost.train_seconds]"), summary)
