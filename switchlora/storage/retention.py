"""The checkpoints of a run folder: when to save one, how to find them, which to remove."""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from switchlora.errors import check_range

FOLDER = "checkpoints"
NAME = re.compile(r"update-(\d+)(?:\.(\d+))?")


def find_all(folder: Path | str) -> list[Path]:
    """Return the checkpoints of a run folder, the newest first."""
    folder = Path(folder)
    found = []
    for path in (folder / FOLDER).glob("update-*"):
        if NAME.fullmatch(path.name) and _is_own_folder(path):
            found.append(path)
    return sorted(found, key=_order, reverse=True)


def prune(folder: Path, keep: int, best_update: int | None) -> None:
    """Remove all checkpoints but the newest ``keep`` and the newest one at ``best_update``."""
    found = find_all(folder)
    best = next((path for path in found if updates_of(path) == best_update), None)
    for path in found[keep:]:
        if path != best:
            _remove(path)


def updates_of(path: Path | str) -> int:
    """Return the number of updates that were done when a checkpoint was written."""
    path = Path(path)
    num_updates, _ = _order(path)
    return num_updates


def thin(folder: Path | str, budget: float) -> None:
    """Remove checkpoints until they fit into ``budget`` bytes; the newest stays.

    Each step removes the checkpoint that leaves the smallest gap in updates. The others thus stay
    evenly spaced.
    """
    folder = Path(folder)
    kept = list(reversed(find_all(folder)))
    sizes = list(map(_size, kept))
    while len(kept) > 1 and sum(sizes) > budget:
        place = _most_crowded(kept)
        _remove(kept.pop(place))
        sizes.pop(place)


def _size(path: Path) -> int:
    """Return the bytes of all files in a folder."""
    size = 0
    for file in path.rglob("*"):
        if file.is_file():
            size += file.stat().st_size
    return size


def _most_crowded(kept: list[Path]) -> int:
    """Return the place of the checkpoint whose removal leaves the smallest gap, the first such.

    ``kept`` has the oldest first. The newest is never returned; before the oldest lies update 0.
    """
    updates = [0, *map(updates_of, kept)]
    gaps = []
    for place in range(len(kept) - 1):
        gaps.append(updates[place + 2] - updates[place])
    return gaps.index(min(gaps))


def set_aside(path: Path) -> None:
    """Rename a checkpoint that cannot be used, so that it is not taken for one again."""
    path.rename(free_name(path.parent, f"unusable-{path.name}"))


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted write or an interrupted removal left behind."""
    for begun in (".writing-*", ".removing-*"):
        for path in filter(_is_own_folder, (folder / FOLDER).glob(begun)):
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
        return self.due_by_updates(num_updates) or self.due_by_time()

    def due_by_updates(self, num_updates: int) -> bool:
        """Return whether a checkpoint is due by the number of updates, the same on all ranks."""
        since = num_updates - self.saved_at
        return bool(self.keep and self.every_updates and since >= self.every_updates)

    def due_by_time(self) -> bool:
        """Return whether a checkpoint is due by this process's clock."""
        minutes = (time.monotonic() - self._clock) / 60
        return bool(self.keep) and self.every_minutes is not None and minutes >= self.every_minutes

    def done(self, num_updates: int) -> None:
        """Note that a checkpoint was written."""
        self.saved_at = num_updates
        self._clock = time.monotonic()


def _remove(path: Path) -> None:
    unfinished = path.with_name(f".removing-{path.name}")
    path.rename(unfinished)
    shutil.rmtree(unfinished)


def name_of(num_updates: int) -> str:
    """Return the name of the first checkpoint of an update."""
    return f"update-{num_updates:08d}"


def free_name(folder: Path, name: str) -> Path:
    """Return a path in ``folder`` that is not taken: ``name``, with ``.1`` and so on if need be.

    The number is higher than all that are there, so the order of the numbers is that of time.
    """
    numbered = re.compile(re.escape(name) + r"(?:\.(\d+))?")
    free = 0
    for path in folder.iterdir():
        match = numbered.fullmatch(path.name)
        if match is not None:
            free = max(free, int(match[1] or 0) + 1)
    return folder / (f"{name}.{free}" if free else name)


def _is_own_folder(path: Path) -> bool:
    """Return whether a folder lies here itself: a link may lead anywhere."""
    return path.is_dir() and not path.is_symlink()


def _order(path: Path) -> tuple[int, int]:
    """Return the updates and the number of a checkpoint; (-1, 0) for any other folder."""
    match = NAME.fullmatch(path.name)
    if match is None:
        return -1, 0
    return int(match[1]), int(match[2] or 0)
