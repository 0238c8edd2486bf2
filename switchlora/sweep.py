"""Jobs of a multirun: each in a process of its own, in a folder named after its configuration.

A job's identity is what shapes its results, so the same multirun started again skips the jobs that
are finished, resumes those that were interrupted and retries those that failed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from switchlora import distributed
from switchlora.checkpoint import find_all
from switchlora.errors import JobFailed, near
from switchlora.exits import FAILURE, one_line
from switchlora.identity import Config, identity, is_free, leaves, shaping
from switchlora.resume import AUTO, finished_summary
from switchlora.runlog import METRICS, SUMMARY

JOB = "job.json"
TRUNK = "trunk"
PARENT = "SWITCHLORA_PARENT"
POLL_SECONDS = 1.0
NAME_LENGTH = 80
FRESH_PROCESSES = "submitit"
"""launchers whose jobs are processes of their own already"""
OUTCOMES = {
    "skipped": "finished before",
    "resumed": "resumed",
    "retried": "retried",
    "new": "new",
    "failed": "failed",
}


class Sweep(Callback):
    """Hydra's callback that remembers the multirun of this process, to tell how its jobs went."""

    running: "Sweep | None" = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Note where the jobs are and when they start; make their folder."""
        self.folder, self.start = Path(config.hydra.sweep.dir), time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        Sweep.running = self

    def jobs(self) -> dict[str, dict[str, Any]]:
        """How each job of this multirun ended, by the name of its folder."""
        files = sorted(self.folder.glob(f"*/{JOB}"))
        recent = [path for path in files if path.stat().st_mtime >= self.start]
        return {path.parent.name: json.loads(path.read_text()) for path in recent}

    def lines(self) -> list[str]:
        """How many jobs were skipped, resumed, retried, new and failed, and which."""
        jobs = self.jobs()
        lines = [f"{len(jobs)} jobs in {self.folder}:"]
        for outcome, words in OUTCOMES.items():
            names = [name for name, job in jobs.items() if job["outcome"] == outcome]
            if names and outcome in ("skipped", "new"):
                lines.append(f"  {words}: {len(names)}")
            lines += [
                f"  {words}: {name}{': ' + reason if (reason := jobs[name]['reason']) else ''}"
                for name in names
                if outcome not in ("skipped", "new")
            ]
        if any(job["outcome"] == "failed" for job in jobs.values()):
            lines.append("the same command retries what failed and leaves the rest alone")
        return lines


def job_folder(*, _root_: DictConfig) -> str:
    """The name of a job's folder: what is set on the command line, and its identity."""
    config = {key: value for key, value in _root_.items() if key != "hydra"}
    keys = shaping(OmegaConf.to_container(OmegaConf.create(config), resolve=True))  # type: ignore[arg-type]
    words = [*filter(None, map(readable, _root_.hydra.overrides.task)), identity(keys)]
    while len("_".join(words)) > NAME_LENGTH and len(words) > 1:
        words.pop(0)
    return "_".join(words)


def readable(word: str) -> str:
    """An override as part of a file name: 'switch.criterion.tau=0.5' is 'tau-0.5'."""
    key, _, value = word.partition("=")
    if key.startswith(("+", "hydra.")) or is_free(key):
        return ""
    short = re.split(r"[./]", key)[-1]
    plain = re.sub(r"[^\w.+-]+", "-", value).strip("-")
    return f"{short}-{plain}"


def run_job(config: DictConfig, folder: Path, train: Any) -> Mapping[str, Any]:
    """Make, or finish, the job in ``folder``; return its summary.

    It runs in a fresh process, so that its peak of memory and its W&B run are its own, unless the
    launcher has made one or several processes share it; then ``train(config, folder)`` is called.
    JobFailed, with the reason, when it fails; the other jobs go on.
    """
    hydra = HydraConfig.get()
    values = job_values(config, Path(hydra.sweep.dir), folder)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    outcome = distributed.from_primary(lambda: _begun(folder, plain))
    try:
        if distributed.world_size() > 1 or FRESH_PROCESSES in hydra.launcher._target_:
            train(config, folder)
        elif outcome != "skipped":
            _run_alone(values, folder)
    except Exception as error:
        _note(folder, "failed", one_line(error))
        raise JobFailed(f"{folder.name}: {one_line(error)}") from error
    _note(folder, outcome)
    return json.loads((folder / SUMMARY).read_text())


def job_values(config: DictConfig, sweep: Path, folder: Path) -> dict[str, Any]:
    """What a job of the multirun in ``sweep`` has other than a single run, by dotted key."""
    values: dict[str, Any] = {}
    if config.resume is None or find_all(folder):
        values["resume"] = AUTO
    if config.trunk.dir == AUTO:
        values["trunk.dir"] = str(sweep / TRUNK)
    if config.log.wandb.group is None:
        values["log.wandb.group"] = f"{config.name}-{sweep.name}"
    if config.log.wandb.name == config.name:
        values["log.wandb.name"] = folder.name
    return values


def objectives(config: DictConfig, summary: Mapping[str, Any]) -> float | tuple[float, ...]:
    """The values of a summary that a sweeper optimises, one or several.

    ValueError for a name in ``objectives`` that the summary does not have.
    """
    known = {key: v for key, v in leaves(summary) if isinstance(v, int | float)}
    if missing := [name for name in config.objectives if name not in known]:
        raise ValueError(
            f"objectives: the summary has no number '{missing[0]}'; {near(missing[0], known)}"
        )
    values = tuple(float(known[name]) for name in config.objectives)
    return values[0] if len(values) == 1 else values


def follow_parent() -> None:
    """In a job's process: save and leave, as on SIGTERM, when the process that started it dies."""
    if (parent := os.environ.pop(PARENT, None)) is not None:
        threading.Thread(target=_follow, args=(int(parent),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _run_alone(values: Mapping[str, Any], folder: Path) -> None:
    """Run the job in a process of its own, which leaves the reason of a failure in a file.

    Where jobs run at the same time its output goes to a file too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failure = folder / "failure.txt"
    failure.unlink(missing_ok=True)
    environment = {**os.environ, PARENT: str(os.getpid()), FAILURE: str(failure)}
    one_at_a_time = "BasicLauncher" in HydraConfig.get().launcher._target_
    with nullcontext() if one_at_a_time else (folder / "output.log").open("a") as output:
        status = subprocess.run(
            command(values, folder),
            env=environment,
            stdout=output,
            stderr=output and subprocess.STDOUT,
            check=False,
        ).returncode
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if status:
        told = failure.read_text() if failure.exists() else f"it ended with status {status}"
        raise JobFailed(told)


def command(values: Mapping[str, Any], folder: Path) -> list[str]:
    """The command line that makes this job of a multirun alone."""
    hydra = HydraConfig.get()
    given = [
        source.path for source in hydra.runtime.config_sources if source.provider == "command-line"
    ]
    own = {**values, "hydra.run.dir": os.path.relpath(folder), "hydra.mode": "RUN"}
    return [
        *(sys.executable, "-m", "switchlora"),
        *(word for path in given for word in ("--config-dir", path)),
        *(word for word in hydra.overrides.task if word.partition("=")[0] not in own),
        *(f"{key}={_quoted(value)}" for key, value in own.items()),
    ]


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _begun(folder: Path, config: Config) -> str:
    """'skipped', 'new', 'resumed' or 'retried': what starting the job in ``folder`` is."""
    if finished_summary(AUTO, folder, config) is not None:
        return "skipped"
    if _failed_before(folder):
        return "retried"
    return "resumed" if (folder / METRICS).exists() else "new"


def _failed_before(folder: Path) -> bool:
    job, summary = folder / JOB, folder / SUMMARY
    if job.exists() and json.loads(job.read_text())["outcome"] == "failed":
        return True
    return summary.exists() and json.loads(summary.read_text())["status"] != "finished"


def _note(folder: Path, outcome: str, reason: str | None = None) -> None:
    if not distributed.is_primary():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_text(json.dumps({"outcome": outcome, "reason": reason}) + "\n")


def told(sweep: Sweep | None) -> Sequence[str]:
    """The closing lines of a multirun; none of a single run."""
    return sweep.lines() if sweep is not None else ()
