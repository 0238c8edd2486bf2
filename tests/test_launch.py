"""Jobs through Hydra's submitit launcher, whose local executor takes Slurm's part here.

Pickles, signal handlers and restarts are those of a Slurm job; only the queue is missing.
"""

import glob
import os
import signal
import time
from contextlib import suppress

import pytest
from hydra import compose, initialize_config_dir

from conf_yamls import CONF, names
from runs import DIGITS, events_without_times
from starts import (
    PATIENCE,
    Started,
    children,
    parent_of,
    program,
    through_submitit,
    torchrun,
)

pytest.importorskip(
    "hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed"
)

SHORT = (*DIGITS, "log.every=1", "data.train_size=640", "epochs=4", "full.scheduler.warmup_t=5")
ONE_THREAD = ("seed=0", "system.threads=1")
BY_DATE = ("monitor.window=5", "switch/criterion=at_epoch", "switch.criterion.epoch=1.5")


class Launched(Started):
    """``switchlora -m +launch=local`` and the jobs that it waits for."""

    def __init__(self, folder, *overrides):
        self.folder = folder
        words = ["-m", "+launch=local", *SHORT, *BY_DATE, f"hydra.sweep.dir={folder}"]
        words += ["hydra.sweep.subdir=${hydra.job.num}", *overrides]
        super().__init__(f"{folder}.said", through_submitit, *words)

    def wait_for_updates(self, folder, count):
        """Until ``metrics.jsonl`` of a run folder has ``count`` lines."""
        end = time.monotonic() + PATIENCE
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
            assert time.monotonic() < end and self.running, self.logs()
            time.sleep(0.02)

    def logs(self):
        """What all tasks of all jobs wrote, those before a restart too."""
        logs = sorted((self.folder / ".submitit").glob("*/*_log.*"))
        return "\n".join(path.read_text() for path in logs)

    def finish_well(self):
        """Wait for the launcher, which waits for its jobs; what they wrote."""
        done = self.finish()
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return self.logs()


def tasks_in(folder):
    """The processes of the job that runs in a folder, one a rank: one has its lock open."""
    lock = str(folder / ".lock")
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link) == lock:
                return children(parent_of(int(link.split("/")[2])))
    raise AssertionError(f"no process runs in {folder}")


@pytest.mark.slow
def test_two_tasks_of_a_job_that_is_put_back_end_as_ranks_that_were_left_alone(tmp_path):
    run, alone = tmp_path / "0", tmp_path / "alone"
    with Launched(tmp_path, *ONE_THREAD, "hydra.launcher.tasks_per_node=2") as launched:
        launched.wait_for_updates(run, 25)
        both = tasks_in(run)
        assert len(both) == 2
        for task in both:
            os.kill(task, signal.SIGUSR2)
        said = launched.finish_well()
    assert said.count("resumed from") == 1, said
    assert said.count("all 2 ranks train the same tensors") == 2, "at the switch and the resume"
    words = (*SHORT, *BY_DATE, *ONE_THREAD, f"hydra.run.dir={alone}")
    with Started(f"{alone}.said", torchrun, 2, program, *words) as started:
        done = started.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert events_without_times(run) == events_without_times(alone)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, alone)]
    assert weights[0] == weights[1] and (run / "summary.json").exists()


@pytest.mark.parametrize("name", names("launch"))
def test_every_launch_config_composes_and_names_its_launcher(name):
    plugin = "submitit" if name in ("slurm", "local") else name
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher", reason="it is not installed")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"+launch={name}"], return_hydra_config=True)
    assert config.hydra.launcher["_target_"].endswith(f".{name.title()}Launcher")
