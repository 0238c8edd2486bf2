"""GPUs of the jobs of a sweep: who gets which, who waits, and when one is free again."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from starts import PATIENCE
from switchlora.errors import JobInterrupted
from switchlora.sweep import gpus, jobs
from switchlora.sweep.gpus import VISIBLE, gpu_slot, visible_gpus

TELL_AND_WAIT = """
import os, sys, time
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
"""


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv(VISIBLE, "0,1")
    monkeypatch.setattr(gpus, "POLL_SECONDS", 0.02)


def launched_by(monkeypatch, launcher):
    hydra = SimpleNamespace(launcher=SimpleNamespace(_target_=launcher))
    monkeypatch.setattr(jobs.HydraConfig, "get", lambda: hydra)


def settings(**system):
    return OmegaConf.create({"system": {"device": "auto", "jobs_per_gpu": 1, **system}})


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Fake jobs that tell which GPU they see, and end when their file ``end`` is there."""
    launched_by(monkeypatch, "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher")
    monkeypatch.setattr(jobs, "follow_sweep", lambda: None)
    monkeypatch.setattr(
        jobs, "command", lambda _, folder: [sys.executable, "-c", TELL_AND_WAIT, folder / "end"]
    )
    return tmp_path


def run(sweep, name, config):
    folder = sweep / name
    folder.mkdir()
    with jobs._slot(config, sweep, folder, visible_gpus()) as slot:
        jobs._run_alone({}, folder, slot)


def what_it_sees(sweep, name):
    """What a fake job told; it waits until the job has told it."""
    log = sweep / name / "output.log"
    return within_patience(lambda: log.exists() and log.read_text().strip())


def within_patience(look):
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_two_jobs_at_a_time_see_a_gpu_each_and_a_third_waits_for_one(sweep, capfd):
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(run, sweep, name, settings()) for name in ("a", "b")]
        seen = {name: what_it_sees(sweep, name) for name in ("a", "b")}
        running.append(pool.submit(run, sweep, "c", settings()))
        said = within_patience(lambda: capfd.readouterr().out)
        assert sorted(seen.values()) == ["0", "1"]
        assert "c waits for a GPU" in said and "system.jobs_per_gpu" in said
        assert not (sweep / "c" / "output.log").exists()
        (sweep / "a" / "end").touch()
        assert what_it_sees(sweep, "c") == seen["a"]
        for name in ("b", "c"):
            (sweep / name / "end").touch()
        for job in running:
            job.result(PATIENCE)


def test_a_killed_job_frees_its_gpu(sweep):
    process = {}
    started = subprocess.Popen

    def remembered(*words, **options):
        process["job"] = started(*words, **options)
        return process["job"]

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(jobs.subprocess, "Popen", remembered)
        killed = pool.submit(run, sweep, "a", settings())
        assert what_it_sees(sweep, "a") == "0"
        process["job"].send_signal(signal.SIGKILL)
        with pytest.raises(JobInterrupted, match="SIGKILL"):
            killed.result(PATIENCE)
    with gpu_slot(sweep, visible_gpus(), 1, print) as slot:
        assert slot.gpu == "0"


def hold_a_slot(sweep, said):
    """What a launcher does: it holds a slot, and so does its job, whose number is said."""
    with gpu_slot(sweep, ["0"], 1, print) as slot:
        words = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
        job = subprocess.Popen(words, pass_fds=[slot.lock.fileno()])
        said.put(job.pid)
        job.wait()


def test_a_job_keeps_its_gpu_when_only_its_launcher_is_killed(tmp_path):
    forks = multiprocessing.get_context("fork")
    said = forks.SimpleQueue()
    launcher = forks.Process(target=hold_a_slot, args=(tmp_path, said))
    launcher.start()
    job = said.get()
    launcher.kill()
    launcher.join()
    assert gpus._free_slot(tmp_path, ["0"], 1) is None
    os.kill(job, signal.SIGKILL)
    within_patience(lambda: gpus._free_slot(tmp_path, ["0"], 1))


def test_jobs_share_a_gpu_when_they_may_and_the_emptiest_is_taken(tmp_path):
    taken = []
    slots = [gpu_slot(tmp_path, ["0", "1"], 2, print) for _ in range(4)]
    for slot in slots:
        taken.append(slot.__enter__().gpu)
    assert taken == ["0", "1", "0", "1"]
    for slot in slots:
        slot.__exit__(None, None, None)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_job_that_says_where_it_runs_takes_no_slot(tmp_path, device):
    with jobs._slot(settings(device=device), tmp_path, tmp_path / "a", visible_gpus()) as slot:
        assert slot is None


def test_without_a_gpu_nothing_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus() == []
    with gpu_slot(tmp_path, visible_gpus(), 1, print) as slot:
        assert slot is None and not list(tmp_path.iterdir())


def test_names_of_gpus_are_those_that_the_process_was_given(monkeypatch):
    monkeypatch.setenv(VISIBLE, "GPU-8a, GPU-9b")
    assert visible_gpus() == ["GPU-8a", "GPU-9b"]
    monkeypatch.delenv(VISIBLE)
    assert visible_gpus() == ["0", "1"]


def test_jobs_in_processes_of_a_local_launcher_part_the_gpus_of_the_multirun(
    tmp_path, monkeypatch
):
    launched_by(
        monkeypatch, "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"
    )
    monkeypatch.setenv(jobs.GPUS, "0,1")
    monkeypatch.setenv(VISIBLE, "0")
    seen = []
    with jobs._slot_here(settings(), tmp_path, tmp_path / "a"):
        seen.append(os.environ[VISIBLE])
        with jobs._slot_here(settings(), tmp_path, tmp_path / "b"):
            seen.append(os.environ[VISIBLE])
    assert seen == ["0", "1"]


def test_a_queue_that_gives_each_job_its_gpus_is_left_alone(tmp_path, monkeypatch):
    launched_by(
        monkeypatch, "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    )
    monkeypatch.setenv(jobs.GPUS, "0,1")
    monkeypatch.setenv(VISIBLE, "7")
    with jobs._slot_here(settings(), tmp_path, tmp_path / "a"):
        assert os.environ[VISIBLE] == "7" and not (tmp_path / gpus.SLOTS).exists()
