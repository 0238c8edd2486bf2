"""A loader's processes may die at any moment: each way in which torch shows that is told alike."""

import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Batches

from switchlora.data import Loader
from switchlora.data.batches import EpochSampler
from switchlora.data.loaders import make_loaders
from switchlora.errors import LoaderDied
from switchlora.process import exit_with_one_line


class Squares(Dataset):
    """Batches of 8 x 4,096 numbers and 8 labels; ``act`` is called for each in the worker."""

    def __init__(self, act=lambda row: None):
        self.act = act

    def __len__(self):
        return 8

    def __getitem__(self, row):
        self.act(row)
        return torch.full((8, 4096), float(row)), torch.full((8,), row)


def loader(act=lambda row: None, workers=1):
    return Loader(Squares(act), num_workers=workers)


def test_batches_of_workers_are_those_of_none():
    alone, helped = ([batch[0][0, 0].item() for batch in loader(workers=n)] for n in (0, 2))
    assert alone == helped == list(range(8))


class Keyed(Squares):
    """The same, by keys of a row and its draws."""

    def __getitem__(self, key):
        rows, _ = key
        return super().__getitem__(int(rows[0]))


def test_workers_for_validation_outlive_a_pass_and_those_for_testing_do_not():
    views = [Keyed() for _ in range(3)]
    sampler = EpochSampler(8, batch_size=1, seed=0)
    _, val, test = make_loaders(views, sampler, workers=1, pin_memory=False)
    workers = []
    for _ in range(2):
        next(iter(val))  # a pass that stops early, as that for the probe
        rows = [batch[0][0, 0].item() for batch in val]
        workers.append({process.pid for process in multiprocessing.active_children()})
    assert workers[0] == workers[1] and len(workers[0]) == 1
    assert rows == [batch[0][0, 0].item() for batch in test]
    assert {process.pid for process in multiprocessing.active_children()} == workers[0]


ENDS = [
    ConnectionResetError(104, "Connection reset by peer"),
    ConnectionRefusedError(111, "Connection refused"),
    BrokenPipeError(32, "Broken pipe"),
    FileNotFoundError(2, "No such file or directory"),
    EOFError(),
    pickle.UnpicklingError("pickle data was truncated"),
    multiprocessing.AuthenticationError("digest sent was rejected"),
    RuntimeError("received 0 items of ancdata"),
    RuntimeError("unable to open shared memory object </torch_7> in read-write mode"),
    RuntimeError("Too many open files. Communication with the workers is no longer possible."),
    RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: f"{type(error).__name__}: {error}"[:40])
def test_however_a_hand_over_fails_it_is_told_as_the_end_of_a_process(error, monkeypatch):
    def failing(self, timeout=5.0):
        raise error

    monkeypatch.setattr(Batches, "_try_get_data", failing)
    with pytest.raises(LoaderDied, match="process that loads images died") as told:
        next(iter(loader()))
    assert type(error).__name__ in str(told.value) and str(error) in str(told.value)
    assert "\n" not in str(told.value)


def test_a_process_that_is_dying_but_not_yet_gone_is_told(monkeypatch):
    """Its sockets are closed and the system still lists it, so that torch takes it for alive."""
    others = set(multiprocessing.active_children())
    batches = iter(loader())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    time.sleep(0.5)  # the next batches are on their way by now
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    with monkeypatch.context() as patch:
        patch.setattr(type(worker), "is_alive", lambda self: True)
        with pytest.raises(LoaderDied, match="Error: "):
            next(batches)
    worker.join()


def fill_shared_memory(row):
    """A limit on the size of files stands for a full /dev/shm, as small ones of containers are."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def fail(row):
    raise OSError(f"image file {row} is truncated")


def test_what_a_data_set_raises_in_a_worker_is_no_end_of_the_worker():
    with pytest.raises(OSError, match="image file 0 is truncated") as told:
        next(iter(loader(fail)))
    assert not isinstance(told.value, LoaderDied)
    traceback.clear_frames(told.tb)  # ends the worker; a collection of garbage waits 10 s for it


def test_workers_that_died_do_not_interrupt_what_the_program_does_next():
    """As a child of another kind ends: torch would raise for each dead worker then."""
    others = set(multiprocessing.active_children())
    passes = [iter(loader(workers=2)) for _ in range(2)]
    for batches in passes:
        next(batches)
    for worker in set(multiprocessing.active_children()) - others:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    for _ in range(5):
        subprocess.run([sys.executable, "-c", ""], check=True)
    for batches in passes:
        with pytest.raises(LoaderDied, match="process that loads images died"):
            list(batches)


def leave_while_workers_wait(act):
    """End as the program does, while the traceback still holds a loader with two workers."""
    try:
        next(iter(loader(act, workers=2)))
    except Exception as error:
        exit_with_one_line(error)


def leave_in_each_way():
    """Leave in a fork of this program for each act; the program ends when all have ended."""
    for act in (fail, fill_shared_memory):
        if not os.fork():
            leave_while_workers_wait(act)
    for _ in range(2):
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 1


def test_a_program_that_ends_in_the_middle_of_a_pass_does_not_wait_for_its_workers():
    done = subprocess.run(
        [sys.executable, "-c", "import test_loader; test_loader.leave_in_each_way()"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for says in ("image file 0 is truncated", "images died .*no room in shared"):
        assert re.search(f"switchlora: .*{says}", done.stderr), done.stderr
