"""What a user reads when something is wrong: one line, with the nearest right name."""

from collections.abc import Iterable
from difflib import get_close_matches


class NothingMeasured(ValueError):
    """A policy needs measurements or updates that the full phase has not made yet."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; what was computed so far is kept and the message says why."""


class SwitchFailed(RuntimeError):
    """The switch was undone: model and optimizer are as they were before it."""


def near(name: str, candidates: Iterable[str]) -> str:
    """A hint with up to five of ``candidates`` that resemble ``name``; all of a short list."""
    names = sorted(set(candidates))
    close = names if len(names) <= 5 else get_close_matches(name, names, n=5, cutoff=0.4)
    return f"near names: {', '.join(close)}" if close else "no near name"
