"""End the program early: one line for a user's mistake or a fault, a traceback for a bug."""

import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from yaml import YAMLError

from switchlora.errors import (
    DataUnusable,
    JobFailed,
    LoaderDied,
    OtherRankFailed,
    RankLost,
    RanksDisagree,
    SwitchFailed,
    TrainingStopped,
)
from switchlora.names import near
from switchlora.process import distributed
from switchlora.process.talking import ESCAPED
from switchlora.process.words import explained, spelled_out

UNKNOWN_TARGET = re.compile(r"Error locating target '(switchlora\.[\w.]+)'")
UNLOCATED = re.compile(r"Error loading '([\w.]+)'")
BUILT_FROM = re.compile(r"full_key: (\S+)")
SHOW_TRACEBACK = "SWITCHLORA_TRACEBACK"
FAILURE = "SWITCHLORA_FAILURE"
"""names the file to which a job of a multirun writes its one line"""
USER_ERRORS = (
    ValueError,
    TrainingStopped,
    SwitchFailed,
    JobFailed,
    LoaderDied,
    OtherRankFailed,
    RankLost,
    RanksDisagree,
    OSError,
    YAMLError,
    torch.OutOfMemoryError,
    HydraException,
    OmegaConfBaseException,
)


def exit_with_one_line(error: Exception) -> NoReturn:
    """Exit with one line for a user's mistake or a fault; raise any other error again.

    A mistake that every rank meets is printed by the primary rank alone. A job of a multirun also
    writes the line to the file that ``FAILURE`` names. With ``SHOW_TRACEBACK`` in the environment
    every error is raised again.
    """
    if isinstance(error, USER_ERRORS) or from_launcher(error):
        line: str | None = one_line(error)
    else:
        line = distributed.lost_rank(error)
    if FAILURE in os.environ and distributed.is_primary():
        with suppress(OSError):  # a full disk may be the very error
            text = line or f"{type(error).__name__}: {error}"
            Path(os.environ[FAILURE]).write_text(text, encoding="utf-8", errors=ESCAPED)
    if line is None or SHOW_TRACEBACK in os.environ:
        raise error
    if distributed.is_primary():
        sys.exit(f"switchlora: {line}")
    name = f"switchlora, rank {distributed.rank()}"
    sys.exit(1 if told_by_another_rank(error) else f"{name}: {line}")


def told_by_another_rank(error: Exception) -> bool:
    """Return whether the primary rank meets the same mistake, or the rank that failed tells it.

    An image that cannot be used in the middle of a run is met by one rank alone.
    """
    if isinstance(error, InstantiationException):
        return isinstance(error.__cause__, ValueError | OtherRankFailed)
    known = isinstance(error, ValueError | OtherRankFailed | RanksDisagree)
    return known and not isinstance(error, DataUnusable)


def from_launcher(error: Exception) -> bool:
    """Return whether submitit raised it: no Slurm here, an unknown partition, a job that died."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "submitit" in Path(frames[-1].filename).parts


def one_line(error: BaseException) -> str:
    """Return the message that matters, of an error or one of its causes, on one line."""
    cause = error.__cause__
    message = str(error)
    if isinstance(error, InstantiationException) and isinstance(cause, USER_ERRORS):
        built = BUILT_FROM.search(message)
        return spelled_out(one_line(cause), built[1]) if built else one_line(cause)
    if isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.filename}: {error.strerror}"
    of_hydra = isinstance(error, HydraException) and cause is not None
    line = explained(f"{message}\n{cause}" if of_hydra else message)
    if line is not None:
        return line
    if unknown := UNKNOWN_TARGET.search(message):
        message = (
            f"this version of switchlora has no {unknown[1]}: the configuration is another's; "
            "make the run anew"
        )
    elif (why := why_unlocated(error)) is not None:
        built = BUILT_FROM.search(message)
        message = f"{built[1]}: {why}" if built else why
    if isinstance(error, InterpolationKeyError):
        message = (
            f"{error.full_key}: {message.splitlines()[0]}; choose groups that go together, "
            "such as model=bytes with data=bytes, and an image model with images"
        )
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None:
        message += f"; {near(str(cause.key), map(str, cause.parent_node))}"
    return " ".join(message.split("Config search path")[0].split())


def why_unlocated(error: BaseException) -> str | None:
    """Return why a class or function that a configuration names is not there; None if it is.

    Hydra hides the reason behind errors of its own.
    """
    located = error.__cause__
    target = UNLOCATED.match(str(located)) if isinstance(located, ImportError) else None
    if located is None or target is None:
        return None
    name, reason = target[1], located.__cause__
    missing = reason.name if isinstance(reason, ModuleNotFoundError) else None
    if missing == name.partition(".")[0]:
        return (
            f"no module {missing} was found for {name}: set PYTHONPATH to the folder that has "
            f"{missing}.py, such as PYTHONPATH=."
        )
    if missing is not None and f"{name}.".startswith(f"{missing}."):
        place, _, lacking = missing.rpartition(".")
        names = [each for each in vars(sys.modules[place]) if not each.startswith("_")]
        return f"{place} has no {lacking}; {near(lacking, names)}"
    if isinstance(reason, AttributeError):
        return f"there is no {name}: {reason}"
    return f"{name} cannot be imported: {type(reason).__name__}: {reason}"
