"""Which checkpoints a run keeps: when it saves, what it finds, what it removes."""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from switchlora.errors import check_range

FOLDER = "checkpoints"
NAME = re.compile(r"update-(\d+)(?:\.(\d+))?")


def find_all(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first."""
    found = [path for path in (folder / FOLDER).glob("update-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_order, reverse=True)


def prune(folder: Path, keep: int, best_update: int | None) -> None:
    """Remove all checkpoints but the newest ``keep`` and the newest one at ``best_update``."""
    found = find_all(folder)
    best = [path for path in found if _order(path)[0] == best_update][:1]
    for path in found[keep:]:
        if path not in best:
            _remove(path)


def updates_of(path: Path) -> int:
    """Updates that were made when a checkpoint was written."""
    return _order(path)[0]


def thin(folder: Path, budget: float) -> None:
    """Remove checkpoints until they fit into ``budget`` bytes; the newest stays.

    Each time the one goes that leaves the smallest gap, so that those that stay lie evenly.
    """
    kept = find_all(folder)[::-1]
    sizes = {path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in kept}
    while len(kept) > 1 and sum(sizes[path] for path in kept) > budget:
        updates = [0, *map(updates_of, kept)]
        gaps = [after - before for before, after in zip(updates, updates[2:], strict=False)]
        _remove(kept.pop(gaps.index(min(gaps))))


def set_aside(path: Path) -> None:
    """Rename a checkpoint that cannot be used, so that it is not taken for one again."""
    name = f"unusable-{path.name}"
    while path.with_name(name).exists():
        name += "-again"
    path.rename(path.with_name(name))


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted write or removal left."""
    for path in (folder / FOLDER).glob(".*-*"):
        shutil.rmtree(path)


@dataclass
class SaveSchedule:
    """When a checkpoint is due besides those at the ends of epochs and around the switch.

    ``keep`` is how many of the newest stay, besides the best; 0 writes none at all.
    """

    every_updates: int | None
    every_minutes: float | None
    keep: int
    saved_at: int = 0
    """updates made at the last save"""

    def __post_init__(self) -> None:
        for name, least in {"every_updates": 1, "every_minutes": 0, "keep": 0}.items():
            value = getattr(self, name)
            if value is not None:
                check_range(f"checkpoint.{name}", value, least)
        self._clock = time.monotonic()

    def due(self, num_updates: int) -> bool:
        """Whether it is time for one."""
        minutes = (time.monotonic() - self._clock) / 60
        by_updates = self.every_updates and num_updates - self.saved_at >= self.every_updates
        by_time = self.every_minutes is not None and minutes >= self.every_minutes
        return bool(self.keep and (by_updates or by_time))

    def done(self, num_updates: int) -> None:
        """One was written."""
        self.saved_at, self._clock = num_updates, time.monotonic()


def _remove(path: Path) -> None:
    unfinished = path.with_name(f".removing-{path.name}")
    path.rename(unfinished)
    shutil.rmtree(unfinished)


def free_name(place: Path, num_updates: int) -> Path:
    """Return the name of the next checkpoint of an update: ``.1`` and so on if there is one."""
    name = f"update-{num_updates:08d}"
    taken = [_order(path)[1] for path in place.glob(f"{name}*")]
    return place / (f"{name}.{max(taken) + 1}" if taken else name)


def _order(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)
