"""Talk without risk: whatever happens to a terminal or a log, it ends no training."""

import io
import os
import sys
from contextlib import suppress
from typing import Any

ESCAPED = "backslashreplace"
"""how a character is written that the encoding does not have"""


class PatientFile(io.FileIO):
    """A file for what is said: a write that fails loses its text and raises nothing.

    A reader may close the pipe, a terminal may go, a disk may be full.
    """

    def write(self, text: Any) -> int:
        """Write ``text``; return its length also where it is lost."""
        with suppress(OSError):
            written = super().write(text)
            if written is not None:
                return written
        return len(text)


def talk_without_risk() -> None:
    """Let no write to standard output or standard error raise, in all of this process."""
    occupy_closed_descriptors()
    sys.stdout = patient(sys.stdout)
    sys.stderr = patient(sys.stderr)


def patient(stream: Any) -> Any:
    """Return a text stream to the same file that raises nothing.

    A stream that is not Python's own, such as a test's, is returned as it is.
    """
    if stream is None:
        return open(os.devnull, "w")  # noqa: SIM115
    if type(stream) is not io.TextIOWrapper:
        return stream
    buffered = hasattr(stream.buffer, "raw")  # not so under python -u
    raw = stream.buffer.raw if buffered else stream.buffer
    if type(raw) is not io.FileIO:
        return stream
    with suppress(OSError):
        stream.flush()
    file = PatientFile(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(file) if buffered else file,  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors=ESCAPED,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def occupy_closed_descriptors() -> None:
    """Open the null device in place of a standard stream that the caller has closed.

    Its number would go to the next file that is opened, and what is said would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one


def say(text: str) -> None:
    """Print a line on standard output, if that is possible."""
    with talking():
        print(printable(text, sys.stdout), flush=True)


def talking() -> suppress:
    """Return a context in which a failure to write is no failure: a broken or a closed stream."""
    return suppress(OSError, ValueError)


def printable(text: str, stream: Any) -> str:
    """Return ``text`` with escapes for what the encoding of ``stream`` does not have."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, ESCAPED).decode(encoding)
