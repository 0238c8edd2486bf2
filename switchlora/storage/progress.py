"""How far a run is: a bar on a terminal, a line every half minute in a file."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from switchlora.process import printable, talking

SECONDS = 30.0
"""between two lines where there is no terminal"""


class Progress:
    """Shows the updates done out of ``total``; shows nothing unless ``enabled``.

    On a terminal it is one bar. In a log file, as on CI or under Slurm, a bar would leave
    thousands of carriage returns. There it is a line every ``SECONDS``.

    What cannot be written is lost, and nothing is raised: training goes on in its files.
    """

    def __init__(self, total: int, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.total = total
        stream = stream or sys.stderr
        on_terminal = stream is not None and _is_terminal(stream)
        self._bar: tqdm | None = None
        if enabled and on_terminal:
            with talking():
                self._bar = tqdm(total=total, unit="update", dynamic_ncols=True, file=stream)
        self._as_lines = enabled and not on_terminal
        self._first: tuple[int, float] | None = None
        """updates done and time at the first call of ``show``"""
        self._told_at = 0.0

    def show(self, num_updates: int, **postfix: str) -> None:
        """Show that ``num_updates`` are done, with short values such as the loss."""
        now = time.monotonic()
        if self._first is None:
            self._first = (num_updates, now)
            self._told_at = now
            if self._bar is not None:
                self._bar.initial = self._bar.n = num_updates  # what was done before has no speed
        if self._bar is not None:
            with talking():
                self._bar.set_postfix(postfix, refresh=False)
                self._bar.update(num_updates - self._bar.n)
        if self._as_lines and now - self._told_at >= SECONDS:
            self._told_at = now
            self.write(self._line(num_updates, now, postfix))

    def write(self, text: str) -> None:
        """Print a line on standard output, above the bar."""
        stream = sys.stdout
        if stream is not None:
            with talking():
                tqdm.write(printable(text, stream), file=stream)

    def close(self) -> None:
        """Leave the bar as it is; later lines are printed below it."""
        if self._bar is not None:
            with talking():
                self._bar.close()

    def _line(self, num_updates: int, now: float, postfix: dict[str, str]) -> str:
        assert self._first is not None
        before, start = self._first
        speed = (num_updates - before) / (now - start)
        left = (self.total - num_updates) / speed if speed > 0 else 0.0
        parts = [f"update {num_updates:>6} of {self.total}"]
        for name, value in postfix.items():
            parts.append(f"{name} {value}")
        parts.append(f"{speed:.2f} updates/s")
        parts.append(f"{tqdm.format_interval(left)} left")
        return " | ".join(parts)


def _is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal; a closed one is none."""
    with talking():
        return stream.isatty()
    return False
