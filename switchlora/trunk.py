"""Full phases that runs share: those of one configuration but for when it switches, and to what.

A trunk is a folder named after everything that shapes a full phase. It looks like a run's:
``config.yaml``, ``metrics.jsonl`` with every measurement, and checkpoints, each made just after a
measurement and thinned to a budget. One run at a time extends it and holds its lock. Any other
replays its own criterion over the history; where that fires, it goes on as itself from the
nearest checkpoint before, bit for bit as if it had trained from the start alone.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from omegaconf import OmegaConf
from torch import nn

from switchlora import checkpoint, distributed
from switchlora.criteria import Verdict
from switchlora.errors import CheckpointUnusable, Interrupted, check_range, check_share
from switchlora.identity import Config, identity, shaping
from switchlora.interrupt import Interruption
from switchlora.monitor import Measurement
from switchlora.provenance import code_digest, machine
from switchlora.records import measurement_of
from switchlora.report import measurement_metrics
from switchlora.resume import Found
from switchlora.runlog import CONFIG, METRICS, as_record, locked, synced
from switchlora.switch import SwitchPolicy

KEY = "trunk.json"
BORROWED = ".from-trunk"
GIGABYTE = 10**9
POLL_SECONDS = 0.5
MEASURED_BY = ("switch.targets", "switch.split_qkv")
UNDECIDED = Verdict(False, {}, "")


def trunk_key(config: Config, device: torch.device, data: str) -> dict[str, Any]:
    """Everything that shapes the bits of a full phase, as plain values by dotted key.

    ``data`` is a digest of the data set. Code and versions are in it, the switch policy is not.
    """
    shared = {key: value for key, value in shaping(config).items() if not _comes_later(key)}
    return {
        **shared,
        "log.every": config["log"]["every"],
        "system.parallel": config["system"]["parallel"],
        "processes": distributed.world_size(),
        "data": data,
        "code": code_digest(shared),
        **{f"machine.{key}": value for key, value in machine(device).items()},
    }


def first_firing(policy: SwitchPolicy, history: Sequence[Measurement]) -> int | None:
    """Updates made when ``policy`` fires first on a history; None where it never does."""
    for length in range(len(history) + 1):
        if policy.decide(history[:length]).fires:
            return history[length - 1].num_updates if length else 0
    return None


class Trunk:
    """One shared full phase on the disk, and this run's part in it.

    ``gigabytes`` of checkpoints are kept, the newest always; writing them takes no more than
    ``time_share`` of the time, so that not every measurement has one. With ``wait``, a run whose
    criterion has not fired yet on what is there waits while another one extends the trunk;
    otherwise, and with several processes, it computes the rest on its own. All ranks call the
    public methods.
    """

    def __init__(
        self,
        place: Path,
        key: Mapping[str, Any],
        gigabytes: float = 4.0,
        time_share: float = 0.05,
        wait: bool = True,
    ) -> None:
        check_range("trunk.gigabytes", gigabytes, 0)
        check_share("trunk.time_share", time_share)
        self._share = time_share
        self.folder = place / identity(key)
        self.extends = False
        """whether this run is the one that makes it longer"""
        self._key, self._bytes, self._wait = key, gigabytes * GIGABYTE, wait
        self._lock: TextIO | None = None
        self._written_at, self._writing = -math.inf, 0.0

    def enter(
        self,
        policy: SwitchPolicy,
        model: nn.Module,
        own: Found | None,
        run: Path,
        interruption: Interruption,
        say: Callable[[str], None] = print,
    ) -> Found | None:
        """Where the run in folder ``run`` goes on: at a checkpoint of the trunk or its own.

        Afterwards ``extends`` says whether this run makes the trunk longer. Interrupted when a
        signal comes while it waits.
        """
        choice = distributed.from_primary(
            lambda: self._choose(policy, model, own, run, interruption, say)
        )
        borrowed, updates, self.extends = choice
        if borrowed is None:
            return own
        state = checkpoint.load(borrowed)
        position = {"bytes": _size(run / METRICS), "wandb_id": None}
        seconds = state["stopwatch"]["train_seconds"]
        state["log"] = position
        state["train"]["reused"] = {
            "folder": str(self.folder),
            "reused_updates": updates,
            "reused_seconds": seconds,
        }
        line = (
            f"{updates} updates of the full phase come from {self.folder}: {seconds:.0f} s saved"
        )
        return Found(borrowed, run, [line], branches=False, state=state, foreign=True)

    def publish(self, run: Any) -> None:
        """Add the measurement that ``run`` has just made, and now and then a checkpoint."""
        if not self.extends:
            return
        position, due = distributed.from_primary(lambda: (self._append(run), self._due(run)))
        if due:
            self._save(run, position)

    def leave(self, run: Any) -> None:
        """Let another run extend the trunk from where ``run``, which switches, leaves it."""
        if self.extends:
            position, there = distributed.from_primary(
                lambda: (self._positions()[run.state.num_updates], self._is_saved(run))
            )
            if not there:
                self._save(run, position)
        self.release()

    def release(self) -> None:
        """Give back the lock, if this run holds it."""
        self.extends = False
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def history(self) -> list[Measurement]:
        """What has been measured so far."""
        return [measurement_of(e) for _, e in self._events() if e["event"] == "measure"]

    def _choose(
        self,
        policy: SwitchPolicy,
        model: nn.Module,
        own: Found | None,
        run: Path,
        interruption: Interruption,
        say: Callable[[str], None],
    ) -> tuple[Path | None, int, bool]:
        """Borrowed checkpoint, its updates, and whether this run extends the trunk."""
        fires = self._wait_for_a_decision(policy, interruption, say)
        limit = math.inf if fires is None else fires
        least = own.state["train"]["num_updates"] if own else 0
        for path in checkpoint.find_all(self.folder):
            updates = checkpoint.updates_of(path)
            if not least < updates <= limit:
                continue
            try:
                state = checkpoint.read(borrowed := _borrow(path, run))
                checkpoint.check_model(path, state, model)
            except (CheckpointUnusable, FileNotFoundError) as error:
                say(f"{path} is left alone: {error}")
                continue
            self._write_events(run, state["log"]["bytes"], policy)
            return borrowed, updates, self._lock is not None
        return None, 0, self._lock is not None

    def _wait_for_a_decision(
        self, policy: SwitchPolicy, interruption: Interruption, say: Callable[[str], None]
    ) -> int | None:
        """Updates at which ``policy`` fires on the trunk; None when this run has to train on."""
        waits = self._wait and distributed.world_size() == 1
        said = False
        while True:
            held = self._take_lock()
            fires = first_firing(policy, self.history())
            if fires is not None:
                self.release()
            if fires is not None or held or not waits:
                return fires
            if not said:
                say(f"waits for the run that extends {self.folder} (trunk.wait=false: goes alone)")
                said = True
            if interruption.received is not None:
                raise Interrupted("interrupted before it began", interruption.received)
            time.sleep(POLL_SECONDS)

    def _take_lock(self) -> bool:
        if self._lock is None:
            self._lock = locked(self.folder)
            if self._lock is not None:
                self._mend()
        return self._lock is not None

    def _mend(self) -> None:
        """Make the folder, or cut off the half line that a killed run has left."""
        (self.folder / KEY).write_text(json.dumps(self._key, indent=2, sort_keys=True) + "\n")
        metrics = self.folder / METRICS
        metrics.touch()
        content = metrics.read_bytes()
        with metrics.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)

    def _events(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Place of each whole line in ``metrics.jsonl``, and its event."""
        yield from _events_of(self.folder / METRICS)

    def _positions(self) -> dict[int, int]:
        """Place of each measurement's line by its update."""
        return {e["num_updates"]: at for at, e in self._events() if e["event"] == "measure"}

    def _append(self, run: Any) -> int:
        """Add what the run has logged since the last measurement, and this one; its place."""
        positions = self._positions()
        measured = run.state.history[-1]
        if measured.num_updates in positions:
            return positions[measured.num_updates]
        if not (self.folder / CONFIG).exists():
            OmegaConf.save(OmegaConf.create(run.config), self.folder / CONFIG)
        events = _events_after(run.log.folder / METRICS, max(positions, default=0))
        lines = "".join(json.dumps(e) + "\n" for e in events if e["event"] != "measure")
        with synced(self.folder / METRICS) as file:
            place = file.tell() + len(lines.encode())
            file.write(lines + _measure_line(measured, UNDECIDED))
        return place

    def _due(self, run: Any) -> bool:
        rested = time.monotonic() - self._written_at
        affordable = self._writing * (1 - self._share) <= self._share * rested
        return affordable and not self._is_saved(run)

    def _is_saved(self, run: Any) -> bool:
        saved = map(checkpoint.updates_of, checkpoint.find_all(self.folder))
        return run.state.num_updates in saved

    def _save(self, run: Any, position: int) -> None:
        begin = time.monotonic()
        state = {**run.state_dict(), "log": {"bytes": position, "wandb_id": None}}
        checkpoint.write(self.folder, run.state.num_updates, state, run.learner)
        distributed.from_primary(lambda: checkpoint.thin(self.folder, self._bytes))
        self._written_at = time.monotonic()
        self._writing = self._written_at - begin

    def _write_events(self, run: Path, size: int, policy: SwitchPolicy) -> None:
        """The run's ``metrics.jsonl`` up to its borrowed checkpoint, with its own verdicts."""
        history: list[Measurement] = []
        lines = []
        for place, event in self._events():
            if place >= size:
                break
            if event["event"] == "measure":
                history.append(measurement_of(event))
                lines.append(_measure_line(history[-1], policy.decide(history)))
            else:
                lines.append(json.dumps(event) + "\n")
        part = run / f".{METRICS}"
        part.write_text("".join(lines))
        part.replace(run / METRICS)


def give_back(found: Found) -> None:
    """Remove the borrowed checkpoint that a run has loaded."""
    if found.foreign and distributed.is_primary():
        shutil.rmtree(found.path.parent, ignore_errors=True)


def _comes_later(key: str) -> bool:
    group = key.split(".")[0]
    return group == "adapter" or (group == "switch" and not key.startswith(MEASURED_BY))


def _borrow(path: Path, run: Path) -> Path:
    """A copy of a checkpoint in a run's folder, by links if possible: the trunk may thin it."""
    place = run / BORROWED
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return Path(shutil.copytree(path, place / path.name, copy_function=_link))


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def _measure_line(measured: Measurement, verdict: Verdict) -> str:
    metrics = measurement_metrics(measured, verdict)
    return json.dumps(as_record("measure", measured.num_updates, measured.epoch, metrics)) + "\n"


def _events_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    place = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if line.endswith(b"\n"):
            yield place, json.loads(line)
        place += len(line)


def _events_after(path: Path, num_updates: int) -> list[dict[str, Any]]:
    """Events of a run behind its measurement at ``num_updates``, or all of them."""
    events = [event for _, event in _events_of(path)]
    known = [
        number
        for number, event in enumerate(events)
        if event["event"] == "measure" and event["num_updates"] == num_updates
    ]
    return events[known[-1] + 1 :] if known else events


def _size(path: Path) -> int:
    return path.stat().st_size
