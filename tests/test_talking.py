"""Talking is less important than training: no stream, terminal or pipe ends a run."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from runs import DIGITS
from starts import Started, program
from switchlora import commands
from switchlora.process import Interruption, say
from switchlora.process.signals import SIGNALS
from switchlora.storage.progress import Progress
from switchlora.sweep.jobs import SWEEP, follow_sweep

FEW = (*DIGITS, "epochs=1", "max_updates=3", "monitor.window=1", "switch/criterion=never")
FEW += ("model.depth=1", "model.embed_dim=16", "model.num_heads=1", "log.progress=true")


class Failing:
    """A stream that fails in the way of its error."""

    encoding = "ascii"

    def __init__(self, error):
        self.error = error

    def isatty(self):
        return True

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


ERRORS = [BrokenPipeError(), OSError(5, "EIO"), OSError(28, "no space"), ValueError("closed file")]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_no_failing_stream_reaches_the_run(monkeypatch, error):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Failing(error))
    say("a line")
    shows = Progress(10)
    for number in range(3):
        shows.show(number, loss="1.0")
        shows.write("Größe")
    shows.close()


def test_no_stream_at_all_is_as_good(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    say("a line")
    shows = Progress(10)
    shows.show(1)
    shows.write("a line")
    shows.close()


def on_stream(descriptor, encoding, *words):
    """The program with standard output and standard error on another stream."""
    for number in (1, 2):
        if descriptor is None:
            os.close(number)
        else:
            os.dup2(descriptor, number)
    if descriptor is None:
        sys.stdout = sys.stderr = None  # as Python starts then
    else:
        for name, number in (("stdout", 1), ("stderr", 2)):
            stream = open(number, "w", encoding=encoding, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    program(*words)


def in_file(path, encoding, *words):
    """The program where what is said goes into a file, with the encoding of a poor terminal."""
    on_stream(os.open(path, os.O_WRONLY | os.O_CREAT), encoding, *words)


def nowhere(kind, *words):
    """The program where what is said goes nowhere: a closed pipe, a full disk, a lost terminal."""
    if kind == "pipe":
        there, here = os.pipe()
        os.close(there)
    elif kind == "terminal":
        there, here = pty.openpty()
        os.close(there)
    elif kind == "disk":
        here = os.open("/dev/full", os.O_WRONLY)
    else:
        here = None
    on_stream(here, "utf-8", *words)


@pytest.mark.parametrize("kind", ["pipe", "terminal", "disk", "closed"])
def test_a_run_that_nobody_hears_ends_as_any_other(tmp_path, kind):
    words = (*FEW, f"hydra.run.dir={tmp_path / 'run'}")
    with Started(tmp_path / "said", nowhere, kind, *words) as started:
        assert started.finish().returncode == 0
    assert '"status": "finished"' in (tmp_path / "run/summary.json").read_text()
    first = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[0]
    assert first.startswith("{"), "what is said went into the log"


def command_without_reader(*words):
    """``switchlora-runs *words | true``."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["switchlora-runs", *words]
    commands.runs()


@pytest.mark.parametrize("words", [("data", "data=digits"), ("replay", "--help")])
def test_a_command_whose_reader_has_left_ends_well(tmp_path, words):
    with Started(tmp_path / "said", command_without_reader, *words) as started:
        done = started.finish()
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_the_terminal_cannot_print_ends_no_run(tmp_path):
    folder = tmp_path / "Größe-日本"
    terminal = tmp_path / "terminal"
    words = (*FEW, f"hydra.run.dir='{folder}'")
    with Started(tmp_path / "said", in_file, str(terminal), "ascii", *words) as started:
        assert started.finish().returncode == 0
    assert '"status": "finished"' in (folder / "summary.json").read_text()
    assert "finished; everything is in" in terminal.read_text()


def test_a_failing_write_loses_its_text_and_the_next_one_is_written(tmp_path):
    code = (
        "import resource, sys, switchlora.process as p; p.talk_without_risk();"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4)); print('x' * 9); print('y' * 9);"
        "sys.stdout.flush(); sys.stderr.write('good')"
    )
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"good")


@pytest.mark.parametrize("number", sorted(set(SIGNALS) - {signal.SIGINT}))
def test_a_signal_that_would_kill_is_noted(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.received is number
            interruption.hand_over()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def as_launcher(note):
    """A multirun's process whose launcher waits for a job in a process of its own."""
    os.environ[SWEEP] = str(os.getpid())
    if os.fork() == 0:
        follow_sweep()
        with open(note, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(60)
    time.sleep(60)


def test_a_launchers_process_ends_with_the_process_of_the_multirun(tmp_path):
    note = tmp_path / "pid"
    with Started(tmp_path / "said", as_launcher, str(note)) as started:
        while not note.exists() or not note.read_text():
            time.sleep(0.05)
        os.kill(started.process.pid, signal.SIGKILL)
        worker, end = int(note.read_text()), time.monotonic() + 30
        while running(worker):
            assert time.monotonic() < end
            time.sleep(0.05)


def running(process):
    """Whether a process has not ended; one that nobody waited for has."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
