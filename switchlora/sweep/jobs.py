"""The jobs of a multirun: each has its own process, and a folder named after its configuration.

The identity of a job is what shapes its results. When the same multirun is started again, it:

- skips the jobs that are finished,
- resumes the jobs that were interrupted,
- retries the jobs that failed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from switchlora.config import Config, as_plain, identity, is_free, leaves, shaping
from switchlora.errors import ODD, JobFailed, JobInterrupted
from switchlora.names import near
from switchlora.process import FAILURE, distributed, one_line, say, tell_overruled
from switchlora.storage import (
    AUTO,
    BY_ENVIRONMENT,
    METRICS,
    find_all,
    finished_summary,
    read_summary,
)
from switchlora.sweep.gpus import ANY_GPU, VISIBLE, Slot, gpu_slot, visible_gpus

JOB = "job.json"
TRUNK = "trunk"
PARENT = "SWITCHLORA_PARENT"
"""names the process that started a job's process"""
SWEEP = "SWITCHLORA_SWEEP"
"""names the process of the multirun, for the processes of a launcher such as joblib's"""
GPUS = "SWITCHLORA_GPUS"
"""names the GPUs of the multirun, for a launcher that shows all jobs the same ones"""
POLL_SECONDS = 1.0
NAME_LENGTH = 80
JOB_PATIENCE = 30.0
"""seconds that a job waits for an earlier process in its folder, which may still be saving"""
FRESH_PROCESSES = "submitit"
"""part of the names of launchers that already run each job in its own process"""
ON_THIS_MACHINE = "submitit_launcher.LocalLauncher"
"""end of the name of that launcher of them whose jobs share this machine"""
COUNTED = {"skipped": "finished before", "new": "new"}
"""outcomes of which the closing lines tell the number, with their words"""
NAMED = ("resumed", "retried", "interrupted", "failed")
"""outcomes of which the closing lines name the jobs"""
NOT_DONE = ("interrupted", "failed")
METHOD = "+method"
"""config group of published systems, one yaml each"""
PLACED = (*("resume", "system.threads", "system.device", "system.parallel", "system.compress"),)
"""keys that are not in the identity of a run, but make it another job"""


class Sweep(Callback):
    """Remember the multirun of this process and report how its jobs ended: a Hydra callback."""

    running: "Sweep | None" = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the folder of the jobs; note it, this process and the outcomes of before."""
        os.environ[SWEEP] = str(os.getpid())
        os.environ[GPUS] = ",".join(visible_gpus())
        self.folder = Path(config.hydra.sweep.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.before = {path: _stamp(path) for path in self.folder.glob(f"*/{JOB}")}
        Sweep.running = self

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return outcome and reason of each job of this multirun, by the name of its folder."""
        jobs = {}
        for path in sorted(self.folder.glob(f"*/{JOB}")):
            if _stamp(path) != self.before.get(path):
                jobs[path.parent.name] = _noted(path.parent)
        return jobs

    def lines(self) -> list[str]:
        """Return the closing lines of the multirun.

        They count the skipped and the new jobs. They name the jobs that were resumed, retried or
        interrupted, or that failed.
        """
        jobs = self.jobs()
        if not jobs:
            return []
        lines = [f"{len(jobs)} jobs in {self.folder}:"]
        outcomes = [job["outcome"] for job in jobs.values()]
        for outcome, words in COUNTED.items():
            if outcome in outcomes:
                lines.append(f"  {words}: {outcomes.count(outcome)}")
        for outcome in NAMED:
            for name, job in jobs.items():
                if job["outcome"] == outcome:
                    reason = f": {job['reason']}" if job["reason"] else ""
                    lines.append(f"  {outcome}: {name}{reason}")
        if any(outcome in NOT_DONE for outcome in outcomes):
            lines.append("the same command goes on with these and leaves the rest alone")
        return lines


def told(sweep: Sweep | None) -> Sequence[str]:
    """Return the closing lines of a multirun on the primary rank; none for a single run."""
    if sweep is None or not distributed.is_primary():
        return ()
    return sweep.lines()


def is_empty(sweep: Sweep | None) -> bool:
    """Return whether a multirun had no job at all, such as one of ``seed=range(0,0)``."""
    return sweep is not None and not sweep.jobs()


def failed(sweep: Sweep | None) -> bool:
    """Return whether a job of the multirun failed or was interrupted."""
    if sweep is None:
        return False
    return any(job["outcome"] in NOT_DONE for job in sweep.jobs().values())


def job_folder(*, _root_: DictConfig) -> str:
    """Return the name of a job's folder: the overrides of the command line, and its identity.

    If a folder of the same identity exists under other overrides, its name is returned.
    ``NAME_LENGTH`` bounds the bytes of the name: the first overrides are left out.
    """
    task = list(_root_.hydra.overrides.task)
    name = _identity_of(_root_, task)
    same_job = sorted(Path(_root_.hydra.sweep.dir).glob(f"*_{name}"))
    if same_job:
        return same_job[0].name
    words = [*filter(None, map(readable, task)), name]
    while len(words) > 1 and len("_".join(words).encode()) > NAME_LENGTH:
        words.pop(0)
    return "_".join(words)


def _identity_of(root: DictConfig, task: Sequence[str]) -> str:
    """Return the identity of a job: what shapes its results, where it starts and where it runs."""
    config = dict(root.items())
    del config["hydra"]
    keys = shaping(as_plain(OmegaConf.create(config)))
    for word in task:
        if _places(word):
            keys[word] = ""
    return identity(keys)


def readable(word: str) -> str:
    """Return an override as part of a file name: 'tau-0.5' for 'switch.criterion.tau=0.5'.

    '+method=lora' is 'lora'. Return '' for an override that does not change results, for the
    experiment, for other additions, and for Hydra's own overrides.
    """
    key, _, value = word.partition("=")
    if key == METHOD:
        return value
    if (
        key.startswith(("+", "hydra."))
        or key == "experiments"
        or (is_free(key) and not _places(word))
    ):
        return ""
    short = re.split(r"[./]", key)[-1]
    plain = re.sub(r"[^\w.+-]+", "-", value).strip("-")
    return f"{short}-{plain}"


def run_job(config: DictConfig, folder: Path, train: Any) -> Mapping[str, Any]:
    """Run the job in ``folder``, or finish it; return its summary.

    The job runs in a fresh process. Its peak of memory and its W&B run are thus its own. If the
    launcher has already made a process for the job, or several processes share it,
    ``train(config, folder)`` is called instead. JobFailed, with the reason, when the job fails;
    the other jobs go on.
    """
    hydra = HydraConfig.get()
    sweep = Path(hydra.sweep.dir)
    if hydra.job.chdir:
        sweep = sweep.absolute()
    values = job_values(config, sweep, folder)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    plain = as_plain(config)
    try:
        outcome = distributed.from_primary(lambda: _begun(folder, plain))
        if dist.is_initialized() or FRESH_PROCESSES in hydra.launcher._target_:
            tell_overruled(config, hydra)
            with _slot_here(config, sweep, folder):
                train(config, folder)
        elif outcome != "skipped":
            with _slot(config, sweep, folder, visible_gpus()) as slot:
                _run_alone(values, folder, slot)
    except Exception as error:
        outcome = "interrupted" if isinstance(error, JobInterrupted) else "failed"
        with suppress(OSError):
            _note(folder, outcome, one_line(error))
        raise JobFailed(f"{folder.name}: {one_line(error)}") from error
    _note(folder, outcome)
    summary = read_summary(folder)
    assert summary is not None
    return summary


def job_values(config: DictConfig, sweep: Path, folder: Path) -> dict[str, Any]:
    """Return the values, by dotted key, in which a job of ``sweep`` differs from a single run."""
    values: dict[str, Any] = {}
    if config.resume is None or find_all(folder):
        values["resume"] = AUTO
    if config.trunk.dir == AUTO:
        values["trunk.dir"] = str(sweep / TRUNK)
    own = {"group": f"{config.name}-{sweep.name}", "name": folder.name}
    for key, value in own.items():
        if config.log.wandb[key] is None and BY_ENVIRONMENT[key] not in os.environ:
            values[f"log.wandb.{key}"] = value
    mlflow = (config.log.get("sinks") or {}).get("mlflow", {})
    if mlflow.get("name", "") is None:
        values["log.sinks.mlflow.name"] = folder.name
    return values


def objectives(config: DictConfig, summary: Mapping[str, Any]) -> float | tuple[float, ...]:
    """Return the one or several values of a summary that a sweeper optimises.

    ValueError for a name in ``config.objectives`` that is no number in the summary.
    """
    numbers = {}
    for key, value in leaves(summary):
        if isinstance(value, int | float):
            numbers[key] = value
    values = []
    for name in config.objectives:
        if name not in numbers:
            raise ValueError(
                f"objectives: the summary has no number '{name}'; {near(name, numbers)}"
            )
        values.append(float(numbers[name]))
    return values[0] if len(values) == 1 else tuple(values)


def is_job() -> bool:
    """Return whether this process is a job of a multirun that runs in another process."""
    return FAILURE in os.environ


def follow_parent() -> None:
    """Send this process SIGTERM when the process that started it dies: it saves and leaves.

    Only the process of a job has such a parent.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        _follow_in_background(lambda: os.getppid() == int(parent))


@cache
def follow_sweep() -> None:
    """End this process of a launcher when the multirun's own process dies.

    The job that this process waits for then loses its parent: it saves and leaves too.
    """
    sweep = int(os.environ.get(SWEEP, os.getpid()))
    if sweep == os.getpid():
        return
    if sweep == os.getppid():
        _follow_in_background(lambda: os.getppid() == sweep)
    else:
        _follow_in_background(lambda: _is_alive(sweep))


def _follow_in_background(lives: Callable[[], bool]) -> None:
    threading.Thread(target=_follow, args=(lives,), daemon=True).start()


def _follow(lives: Callable[[], bool]) -> None:
    while lives():
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_alive(process: int) -> bool:
    with suppress(PermissionError):  # it is another user's
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True


def _slot(
    config: DictConfig, sweep: Path, folder: Path, gpus: Sequence[str]
) -> AbstractContextManager[Slot | None]:
    """Return the context in which a job has one of ``gpus``, unless it says where it runs."""
    if config.system.device not in ANY_GPU:
        gpus = ()

    def tell(line: str) -> None:
        say(f"{folder.name} {line}")

    return gpu_slot(sweep, gpus, config.system.jobs_per_gpu, tell)


@contextmanager
def _slot_here(config: DictConfig, sweep: Path, folder: Path) -> Iterator[None]:
    """Let this process have a GPU of its own, if its launcher shows all jobs the same ones.

    Processes that share one job have all GPUs. On a cluster the queue gives each job its own.
    """
    gpus = [name for name in os.environ.get(GPUS, "").split(",") if name]
    shared = HydraConfig.get().launcher._target_.endswith(ON_THIS_MACHINE)
    if dist.is_initialized() or not shared:
        gpus = []
    with _slot(config, sweep, folder, gpus) as slot:
        if slot is not None:
            os.environ[VISIBLE] = slot.gpu
        yield


def _run_alone(values: Mapping[str, Any], folder: Path, slot: Slot | None = None) -> None:
    """Run the job in its own process, on the GPU of its ``slot``, and wait for it.

    JobFailed with the reason that the job leaves in ``failure.txt``. JobInterrupted when a signal
    ended it. If the launcher runs jobs at the same time, the output goes to ``output.log``.
    """
    follow_sweep()
    failure = folder / "failure.txt"
    failure.unlink(missing_ok=True)
    environment = {**os.environ, PARENT: str(os.getpid()), FAILURE: str(failure)}
    held = []
    if slot is not None:
        environment[VISIBLE] = slot.gpu
        held.append(slot.lock.fileno())
    one_at_a_time = "BasicLauncher" in HydraConfig.get().launcher._target_
    with nullcontext() if one_at_a_time else (folder / "output.log").open("a") as output:
        process = subprocess.Popen(
            command(values, folder),
            env=environment,
            stdout=output,
            stderr=output and subprocess.STDOUT,
            pass_fds=held,
        )
        status = _wait_for(process)
    number = _signal_in(status)
    if number == signal.SIGINT:
        _note(folder, "interrupted", "by Ctrl-C")
        raise KeyboardInterrupt
    if number:
        raise JobInterrupted(f"it was ended by {signal.Signals(number).name}")
    if status:
        why = (
            failure.read_text(encoding="utf-8")
            if failure.exists()
            else f"it ended with status {status}"
        )
        raise JobFailed(why)


def _signal_in(status: int) -> int:
    """Return the number of the signal that an exit status tells of; 0 for none.

    Python tells -n of a process that signal n ended, and this program itself exits with 128 + n.
    """
    if status > 128:
        return status - 128
    return max(-status, 0)


def _wait_for(process: subprocess.Popen) -> int:
    """Return the exit status.

    Ctrl-C is ignored here: the process has received it too, and it ends by itself.
    """
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def command(values: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the command line that runs this one job of a multirun alone."""
    hydra = HydraConfig.get()
    own = {**values, "hydra.run.dir": os.path.relpath(folder), "hydra.mode": "RUN"}
    words = [sys.executable, "-m", "switchlora", "--config-name", str(hydra.job.config_name)]
    words += words_for_yamls()
    for word in hydra.overrides.task:
        if word.partition("=")[0] not in own:
            words.append(word)
    for key, value in own.items():
        words.append(f"{key}={quoted(value)}")
    return words


def words_for_yamls() -> list[str]:
    """Return the words of the command line that say where further yamls are."""
    hydra = HydraConfig.get()
    words = []
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            words += ["--config-dir", source.path]
    for word in hydra.overrides.hydra:
        if word.startswith("hydra.searchpath"):
            words.append(word)
    return words


def quoted(value: str) -> str:
    """Return a value in the quotes in which Hydra takes it as it is.

    Hydra takes a backslash as it is too, unless a quote follows.
    """
    doubled = re.sub(r"(\\+)(?='|\Z)", r"\1\1", value)
    escaped = doubled.replace("'", "\\'")
    return f"'{escaped}'"


def _places(word: str) -> bool:
    """Return whether an override says where a job starts, which data it reads or where it runs."""
    key, _, value = word.partition("=")
    if value in (AUTO, "null"):
        return False
    return key in PLACED or key.endswith("root")


def _begun(folder: Path, config: Config) -> str:
    """Begin the job in ``folder``; return 'skipped', 'new', 'resumed' or 'retried'.

    The note of an earlier start is removed, unless the job is skipped.
    """
    if finished_summary(AUTO, folder, config) is not None:
        return "skipped"
    folder.mkdir(parents=True, exist_ok=True)
    failed_before = _noted(folder)["outcome"] == "failed"
    (folder / JOB).unlink(missing_ok=True)
    if failed_before:
        return "retried"
    return "resumed" if (folder / METRICS).exists() else "new"


def _stamp(path: Path) -> tuple[int, int]:
    """Return what changes when a file is written anew, even if the clock was set back."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _noted(folder: Path) -> dict[str, Any]:
    """Return the noted outcome of the job in a folder; 'interrupted' if none can be read."""
    try:
        noted = json.loads((folder / JOB).read_text())
        return {"outcome": str(noted["outcome"]), "reason": str(noted["reason"])}
    except (OSError, ValueError, RecursionError, *ODD):
        return {"outcome": "interrupted", "reason": ""}


def _note(folder: Path, outcome: str, reason: str = "") -> None:
    if distributed.is_primary():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{JOB}"
        part.write_text(json.dumps({"outcome": outcome, "reason": reason}) + "\n")
        part.replace(folder / JOB)
