"""Kill a run at many moments, resume it each time, and compare it with an uninterrupted one.

``python scripts/killtest.py`` works in rounds. In a round the same command starts one run again
and again with ``resume=auto``. SIGKILL ends the run's whole session at random moments that depend
on ``--seed``. The last start runs to its end. The files it leaves must then equal those of an
uninterrupted run bit for bit, except for times. Linux only.
"""

import argparse
import atexit
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from switchlora.analysis.compare import differences, first_difference
from switchlora.storage import FOLDER, METRICS, environment, find_all, read_events

FULL = "full phase"
ADAPTER = "adapter phase"
WRITE = "inside a checkpoint write"
SWITCH = "at the switch"
EPOCH = "epoch end"
START = "start-up"
KINDS = (FULL, ADAPTER, WRITE, SWITCH, EPOCH, START)
DELAYS = {FULL: 0.1, ADAPTER: 0.1, WRITE: 0.06, SWITCH: 0.3, EPOCH: 0.4}
"""the longest delay of each kind, in seconds"""
RUN = (
    "data=digits",
    "model=digits",
    "log=quiet",
    "log.figures=false",
    "log.every=1",
    "monitor.window=10",
    "full.scheduler.warmup_t=10",
    "full.accumulation=2",
    "ema=0.9",
    "switch/criterion=at_epoch",
    "data.mixup_alpha=0.2",
    "+model.drop_path_rate=0.2",
    "checkpoint.every_updates=7",
    "system.threads=1",
    "resume=auto",
)
LONG = ("epochs=4", "switch.criterion.epoch=2.3", "log.wandb.mode=offline")
PIPELINES = {
    "workers": (
        "system.workers=2",
        "data.train_transform={scale: [0.5, 1.0], interpolation: bicubic}",
        "data.eval_transform={interpolation: bicubic, crop_pct: 1.0}",
    ),
    "memory": ("data.crop_padding=1", "data.hflip=0.5"),
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
PRELOADED = [
    "switchlora.cli",
    "switchlora.train",
    "switchlora.sweep",
    "wandb",
    "sklearn.datasets",
    "sklearn.model_selection",
]
PATIENCE = 300  # seconds that one start may take


class Trouble(Exception):
    """A start of a run failed or took too long."""


@dataclass(frozen=True)
class Child:
    """A started process of a run. ``exit_code`` returns None while it runs."""

    pid: int
    exit_code: Callable[[], int | None]


Starter = Callable[[Sequence[str], Path], Child]


@dataclass(frozen=True)
class Marks:
    """The updates at which an uninterrupted run switches, ends its epochs, and ends."""

    switch: int
    epochs: list[int]
    last: int
    start_seconds: float
    """seconds from the start of the process to the first update"""


@dataclass(frozen=True)
class Moment:
    """When to kill: ``delay`` seconds after ``update`` is reached.

    ``kind`` says what counts as reached: see ``Watch.reached``.
    """

    kind: str
    update: int
    delay: float


@dataclass
class Kill:
    """One kill, and the state of the run's folder right after it."""

    round: int
    pipeline: str
    kind: str
    aimed_at: int
    delay: float
    phase: str
    num_updates: int
    last_event: str | None
    newest_checkpoint: str | None
    unfinished_write: dict[str, int] | None
    """bytes of each file in the folder of a checkpoint that was being written"""
    between_switch_checkpoints: bool
    """whether the checkpoint before the switch was there, and the one after it was not"""
    resumed_from: str | None = None
    recovered: bool = False


def main() -> None:
    """Kill, compare and write the result. Exit with one line on the first difference, if any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("experiments/killtest.json"))
    parser.add_argument("--folder", type=Path, help="for the runs; by default a temporary one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="killtest-"))
    folder = folder.resolve()
    if folder.is_dir() and any(folder.iterdir()):
        sys.exit(f"killtest: {folder} is not empty")
    try:
        result = killtest(folder, options.kills, options.seed)
    except Trouble as error:
        sys.exit(f"killtest: {error}")
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(result["total"])
    if result["troubles"]:
        sys.exit(f"killtest: {result['troubles'][0]} (the runs are in {folder})")
    if options.folder is None:
        shutil.rmtree(folder)


def start_program(words: Sequence[str], output: Path) -> Child:
    """Start ``python -m switchlora`` in a session of its own."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "switchlora", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | ENVIRONMENT,
        )
    return Child(process.pid, process.poll)


def start_fork(words: Sequence[str], output: Path) -> Child:
    """Start the same command in a fork of a process that has already imported it.

    That saves seconds for each start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_enter, args=(list(words), output))
    process.start()
    assert process.pid is not None
    return Child(process.pid, lambda: process.exitcode)


def _enter(words: list[str], output: Path) -> None:
    from switchlora.cli import main

    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # that of a program, not of this server
    tqdm.set_lock(threading.RLock())  # its own would be told as leaked after a kill
    with output.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["switchlora", *words]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves them out


def killtest(
    folder: Path,
    number: int,
    seed: int,
    words: Sequence[str] = LONG,
    pipelines: Mapping[str, Sequence[str]] = PIPELINES,
    start: Starter = start_program,
) -> dict[str, Any]:
    """Run rounds until there are ``number`` kills, and return the result.

    A round has at most one kill of each kind.
    """
    begin = time.perf_counter()
    kills: list[Kill] = []
    troubles: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    references: dict[str, Marks] = {}
    rounds = 0
    while len(kills) < number:
        name = list(pipelines)[rounds % len(pipelines)]
        command = (*RUN, *words, *pipelines[name])
        if name not in references:
            references[name] = reference(folder / name, command, start)
        rounds += 1
        moments = plan(next_kinds(kills, number), references[name], chance)
        killed, trouble = one_round(rounds, name, folder, command, moments, start, len(kills))
        kills += killed
        if trouble:
            troubles.append(trouble)
        if not killed:
            troubles.append(f"round-{rounds} ended before it could be killed")
            break
    return {
        **counts(kills),
        "rounds": rounds,
        "seconds": round(time.perf_counter() - begin),
        "troubles": troubles,
        "starts": start.__name__.removeprefix("start_"),
        "run": ["switchlora", *RUN, *words],
        "pipelines": {name: list(pipelines[name]) for name in references},
        "environment": environment(torch.device("cpu"), seed),
        "kills": list(map(asdict, kills)),
    }


def counts(kills: Sequence[Kill]) -> dict[str, Any]:
    """Return the line on all kills, and how many met one of the two rare situations."""
    inside_writes = [kill for kill in kills if kill.unfinished_write is not None]
    between = [kill for kill in kills if kill.between_switch_checkpoints]
    return {
        "total": total_line(kills),
        "inside_writes": len(inside_writes),
        "between_switch_checkpoints": len(between),
    }


def total_line(kills: Sequence[Kill]) -> str:
    """Return a line with the number of recovered kills and the number of kills of each kind."""
    recovered = [kill for kill in kills if kill.recovered]
    made = kinds_of(kills)
    kinds = ", ".join(f"{made[kind]} {kind}" for kind in KINDS if made[kind])
    return f"{len(recovered)} of {len(kills)} kills recovered bit-equal ({kinds})"


def next_kinds(kills: Sequence[Kill], number: int) -> list[str]:
    """Return the kinds of the next round, the rarest so far first."""
    made = kinds_of(kills)
    rarest_first = sorted(KINDS, key=made.__getitem__)
    return rarest_first[: number - len(kills)]


def kinds_of(kills: Sequence[Kill]) -> Counter[str]:
    """Return the number of kills of each kind."""
    return Counter(kill.kind for kill in kills)


def plan(kinds: Sequence[str], marks: Marks, chance: random.Random) -> list[Moment]:
    """Draw a random moment of each kind, and sort the moments by their update."""
    updates = {
        FULL: range(1, marks.switch),
        ADAPTER: range(marks.switch + 1, marks.last),
        WRITE: range(1, marks.last),
        SWITCH: [marks.switch],
        EPOCH: marks.epochs,
        START: range(marks.last),
    }
    delays = {**DELAYS, START: marks.start_seconds}
    moments = []
    for kind in kinds:
        update = chance.choice(updates[kind])
        delay = round(chance.uniform(0, delays[kind]), 4)
        moments.append(Moment(kind, update, delay))
    return sorted(moments, key=attrgetter("update"))


def reference(folder: Path, command: Sequence[str], start: Starter) -> Marks:
    """Make the uninterrupted run in ``folder``, and return its marks."""
    begin = time.perf_counter()
    output = folder.with_name(f"{folder.name}.log")
    watch = Watch(folder, output)
    child = start([*command, f"hydra.run.dir={folder}"], output)
    wait(child, output, lambda: watch.num_updates() > 0)
    start_seconds = time.perf_counter() - begin
    wait(child, output)
    updates: dict[str, list[int]] = {}
    for event in events_of(folder):
        updates.setdefault(event["event"], []).append(event["num_updates"])
    print(f"{folder.name}: uninterrupted in {time.perf_counter() - begin:.0f} s", flush=True)
    return Marks(
        switch=updates["switch"][0],
        epochs=updates["eval"],
        last=updates["test"][0],
        start_seconds=start_seconds,
    )


def one_round(
    number: int,
    pipeline: str,
    folder: Path,
    command: Sequence[str],
    moments: Sequence[Moment],
    start: Starter,
    before: int,
) -> tuple[list[Kill], str | None]:
    """Kill one run at all ``moments``, let it end, and compare it with the uninterrupted one.

    Return the kills, and a line about what went wrong (None if nothing did). ``before`` is the
    number of kills in earlier rounds.
    """
    place = folder / f"round-{number}"
    command = [*command, f"hydra.run.dir={place}"]
    kills: list[Kill] = []
    try:
        for moment in (*moments, None):
            output = folder / f"{place.name}-start-{len(kills) + 1}.log"
            watch = Watch(place, output)
            child = start(command, output)
            until = partial(watch.reached, moment) if moment else None
            reached = wait(child, output, until)
            killed = reached and moment is not None and stop(child, output, moment.delay)
            note_resume(kills, watch)
            if not killed or moment is None:
                break
            kills.append(watch.found(number, pipeline, moment))
            print(f"{before + len(kills):3} {kill_line(kills[-1])}", flush=True)
        trouble = first_difference(differences(folder / pipeline, place))
    except Trouble as error:
        trouble = str(error)
    for each in kills:
        each.recovered = trouble is None
    resumed = ", ".join(str(each.resumed_from) for each in kills)
    print(f"{place.name}: {trouble or 'bit-equal'}; resumed from {resumed}", flush=True)
    return kills, f"{place.name}: {trouble}" if trouble else None


def wait(child: Child, output: Path, until: Callable[[], bool] | None = None) -> bool:
    """Wait until the condition holds or the child ends.

    - Return True when the condition ``until`` holds.
    - Return False when the child ends with status 0.
    - Raise Trouble when it ends with another status, or takes longer than ``PATIENCE`` seconds.
    """
    deadline = time.monotonic() + PATIENCE
    try:
        while (code := child.exit_code()) is None:
            if until is not None and until():
                return True
            if time.monotonic() > deadline:
                raise Trouble(f"{output.name}: not done in {PATIENCE} s")
            time.sleep(0.0005)
    except BaseException:  # also a KeyboardInterrupt: nothing goes on behind our back
        kill(child)
        raise
    if code != 0:
        lines = said_in(output).strip().splitlines()
        raise Trouble(f"{output.name}: ended with status {code}: {lines[-1] if lines else ''}")
    return False


def said_in(output: Path) -> str:
    """Return what a child has written so far."""
    return output.read_text() if output.exists() else ""


def stop(child: Child, output: Path, delay: float) -> bool:
    """Kill the child after ``delay`` seconds. Return False when it had already ended well."""
    time.sleep(delay)
    return kill(child) == -signal.SIGKILL or wait(child, output)


def kill(child: Child) -> int:
    """Kill the child's whole session with SIGKILL, wait until it is gone, return the exit code."""
    for call in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            call(child.pid, signal.SIGKILL)
    while (code := child.exit_code()) is None:
        time.sleep(0.001)
    while left := session_of(child.pid):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    return code


def session_of(leader: int) -> list[int]:
    """Return the process ids of a session's living processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            _, _, after_name = path.read_text().rpartition(")")
            state, _, _, session, *_ = after_name.split()
            if int(session) == leader and state not in "ZX":
                found.append(int(path.parent.name))
    return found


class Watch:
    """Observes from outside what a child in ``folder`` has done since this object was made."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder = folder
        self.output = output
        self._size = self._metrics_size()
        self._old_writes = set(self._writes())
        self._old_checkpoints = set(find_all(folder))
        self._begun = False
        self._last_size = -1
        self._last_update = 0

    def reached(self, moment: Moment) -> bool:
        """Return whether the moment has come, not counting its delay.

        - start-up: always.
        - inside a checkpoint write: the child writes a checkpoint of that update or a later one.
        - at the switch: the child has made a new checkpoint of that update.
        - all others: the child has made so many updates.
        """
        if moment.kind == START:
            return True
        if moment.kind == WRITE:
            return any(update_of(name) >= moment.update for name in self._new_writes())
        if moment.kind == SWITCH:
            return bool(self._new_checkpoints_at(moment.update))
        return self.num_updates() >= moment.update

    def resumed_from(self) -> str | None:
        """Return the checkpoint from which the child went on, as its output says.

        Return 'the start' when there was no checkpoint, 'the end' when the child before was killed
        after its last file, and None when it is not known yet.
        """
        said = said_in(self.output)
        match = re.search(r"resumed from \S*/(\S+):", said)
        if match:
            return match[1]
        if "holds a finished run" in said:
            return "the end"
        return "the start" if not self._old_checkpoints and self._has_begun() else None

    def num_updates(self) -> int:
        """Return the number of updates in metrics.jsonl.

        It is 0 until the child has cut off what an earlier child left there.
        """
        if not self._has_begun():
            return 0
        size = self._metrics_size()
        if size != self._last_size:
            events = events_of(self.folder)
            self._last_size = size
            self._last_update = events[-1]["num_updates"] if events else 0
        return self._last_update

    def found(self, number: int, pipeline: str, moment: Moment) -> Kill:
        """Return the record of a kill, from what the folder holds after it."""
        events = events_of(self.folder)
        last = events[-1] if events else {"num_updates": 0, "event": None}
        checkpoints = find_all(self.folder)
        between = moment.kind == SWITCH and len(self._new_checkpoints_at(moment.update)) == 1
        return Kill(
            round=number,
            pipeline=pipeline,
            kind=moment.kind,
            aimed_at=moment.update,
            delay=moment.delay,
            phase=phase_after(events),
            num_updates=last["num_updates"],
            last_event=last["event"],
            newest_checkpoint=checkpoints[0].name if checkpoints else None,
            unfinished_write=self._unfinished_write(),
            between_switch_checkpoints=between,
        )

    def _unfinished_write(self) -> dict[str, int] | None:
        """Return the bytes of each file of a checkpoint that the child was writing, if it was."""
        new = self._new_writes()
        if not new:
            return None
        files = {}
        for name in new:
            for path in (self.folder / FOLDER / name).iterdir():
                files[path.name] = path.stat().st_size
        return files

    def _has_begun(self) -> bool:
        if not self._begun:
            size = self._metrics_size()
            if self._old_checkpoints:
                said = self.output.read_bytes() if self.output.exists() else b""
                self._begun = b"resumed from" in said
            else:
                self._begun = size < self._size or (size > 0 and not self._size)
        return self._begun

    def _metrics_size(self) -> int:
        path = self.folder / METRICS
        return path.stat().st_size if path.exists() else 0

    def _writes(self) -> Iterator[tuple[str, int]]:
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.folder / FOLDER):
                if entry.name.startswith(".writing-"):
                    yield entry.name, entry.stat().st_mtime_ns

    def _new_writes(self) -> set[str]:
        """Return the folders of checkpoints that the child was seen to write."""
        new = set(self._writes()) - self._old_writes
        return {name for name, _ in new}

    def _new_checkpoints_at(self, update: int) -> list[Path]:
        new = set(find_all(self.folder)) - self._old_checkpoints
        return [path for path in new if path.name.startswith(f"update-{update:08d}")]


def update_of(name: str) -> int:
    """Return the update of a checkpoint that is being written, from its folder's name."""
    return int(name.split("-")[1])


def phase_after(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the phase in which a run is after ``events``."""
    phase = "full"
    for event in events:
        if event["event"] == "switch":
            return "adapter"
        phase = event.get("train/phase", phase)
    return phase


def kill_line(kill: Kill) -> str:
    """Return one line about a kill."""
    where = f"update {kill.num_updates:3}, {kill.phase} phase, after '{kill.last_event}'"
    inside = "; inside a write" if kill.unfinished_write is not None else ""
    between = "; between the switch's checkpoints" if kill.between_switch_checkpoints else ""
    return f"round {kill.round} {kill.pipeline:7}  {kill.kind:25} {where}{inside}{between}"


def note_resume(kills: Sequence[Kill], watch: Watch) -> None:
    """Record where this start went on from, in the kills that have no such record yet."""
    for kill in kills:
        kill.resumed_from = kill.resumed_from or watch.resumed_from()


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run so far, none before it has begun its log."""
    return list(read_events(folder)) if (folder / METRICS).exists() else []


if __name__ == "__main__":
    main()
