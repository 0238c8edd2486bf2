"""Progress: a bar on a terminal, a line every half minute where there is none."""

import io
import os
import pty
import termios
from contextlib import suppress

import pytest

from switchlora.storage import progress
from switchlora.storage.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(clock, capsys, enabled=True, first=1):
    """What 300 updates of half a second leave in a file."""
    stream = io.StringIO()
    shows = Progress(400, enabled, stream)
    for number in range(first, 301):
        shows.show(number, phase="full", loss="1.234")
        clock[0] += 0.5
    shows.close()
    return stream.getvalue(), capsys.readouterr().out.splitlines()


def test_a_file_gets_a_line_every_half_minute_and_no_bar(clock, capsys):
    bar, lines = shown(clock, capsys)
    assert bar == "" and len(lines) == 4
    assert lines[0] == (
        "update     61 of 400 | phase full | loss 1.234 | 2.00 updates/s | 02:49 left"
    )
    assert not any("\r" in line for line in lines)


def test_a_run_that_goes_on_is_as_fast_as_what_it_does_itself(clock, capsys):
    _, lines = shown(clock, capsys, first=200)
    assert "2.00 updates/s" in lines[0]


def test_nothing_is_shown_where_none_is_wanted(clock, capsys):
    assert shown(clock, capsys, enabled=False) == ("", [])


def everything(terminal):
    """What was written to a terminal whose other end is closed; one read may return a part."""
    parts = []
    with suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as stream:  # EIO at the end
        while part := stream.read(100_000):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_terminal_gets_one_bar_and_no_lines(clock, capsys):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with os.fdopen(theirs, "w") as terminal:
        shows = Progress(400, True, terminal)
        for number in range(1, 101):
            shows.show(number, loss="1.234")
            clock[0] += 1.0
        shows.close()
    bar = everything(ours)
    assert "100/400" in bar and "loss=1.234" in bar and "\r" in bar
    assert "left" not in capsys.readouterr().out
