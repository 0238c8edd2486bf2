"""Starts of the program in forks of a server that has imported it: a start costs no imports."""

import atexit
import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from contextlib import suppress
from importlib import import_module
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

import switchlora.sweep.jobs
from switchlora.cli import main, start_time

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from killtest import PRELOADED

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*PRELOADED, "warmed"])
TESTS = str(Path(__file__).parent)
PATIENCE = 240
"""seconds that a start may take on a busy machine"""


class Started:
    """``act(*words)`` in a session of its own, all of which ends with the test.

    What it and its processes say goes to ``output`` and to ``output``.err.
    """

    def __init__(self, output, act, *words):
        self.files = [Path(output), Path(f"{output}.err")]
        self.words = words
        serve_forks()
        self.process = FORKS.Process(target=_enter, args=(self.files, act, words))
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    @property
    def running(self):
        return self.process.exitcode is None

    def kill(self):
        """SIGKILL whatever of it still runs."""
        for call in (os.killpg, os.kill):  # its session may not have begun
            with suppress(ProcessLookupError):
                call(self.process.pid, signal.SIGKILL)
        self.process.join()

    def show_stacks(self):
        """Let all of its processes say where they are; one that has not begun says nothing."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGRTMIN)
        time.sleep(2)

    def said(self):
        """Standard output and standard error so far."""
        return [file.read_text() if file.exists() else "" for file in self.files]

    def finish(self):
        """What ``subprocess.run`` returns."""
        self.process.join(PATIENCE)
        hangs = self.running
        if hangs:
            self.show_stacks()
        assert not hangs, self.said()
        return CompletedProcess(self.words, self.process.exitcode, *self.said())


def serve_forks():
    """Start the server of forks, if it does not run, where it finds the modules of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
        ensure_running()


def _enter(files, act, words):
    os.setsid()
    gc.freeze()  # what the imports made stays
    os.fsync = lambda descriptor: None  # no test cuts the power
    multiprocessing.set_start_method(None, force=True)  # that of a program, not of this server
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    tqdm.set_lock(threading.RLock())  # its own would be told as leaked after a kill
    for descriptor, path in enumerate(files, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    faulthandler.register(signal.SIGRTMIN)
    try:
        act(*words)
    finally:
        end_program()


def end_program():
    """Do what a program does at its end, and a process of multiprocessing leaves out."""
    atexit._run_exitfuncs()


def program(*words):
    """``switchlora *words``."""
    sys.argv = ["switchlora", *words]
    main()


def program_in(folder, *words):
    """``switchlora *words`` in a folder whose modules Python finds."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    program(*words)


def multirun(*words):
    """``switchlora *words`` with its jobs in forks of this process."""
    switchlora.sweep.jobs.subprocess = WITH_FORKS
    program(*words)


def through_submitit(*words):
    """``switchlora *words`` with the controller and the tasks of submitit's jobs in forks."""
    from submitit.local import local

    local.subprocess = WITH_FORKS
    program(*words)


def through_joblib(*words):
    """``switchlora *words`` with joblib's processes, and the jobs that they start, in forks."""
    import_module("joblib.externals.loky.backend.context").set_start_method("fork")
    multirun(*words)


class Forked:
    """What ``subprocess.Popen`` makes of ``python -m MODULE WORDS``, without the imports."""

    def __init__(self, command, env, stdout=None, stderr=None, **_):
        module, *words = command[command.index("-m") + 1 :]
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_status_of(module, words, env, (stdout, stderr)))

    def wait(self):
        return self.poll(0)

    def poll(self, how=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


WITH_FORKS = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})


def _status_of(module, words, environment, outputs):
    """The exit status of a module, in a process that is in the middle of another start."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, output in enumerate(outputs, start=1):
        if output is not None:
            source = 1 if output == subprocess.STDOUT else output.fileno()
            os.dup2(source, descriptor)
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    switchlora.sweep.jobs.Sweep.running = None
    start_time.cache_clear()
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        end_program()
    return 0


def torchrun(processes, act, *words, looks_every=0.1):
    """``act(*words)`` on several gloo ranks, by the launcher that is behind ``torchrun``.

    After so many seconds it ends the others, where one has ended. No rank begins before all are
    forked: a store that answers one of them may hold the C library's lock on names, and a process
    that is forked then never finds a name.
    """
    forked = multiprocessing.get_context("fork").Barrier(processes)
    config = LaunchConfig(
        *(1, 1, processes),
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=looks_every,
        start_method="fork",
    )
    elastic_launch(config, _once_all_are)(forked, act, *words)


def _once_all_are(forked, act, *words):
    forked.wait()
    act(*words)


def children(pid):
    """The processes that a process started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(number) for number in text.split()]


def parent_of(pid):
    """The process that started a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
