"""Save a run, leave when a signal asks for it, and tell the user how to go on."""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig

from switchlora.errors import (
    Interrupted,
    LoaderDied,
    RankLost,
    RanksDisagree,
    TrainingStopped,
    UnreadableImage,
)
from switchlora.process import distributed
from switchlora.run.agreement import agree_on_weights
from switchlora.run.run import Run
from switchlora.run.snapshot import state_of
from switchlora.storage import checkpoint, retention
from switchlora.sweep import is_job, quoted, words_for_yamls


def save(run: Run) -> None:
    """Write a checkpoint of the run as it is, and remove old checkpoints beyond the limit.

    While a GPU trains, a thread writes: ``wait_until_saved`` waits for it.
    With ``checkpoint.keep=0`` nothing is written. RanksDisagree, and nothing is written either,
    when ranks hold different weights: every checkpoint is one of ranks that agree.
    """
    if run.recipe.before_ddp is None:  # such a hook may let ranks differ on purpose
        agree_on_weights(run.model, run.state.num_updates)
    if not run.saves.keep:
        return
    state, folder = run.state, run.log.folder
    with run.stopwatch.paused():
        wait_until_saved(run)
        prune = partial(retention.prune, folder, run.saves.keep, state.best_update)
        writer = None if run.device.type == "cpu" else run.writer
        content = state_of(run)
        checkpoint.write(folder, state.num_updates, content, run.learner, writer, then=prune)
        run.saves.done(state.num_updates)


def wait_until_saved(run: Run) -> None:
    """Wait for the checkpoint that a thread writes, if any; OSError if it cannot be written."""
    distributed.from_primary(run.writer.wait)


def save_elsewhere(run: Run, folder: Path, place: int) -> None:
    """Write a checkpoint into another ``folder``, such as a trunk's.

    ``place`` is the length in bytes of that folder's log up to this update.
    """
    state = {**state_of(run), "log": {"bytes": place, "wandb_id": None}}
    checkpoint.write(folder, run.state.num_updates, state, run.learner)


def save_or_leave(run: Run, settle: Callable[[Run], None]) -> None:
    """Save if a checkpoint is due, and leave if any rank has received a signal.

    It is called between two updates. Before anything is written, ``settle`` acts on the last one.
    What one rank alone knows, such as a signal, several learn of within a second.
    """
    interruption = run.interruption
    due, asked = run.question.any_rank(
        run.saves.due_by_time() or interruption.warned,
        interruption.received is not None,
    )
    if due or asked or run.saves.due_by_updates(run.state.num_updates):
        interruption.warned = False
        settle(run)
        save(run)
    if asked:
        leave(run)


def leave_if_asked(run: Run) -> None:
    """Leave if any rank has received a signal. The caller has saved the run."""
    if any(distributed.any_rank(run.interruption.received is not None)):
        leave(run)


def leave(run: Run) -> NoReturn:
    """Raise Interrupted with a message that says how to go on."""
    wait_until_saved(run)
    number = next(n for n in distributed.gather(run.interruption.received) if n is not None)
    run.interruption.received = number
    where = f"interrupted by {number.name} after update {run.state.num_updates}"
    raise Interrupted(f"{where}; {how_to_go_on(run)}", number)


def how_to_go_on(run: Run, *changed: str) -> str:
    """Return a line with the last checkpoint and the command that goes on from it.

    ``changed`` are words of the command line that the command has too.
    """
    with suppress(OSError):  # the checkpoint before it is told then
        run.writer.wait()
    found = retention.find_all(run.log.folder)
    if not found:
        return "there is no checkpoint"
    launcher = ["switchlora"]
    if distributed.world_size() > 1:
        processes = os.environ.get("LOCAL_WORLD_SIZE", str(distributed.world_size()))
        launcher = ["torchrun", "--nproc-per-node", processes, "-m", "switchlora"]
    given: list[str] = []
    if HydraConfig.initialized():
        given = [*words_for_yamls(), *HydraConfig.get().overrides.task]
    kept = [word for word in given if not word.startswith("resume=")]
    place = str(run.log.folder)
    if not re.fullmatch(r"[\w./+-]+", place):
        place = quoted(place)
    words = [*launcher, *kept, *changed, f"hydra.run.dir={place}", "resume=auto"]
    if HydraConfig.initialized() and is_job():
        words.append("hydra.mode=RUN")
    return f"the last checkpoint is {found[0]}; go on with: {shlex.join(words)}"


@contextmanager
def faults_explained(run: Run) -> Iterator[None]:
    """Replace torch's error by one that says which process died and how to go on.

    - RanksDisagree when ranks hold different weights.
    - LoaderDied when a process that loads images has ended.
    - RankLost when another rank has ended.
    - UnreadableImage when an image cannot be read.
    - TrainingStopped when a model, a criterion or data of the user's leave the program.

    Every other error passes unchanged.
    """
    try:
        yield
    except SystemExit as left:
        where = f"after update {run.state.num_updates}"
        raise TrainingStopped(
            f"code of yours called exit({left.code}) {where}; {how_to_go_on(run)}"
        ) from left
    except UnreadableImage as error:
        without = how_to_go_on(run, "data.skip_unreadable=true")
        raise UnreadableImage(f"{error}; {without}") from error
    except RuntimeError as error:
        where = f"after update {run.state.num_updates}"
        if isinstance(error, RanksDisagree):
            raise RanksDisagree(f"{error}; {how_to_go_on(run)}") from error
        if isinstance(error, LoaderDied):
            raise LoaderDied(f"{error}; this was {where}; {how_to_go_on(run)}") from error
        if (lost := distributed.lost_rank(error)) is not None:
            raise RankLost(f"{lost} {where}; {how_to_go_on(run)}") from error
        raise
