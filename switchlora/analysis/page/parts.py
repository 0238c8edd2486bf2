"""The parts of a page other than its curves: ranks, differences, problems, provenance."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from switchlora.config import identity, leaves, shaping
from switchlora.names import family
from switchlora.storage import CONFIG, Record, is_run

NONE = "–"
SEED = "seed"
PER_RUN = ("command", "seed")  # keys of the environment that are shown for each run
DARK = 0.45  # share of the colour scale below which letters are white


@dataclass(frozen=True)
class RankCell:
    """The cell of one target in one run."""

    text: str
    background: str | None
    """None when there is no adapter"""
    color: str | None


@dataclass(frozen=True)
class RankMap:
    """The ranks of one family: a row for each run that switched, a column for each block."""

    family: str
    blocks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[RankCell, ...]], ...]


def groups_of(records: Sequence[Record], first: Iterable[Record] = ()) -> dict[Path, int]:
    """Return the number of each run's group, by folder. Runs of a group differ only in their seed.

    Groups are numbered in the order of ``first``. Groups without a run there come last.
    """
    keys = {
        record.folder: identity({k: v for k, v in shaping(record.config).items() if k != SEED})
        for record in records
    }
    order = dict.fromkeys([*(keys[record.folder] for record in first), *keys.values()])
    numbers = {key: number for number, key in enumerate(order)}
    return {folder: numbers[key] for folder, key in keys.items()}


def rank_maps(records: Sequence[Record]) -> list[RankMap]:
    """Return a map for each family of targets over the runs that switched.

    All maps share one colour scale.
    """
    switched = {record.folder.name: _switch(record) for record in records if _ranks(record)}
    names = list(dict.fromkeys(n for s in switched.values() for n in [*s["ranks"], *_full(s)]))
    largest = max((rank for s in switched.values() for rank in s["ranks"].values()), default=0)
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family(name), []).append(name)
    return [
        RankMap(
            each,
            tuple(_block(name, each) for name in members),
            tuple(
                (run, tuple(_rank_cell(switch, name, largest) for name in members))
                for run, switch in switched.items()
            ),
        )
        for each, members in families.items()
    ]


def differing_settings(
    records: Sequence[Record],
) -> tuple[list[str], list[tuple[Record, list[str]]]]:
    """Return the keys that affect results and differ between runs, and each run's values."""
    settings = {record.folder: shaping(record.config) for record in records}
    keys = sorted({key for values in settings.values() for key in values})
    differ = [k for k in keys if len({repr(v.get(k, NONE)) for v in settings.values()}) > 1]
    return differ, [
        (record, [_text(settings[record.folder].get(key, NONE)) for key in differ])
        for record in records
    ]


def problems(sweep: Path, records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return runs with a problem, each with one sentence about it.

    The problems are: the run is not finished, a switch was undone, or the run never began.
    """
    found = [(r.folder.name, _unfinished(r)) for r in records if not r.finished]
    found += [
        (record.folder.name, f"the switch was undone: {failure}")
        for record in records
        for failure in _switch(record).get("failures") or ()
    ]
    found += [(path.name, "it logged nothing: it failed at its start") for path in _dead(sweep)]
    return found


def provenance(records: Sequence[Record]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return what the environments of all runs have in common, and the keys that differ.

    A run without a recorded environment is left out.
    """
    found = [environment(record) for record in records if environment(record)]
    keys = [key for key in dict.fromkeys(k for e in found for k in e) if key not in PER_RUN]
    common = [key for key in keys if len({repr(e.get(key)) for e in found}) == 1]
    shown = [(key.removeprefix("versions."), _text(found[0].get(key))) for key in common]
    return shown, [key for key in keys if key not in common]


def environment(record: Record) -> dict[str, Any]:
    """Return the dotted keys of a run's environment; empty when it has none."""
    return dict(leaves((record.summary or {}).get("environment") or {}))


def reused(record: Record) -> str | None:
    """Return a text on the updates that were taken from a shared trunk, or None for none."""
    trunk = (record.summary or {}).get("trunk")
    if not trunk:
        return None
    return (
        f"the first {trunk['reused_updates']:,} updates ({trunk['reused_seconds']:,.1f} s) "
        f"come from {trunk['folder']} and were not computed again"
    )


def reason(record: Record) -> str:
    """Return why the run switched, or what held the criterion back if it never did."""
    return _switch(record).get("reason") or NONE


def changes(record: Record) -> str:
    """Return the changes of the trained tensors as text, such as 'switch 20; restart 35, 50'."""
    kinds: dict[str, list[str]] = {}
    for change in (record.summary or {}).get("transitions") or ():
        kinds.setdefault(change["kind"].replace("_", " "), []).append(f"{change['num_updates']:,}")
    return "; ".join(f"{kind} {', '.join(updates)}" for kind, updates in kinds.items()) or NONE


def status(record: Record) -> str:
    """Return the status in a run's summary, or 'unfinished' without a summary."""
    return record.summary["status"] if record.summary is not None else "unfinished"


def _dead(sweep: Path) -> Iterator[Path]:
    if is_run(sweep):
        return
    for path in sorted(sweep.glob("*")):
        if not is_run(path) and ((path / ".hydra").is_dir() or (path / CONFIG).is_file()):
            yield path


def _unfinished(record: Record) -> str:
    if record.summary is not None:
        return str(record.summary["status"])
    last = 0
    try:
        for event in record.events():
            last = event["num_updates"]
    except ValueError:
        return f"metrics.jsonl is damaged after update {last:,}: the run was killed as it wrote"
    return f"it has no summary: it goes on, or it was killed; last event at update {last:,}"


def _switch(record: Record) -> Mapping[str, Any]:
    return (record.summary or {}).get("switch") or {}


def _ranks(record: Record) -> Mapping[str, int]:
    return _switch(record).get("ranks") or {}


def _full(switch: Mapping[str, Any]) -> Sequence[str]:
    return switch.get("left_full") or ()


def _rank_cell(switch: Mapping[str, Any], name: str, largest: int) -> RankCell:
    rank = switch["ranks"].get(name)
    if rank is None:
        return RankCell("full" if name in _full(switch) else NONE, None, None)
    share = rank / largest if largest else 0.0
    background = to_hex(colormaps["viridis"](share))
    return RankCell(str(rank), background, "#ffffff" if share < DARK else "#000000")


def _block(name: str, of_family: str) -> str:
    numbers = [part for part in name.removesuffix(of_family).split(".") if part.isdigit()]
    return ".".join(numbers) or name


def _text(value: Any) -> str:
    return NONE if value is None else str(value)
