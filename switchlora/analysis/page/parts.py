"""The parts of a page other than its curves: ranks, differences, problems, provenance."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from switchlora.analysis.tables.rows import Table, run_names, without_seed
from switchlora.analysis.tables.systems import transitions
from switchlora.analysis.timeline import by_family
from switchlora.config import identity, leaves, shaping
from switchlora.storage import CONFIG, Record, is_run

NONE = "–"
PER_RUN = ("command", "seed")  # keys of the environment that are shown for each run
DARK = 0.45  # share of the colour scale below which letters are white
Groups = dict[Path, int]
"""by the folder of a run, the number of its group"""
Pairs = list[tuple[str, str]]
Switch = Mapping[str, Any]
"""what a summary says of a switch"""


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
    blocks: Sequence[str]
    rows: Sequence[tuple[str, Sequence[RankCell]]]


def groups_of(records: Sequence[Record], table: Table) -> Groups:
    """Return the number of each run's group, by folder. Runs of a group differ only in their seed.

    Groups are numbered in the order of the table's rows. Groups without a row come last.
    """
    in_order = [row.records[0] for row in table.rows]
    in_order += records
    numbers: dict[str, int] = {}
    groups = {}
    for record in in_order:
        configuration = identity(without_seed(record.config))
        groups[record.folder] = numbers.setdefault(configuration, len(numbers))
    return groups


def rank_maps(records: Sequence[Record]) -> list[RankMap]:
    """Return a map for each family of targets over the runs that switched.

    All maps share one colour scale.
    """
    switches = {}
    for record, name in zip(records, run_names(records), strict=True):
        switch = switch_of(record)
        if switch.get("ranks"):
            switches[name] = switch
    largest = 0
    names: dict[str, None] = {}
    for switch in switches.values():
        largest = max(largest, *switch["ranks"].values())
        names |= dict.fromkeys(switch["ranks"])
        names |= dict.fromkeys(_left_full(switch))
    maps = []
    for of_family, members in by_family(names).items():
        maps.append(_rank_map(of_family, members, switches, largest))
    return maps


def _rank_map(
    of_family: str, names: Sequence[str], switches: Mapping[str, Switch], largest: int
) -> RankMap:
    rows = []
    for run, switch in switches.items():
        cells = [_rank_cell(switch, name, largest) for name in names]
        rows.append((run, cells))
    blocks = [_block(name, of_family) for name in names]
    return RankMap(of_family, blocks, rows)


def differing_settings(
    records: Sequence[Record],
) -> tuple[list[str], list[tuple[Record, list[str]]]]:
    """Return the keys that affect results and differ between runs, and each run's values."""
    settings = [shaping(record.config) for record in records]
    differ = []
    for key in sorted(set().union(*settings)):
        if _differs(values.get(key, NONE) for values in settings):
            differ.append(key)
    rows = []
    for record, values in zip(records, settings, strict=True):
        texts = [_text(values.get(key, NONE)) for key in differ]
        rows.append((record, texts))
    return differ, rows


def _differs(values: Iterable[Any]) -> bool:
    return len(set(map(repr, values))) > 1


def problems(sweep: Path, records: Sequence[Record]) -> Pairs:
    """Return runs with a problem, each with one sentence about it.

    The problems are: the run is not finished, a switch was undone, or the run never began.
    """
    found = []
    for record in records:
        if not record.finished:
            found.append((record.folder.name, _unfinished(record)))
    for record in records:
        for failure in switch_of(record).get("failures") or ():
            found.append((record.folder.name, f"the switch was undone: {failure}"))
    for path in _dead(sweep):
        found.append((path.name, "it logged nothing: it failed at its start"))
    return found


def provenance(records: Sequence[Record]) -> tuple[Pairs, list[str]]:
    """Return what the environments of all runs have in common, and the keys that differ.

    A run without a recorded environment is left out.
    """
    found = list(filter(None, map(environment_of, records)))
    common = []
    differing = []
    for key in dict.fromkeys(chain.from_iterable(found)):
        if key in PER_RUN:
            continue
        if _differs(environment.get(key) for environment in found):
            differing.append(key)
        else:
            name = key.removeprefix("versions.")
            common.append((name, _text(found[0].get(key))))
    return common, differing


def environment_of(record: Record) -> dict[str, Any]:
    """Return the dotted keys of a run's environment; empty when it has none."""
    return dict(leaves(_summary(record).get("environment") or {}))


def reused(record: Record) -> str | None:
    """Return a text on the updates that were taken from a shared trunk, or None for none."""
    trunk = _summary(record).get("trunk")
    if not trunk:
        return None
    return (
        f"the first {trunk['reused_updates']:,} updates ({trunk['reused_seconds']:,.1f} s) "
        f"come from {trunk['folder']} and were not computed again"
    )


def reason(record: Record) -> str:
    """Return why the run switched, or what held the criterion back if it never did."""
    return switch_of(record).get("reason") or NONE


def changes(record: Record) -> str:
    """Return the changes of the trained tensors as text, such as 'switch 20; restart 35, 50'."""
    kinds: dict[str, list[str]] = {}
    for change in transitions(record):
        kind = change["kind"].replace("_", " ")
        kinds.setdefault(kind, []).append(f"{change['num_updates']:,}")
    told = [f"{kind} {', '.join(updates)}" for kind, updates in kinds.items()]
    return "; ".join(told) or NONE


def status(record: Record) -> str:
    """Return the status in a run's summary, or 'unfinished' without a summary."""
    return _summary(record).get("status", "unfinished")


def switch_of(record: Record) -> Switch:
    """Return what the summary says of a run's switch; empty without a summary."""
    return _summary(record).get("switch") or {}


def _summary(record: Record) -> Mapping[str, Any]:
    return record.summary or {}


def _dead(sweep: Path) -> Iterator[Path]:
    """Yield the folders of jobs in a sweep that failed before they logged anything."""
    if is_run(sweep):
        return
    for path in sorted(sweep.glob("*")):
        was_started = (path / ".hydra").is_dir() or (path / CONFIG).is_file()
        if was_started and not is_run(path):
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


def _left_full(switch: Switch) -> Sequence[str]:
    return switch.get("left_full") or ()


def _rank_cell(switch: Switch, name: str, largest: int) -> RankCell:
    rank = switch["ranks"].get(name)
    if rank is None:
        text = "full" if name in _left_full(switch) else NONE
        return RankCell(text, None, None)
    share = rank / largest if largest else 0.0
    background = to_hex(colormaps["viridis"](share))
    color = "#ffffff" if share < DARK else "#000000"
    return RankCell(str(rank), background, color)


def _block(name: str, of_family: str) -> str:
    parts = name.removesuffix(of_family).split(".")
    return ".".join(filter(str.isdigit, parts)) or name


def _text(value: Any) -> str:
    return NONE if value is None else str(value)
