"""Share one full phase among runs that differ only in when they switch, and to what.

A trunk is a folder named after everything that shapes a full phase. It looks like a run folder:
``config.yaml``, ``metrics.jsonl`` with every measurement, and checkpoints. Each checkpoint is made
just after a measurement. Checkpoints are thinned to a budget.

One run at a time holds the trunk's lock and extends it. Any other run replays its own criterion
over the history of the trunk. If the criterion fires there, the run goes on from the nearest
checkpoint before. Its result is bit for bit that of a run that trained alone from the start.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from switchlora.adapters import Target
from switchlora.config import Config, identity, shaping
from switchlora.errors import (
    CheckpointUnusable,
    Interrupted,
    OtherRankFailed,
    check_range,
    check_share,
)
from switchlora.monitor import Measurement
from switchlora.policy import SwitchPolicy, decisions
from switchlora.process import Interruption, distributed, one_line, say
from switchlora.storage import (
    CONFIG,
    METRICS,
    TRUNK_KEY,
    FileDamaged,
    Found,
    checkpoint,
    code_digest,
    locked,
    machine,
    retention,
)
from switchlora.sweep.trunklog import TrunkLog

BORROWED = ".from-trunk"
GIGABYTE = 10**9
POLL_SECONDS = 0.5
NO_RELATION = -1
"""stands for the firing update when a run does not continue the trunk: it borrows nothing"""
MEASURED_BY = ("switch.targets", "switch.split_qkv")
Say = Callable[[str], None]
Save = Callable[[Path, int], None]
"""write a checkpoint of the run into a folder; the number is the byte of its log to go on from"""


def trunk_key(config: Config, device: torch.device, data: str) -> dict[str, Any]:
    """Return everything that shapes the bits of a full phase, as plain values by dotted key.

    ``data`` is a digest of the data set. The key has the code and the versions. Of the switch
    policy it has only ``targets`` and ``split_qkv``.
    """
    shared = {}
    for name, value in shaping(config).items():
        if not _comes_later(name):
            shared[name] = value
    key = {
        **shared,
        "log.every": config["log"]["every"],
        "system.parallel": config["system"]["parallel"],
        "processes": distributed.world_size(),
        "data": data,
        "code": code_digest(shared),
    }
    for name, value in machine(device).items():
        key[f"machine.{name}"] = value
    return key


def first_firing(
    policy: SwitchPolicy,
    history: Sequence[Measurement],
    targets: Mapping[str, Target] | None = None,
) -> int | None:
    """Return the number of updates at which ``policy`` first switches any of ``targets``.

    0 is a switch before the first update. None when the policy switches nowhere in ``history``.
    Without targets only a whole switch counts, not a stage.
    """
    for decision in decisions(policy, history, targets or {}):
        if decision.verdict.fires or decision.chosen:
            return decision.num_updates
    return None


class Trunk:
    """One shared full phase on the disk, and this run's part in it.

    - ``gigabytes``: budget of the checkpoints. The newest one always stays.
    - ``time_share``: writing checkpoints takes at most this share of the time. Not every
      measurement therefore has one.
    - ``wait``: what a run does whose criterion has not yet fired on the trunk while another run
      extends it. With True it waits. With False, or with several processes, it computes the rest
      on its own.

    All ranks must call the public methods.
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
        self.folder = place / identity(key)
        self.log = TrunkLog(self.folder)
        self.extends = False
        """whether this run is the one that extends the trunk"""
        self._key = key
        self._bytes = gigabytes * GIGABYTE
        self._share = time_share
        self._wait = wait
        self._lock: TextIO | None = None
        self._written_at = -math.inf
        """time at which the last checkpoint of this run was written"""
        self._writing = 0.0
        """seconds that it took"""

    def enter(
        self,
        policy: SwitchPolicy,
        model: nn.Module,
        own: Found | None,
        run: Path,
        interruption: Interruption,
        say: Say = say,
    ) -> Found | None:
        """Return the checkpoint from which the run in folder ``run`` goes on.

        This is a checkpoint of the trunk, or else ``own``, that of the run itself (None: the run
        starts at the beginning). Afterwards ``extends`` says whether this run extends the trunk.
        It does not when the log of the trunk is damaged or the file system refuses, for example to
        lock.
        Interrupted when a signal comes while the run waits.
        """
        choose = partial(self._choose, policy, model, own, run, interruption, say)
        place, position, self.extends = distributed.from_primary(
            lambda: self._or_leave(choose, run, say)
        )
        if place is None:
            return own
        state = checkpoint.load(place)
        state["log"] = {
            "bytes": position,
            "wandb_id": own.state["log"]["wandb_id"] if own else None,
        }
        taken = self._taken(state, own)
        state["train"]["reused"] = taken
        line = (
            f"{taken['reused_updates']} updates of the full phase come from {self.folder}: "
            f"{taken['reused_seconds']:.0f} s saved"
        )
        return Found(place, run, [line], branches=False, state=state, foreign=True)

    def publish(self, measurement: Measurement, run: Path, save: Save, say: Say) -> None:
        """Add the run's newest measurement to the trunk, and a checkpoint if one is due.

        ``run`` is the folder of the run. ``save(folder, place)`` writes the run as it is. ``say``
        shows the user a line. A run that does not extend the trunk adds nothing.
        """
        if not self.extends:
            return
        with self._left_when_it_is_unusable(say):
            due = distributed.from_primary(lambda: self._append(measurement, run))
            if due:
                self._save(measurement.num_updates, save)

    def leave(self, num_updates: int, save: Save, say: Say) -> None:
        """Leave the trunk at a switch, with a checkpoint from which another run can extend it."""
        if self.extends:
            with self._left_when_it_is_unusable(say):
                if not distributed.from_primary(lambda: self._is_saved(num_updates)):
                    self._save(num_updates, save)
        self.release()

    def release(self) -> None:
        """Release the lock, if this run holds it."""
        self.extends = False
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _or_leave(
        self, choose: Callable[[], tuple[Path | None, int, bool]], run: Path, say: Say
    ) -> tuple[Path | None, int, bool]:
        """Return what ``choose`` returns; leave a trunk that cannot be read or written."""
        try:
            return choose()
        except (OSError, FileDamaged) as error:
            self._go_on_alone(error, say)
            shutil.rmtree(run / BORROWED, ignore_errors=True)
            return None, 0, False

    def _choose(
        self,
        policy: SwitchPolicy,
        model: nn.Module,
        own: Found | None,
        run: Path,
        interruption: Interruption,
        say: Say,
    ) -> tuple[Path | None, int, bool]:
        """Return a borrowed checkpoint or None, a log position, and whether this run extends.

        The position is the length in bytes of the run's log, which then has the trunk's events.
        """
        fires = self._wait_for_a_decision(policy, model, own, interruption, say)
        least = own.state["train"]["num_updates"] if own else 0
        most = math.inf if fires is None else fires
        for path in retention.find_all(self.folder):
            if not least < retention.updates_of(path) <= most:
                continue
            try:
                borrowed = _borrow(path, run)
                state = checkpoint.read(borrowed)
                checkpoint.check_model(path, state, model)
            except (CheckpointUnusable, FileNotFoundError, shutil.Error) as error:
                say(f"{path} is left alone: {one_line(error)}")
                continue
            kept = own.state["log"]["bytes"] if own else 0
            size = self.log.copy_to(run, state["log"]["bytes"], policy, kept)
            return borrowed, size, self._lock is not None
        shutil.rmtree(run / BORROWED, ignore_errors=True)
        return None, 0, self._lock is not None

    def _wait_for_a_decision(
        self,
        policy: SwitchPolicy,
        model: nn.Module,
        own: Found | None,
        interruption: Interruption,
        say: Say,
    ) -> int | None:
        """Return the number of updates at which ``policy`` fires on the trunk.

        None when this run has to train on. NO_RELATION when the past of this run is not that of
        the trunk.
        """
        targets = policy.find_targets(model)
        waits = self._wait and distributed.world_size() == 1
        known_size = -1
        told = False
        while True:
            held = self._take_lock()
            size = self.log.size()
            if held or size != known_size:
                known_size = size
                history = self.log.history()
                fires = first_firing(policy, history, targets)
                goes_on = _continues(own, history)
            if fires is not None or not goes_on:
                self.release()
                return fires if goes_on else NO_RELATION
            if held or not waits:
                return None
            if not told:
                say(f"waits for the run that extends {self.folder} (trunk.wait=false: goes alone)")
                told = True
            if interruption.received is not None:
                where = f"interrupted while it waited for {self.folder}"
                raise Interrupted(f"{where}; the same command goes on", interruption.received)
            time.sleep(POLL_SECONDS)

    def _take_lock(self) -> bool:
        if self._lock is None:
            self._lock = locked(self.folder)
            if self._lock is not None:
                self.log.mend()
                text = json.dumps(self._key, indent=2, sort_keys=True)
                (self.folder / TRUNK_KEY).write_text(text + "\n")
        return self._lock is not None

    def _append(self, measurement: Measurement, run: Path) -> bool:
        """Add a measurement; return whether a checkpoint is due."""
        if not (self.folder / CONFIG).exists():
            shutil.copyfile(run / CONFIG, self.folder / CONFIG)
        self.log.append(measurement, run / METRICS)
        rested = time.monotonic() - self._written_at
        affordable = self._writing * (1 - self._share) <= self._share * rested
        return affordable and not self._is_saved(measurement.num_updates)

    def _is_saved(self, num_updates: int) -> bool:
        saved = map(retention.updates_of, retention.find_all(self.folder))
        return num_updates in saved

    def _save(self, num_updates: int, save: Save) -> None:
        begin = time.monotonic()
        save(self.folder, distributed.from_primary(lambda: self.log.place_of(num_updates)))
        distributed.from_primary(lambda: retention.thin(self.folder, self._bytes))
        self._written_at = time.monotonic()
        self._writing = self._written_at - begin

    @contextmanager
    def _left_when_it_is_unusable(self, say: Say) -> Iterator[None]:
        """Leave the trunk, with a line, when it cannot be written or its log is damaged."""
        try:
            yield
        except (OSError, FileDamaged, OtherRankFailed) as error:
            self._go_on_alone(error, say)

    def _go_on_alone(self, error: Exception, say: Say) -> None:
        say(f"the trunk is left, this run goes on alone: {one_line(error)}")
        self.release()

    def _taken(self, state: Mapping[str, Any], own: Found | None) -> dict[str, Any]:
        """Return the updates and seconds that the borrowed ``state`` saves, now and before."""
        updates = state["train"]["num_updates"]
        seconds = state["stopwatch"]["train_seconds"]
        if own is not None:
            earlier = own.state["train"]["reused"] or {"reused_updates": 0, "reused_seconds": 0.0}
            updates += earlier["reused_updates"] - own.state["train"]["num_updates"]
            seconds += earlier["reused_seconds"] - own.state["stopwatch"]["train_seconds"]
        return {
            "folder": str(self.folder),
            "reused_updates": updates,
            "reused_seconds": max(seconds, 0.0),
        }


def give_back(found: Found) -> None:
    """Remove ``found`` after loading, if it is a run's copy of a trunk's checkpoint."""
    if found.path.parent.name == BORROWED and distributed.is_primary():
        shutil.rmtree(found.path.parent, ignore_errors=True)


def _comes_later(key: str) -> bool:
    group = key.split(".")[0]
    return group == "adapter" or (group == "switch" and not key.startswith(MEASURED_BY))


def _continues(own: Found | None, history: Sequence[Measurement]) -> bool:
    """Return whether a run that goes on from ``own`` continues a trunk with this ``history``.

    It does not if its own measurements are missing in the trunk or differ from the trunk's. Such
    a run began alone, or under another version of the code. It does not either if a switch of it
    failed.
    """
    if own is None:
        return True
    past = own.state["train"]
    theirs = [asdict(measured) for measured in history[: len(past["history"])]]
    return not past["failed_switches"] and repr(theirs) == repr(past["history"])


def _borrow(path: Path, run: Path) -> Path:
    """Copy a checkpoint into a run's folder, by links if possible; return the copy.

    The trunk may remove its own at any time.
    """
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
