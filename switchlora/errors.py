"""Errors that a user reads as one line, and checks that name the right values."""

import re
import sys
from collections.abc import Sequence
from typing import Any

ODD = (ArithmeticError, AttributeError, LookupError, TypeError)
"""what code raises that reads something else than a run wrote"""


class NothingMeasured(ValueError):
    """A policy needs measurements or updates that the full phase has not made yet."""


class TrainingStopped(RuntimeError):
    """Training cannot go on. Results so far are kept; the message says why it stopped."""


class SwitchFailed(RuntimeError):
    """The switch was undone: model and optimizer are as they were before it."""


class CheckpointUnusable(ValueError):
    """A checkpoint is damaged, of another version or of another model; the message says which."""


class JobFailed(RuntimeError):
    """A job of a multirun failed; the message says which job and why."""


class JobInterrupted(JobFailed):
    """A job of a multirun was ended by a signal; it can be resumed."""


class LoaderDied(RuntimeError):
    """A process that loads images has ended."""


class DataUnusable(ValueError):
    """An image or a label cannot be used; the message says which one, and why."""


class UnreadableImage(DataUnusable):
    """An image cannot be decoded, or its pixels cannot be used; the run may go on without it."""


class OtherRankFailed(RuntimeError):
    """Another process of the run raised an error, whose own message says why."""


class RankLost(RuntimeError):
    """Another process of the run has ended."""


class RanksDisagree(RuntimeError):
    """Tensors that all processes must share differ between them."""


class Interrupted(BaseException):
    """A signal asked the run to stop; its progress is saved.

    It is a BaseException, so ``except Exception`` does not catch it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number; true and false are none."""
    largest = sys.float_info.max
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and -largest <= value <= largest


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is '{value}': choose one of {', '.join(choices)}")


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless ``low`` <= ``value`` <= ``high``."""
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
        raise ValueError(f"{name} is {value:g}: give {bounds}")


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless 0 < ``value`` <= 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value:g}: give a share above 0, at most 1")


def check_patterns(name: str, patterns: Sequence[str]) -> None:
    """Raise ValueError unless ``patterns`` is a list of regular expressions."""
    if isinstance(patterns, str):
        raise ValueError(f"{name} is '{patterns}': give a list, [{patterns}]")
    if not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns):
        raise ValueError(f"{name} is {patterns!r}: give a list of regular expressions")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: '{pattern}' is no regular expression: {error}") from error
