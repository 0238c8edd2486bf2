"""The checkpoints of a run folder: when to save one, how to find them, which to remove."""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from switchlora.errors import check_range

FOLDER = "checkpoints"
NAME = re.compile(r"update-(\d+)(?:\.(\d+))?")


def find_all(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, the newest first."""
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
    """Return the number of updates that were done when a checkpoint was written."""
    return _order(path)[0]


def thin(folder: Path, budget: float) -> None:
    """Remove checkpoints until they fit into ``budget`` bytes; the newest stays.

    Each step removes the checkpoint that leaves the smallest gap in updates. The others thus stay
    evenly spaced.
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
    """Remove what an interrupted write or an interrupted removal left behind."""
    for path in (folder / FOLDER).glob(".*-*"):
        shutil.rmtree(path)


@dataclass
class SaveSchedule:
    """Decide when a checkpoint is due inside an epoch, by updates or by minutes.

    The checkpoints at the ends of epochs and around the switch come in addition. ``keep`` is how
    many of the newest stay, beside the best one. With 0 no checkpoint is written at all.
    """

    every_updates: int | None
    every_minutes: float | None
    keep: int
    saved_at: int = 0
    """updates done at the last save"""

    def __post_init__(self) -> None:
        for name, least in {"every_updates": 1, "every_minutes": 0, "keep": 0}.items():
            value = getattr(self, name)
            if value is not None:
                check_range(f"checkpoint.{name}", value, least)
        self._clock = time.monotonic()

    def due(self, num_updates: int) -> bool:
        """Return whether a checkpoint is due."""
        minutes = (time.monotonic() - self._clock) / 60
        by_updates = self.every_updates and num_updates - self.saved_at >= self.every_updates
        by_time = self.every_minutes is not None and minutes >= self.every_minutes
        return bool(self.keep and (by_updates or by_time))

    def done(self, num_updates: int) -> None:
        """Note that a checkpoint was written."""
        self.saved_at, self._clock = num_updates, time.monotonic()


def _remove(path: Path) -> None:
    unfinished = path.with_name(f".removing-{path.name}")
    path.rename(unfinished)
    shutil.rmtree(unfinished)


def free_name(place: Path, num_updates: int) -> Path:
    """Return the path of the next checkpoint of an update: with ``.1`` and so on if one exists."""
    name = f"update-{num_updates:08d}"
    taken = [_order(path)[1] for path in place.glob(f"{name}*")]
    return place / (f"{name}.{max(taken) + 1}" if taken else name)


def _order(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)
