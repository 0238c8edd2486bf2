"""Rank signals by what a switch costs: ``python scripts/signals.py SWEEPS --out FOLDER``.

A sweep has runs that switched at several dates, and full training, for each seed. The cost of a
switch is the accuracy of full training minus that of the run, in points, with the same seed. A
signal is a number that was known when the run switched; it should rise with the cost. The table
has Spearman's rank correlation of signal and cost over the dates: the mean over seeds, and the
least and largest. 'trial' alone looks ahead: it trained the adapter for one window.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from scipy.stats import spearmanr
from study import compare, held_out, lines_of, write_csv

from switchlora.monitor import Measurement
from switchlora.storage import Record, read_events, read_history

History = list[Measurement]


@dataclass(frozen=True)
class Switched:
    """A run that switched, with full training of the same seed."""

    record: Record
    full: Record

    @cached_property
    def history(self) -> History:
        """The measurements until the switch."""
        return read_history(self.record.folder)

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each target."""
        return self.record.result["switch"]["ranks"]

    @property
    def cost(self) -> float:
        """Points that full training is ahead at the end, over all images that were held out."""
        return held_out(self.full) - held_out(self.record)


def lost_energy(run: Switched) -> float:
    """Share of the last update that is outside the leading directions of the update before."""
    last = run.history[-1].layers
    kept = [sum(stats.update_kept_energies[: run.ranks[name]]) for name, stats in last.items()]
    return 1 - fmean(kept)


def uncaptured_energy(run: Switched) -> float:
    """Share of the last update that is beyond its own leading directions."""
    last = run.history[-1].layers
    shares = []
    for name, stats in last.items():
        leading = stats.update_singular_values[: run.ranks[name]]
        shares.append(sum(value**2 for value in leading) / stats.update_norm**2)
    return 1 - fmean(shares)


def update_norm(run: Switched) -> float:
    """Relative update norm over its peak, the mean over the targets."""
    ratios = []
    for name in run.history[-1].layers:
        norms = [measured.layers[name].relative_update_norm for measured in run.history]
        ratios.append(norms[-1] / max(norms))
    return fmean(ratios)


def update_rank(run: Switched) -> float:
    """Stable rank of the last update, the mean over the targets."""
    return fmean(stats.update_stable_rank for stats in run.history[-1].layers.values())


def loss_slope(run: Switched) -> float:
    """How much the train loss fell in the last window."""
    before, last = run.history[-2:]
    return before.train_loss - last.train_loss


def loss_to_come(run: Switched) -> float:
    """What the loss would still fall: its last fall, for each window that is left."""
    last = run.history[-1]
    window = last.num_updates - run.history[-2].num_updates
    left = (run.record.result["num_updates"] - last.num_updates) / window
    return loss_slope(run) * left


def loss_to_lose(run: Switched) -> float:
    """``loss_to_come`` times ``lost_energy``: the part of it that the adapter cannot follow."""
    return loss_to_come(run) * lost_energy(run)


def trial(run: Switched) -> float:
    """How far the loss is above that of full training, in the first window after the switch."""
    update = run.history[-1].num_updates
    return loss_after(run.record, update) - loss_after(run.full, update)


def early(run: Switched) -> float:
    """Updates that are left: the date alone."""
    return run.record.result["num_updates"] - run.history[-1].num_updates


SIGNALS: tuple[Callable[[Switched], float], ...] = (
    *(lost_energy, uncaptured_energy, update_norm, update_rank),
    *(loss_slope, loss_to_come, loss_to_lose, trial, early),
)


def main() -> None:
    """Write and print the table, and all numbers as CSV."""
    compare(__doc__, read, write)


def read(record: Record) -> Record | None:
    """Return a run if it has finished."""
    return record if record.finished else None


def write(records: list[Record], folder: Path) -> None:
    """Write and print the table, and all numbers as CSV."""
    rows = []
    for sweep in dict.fromkeys(record.folder.parent for record in records):
        for run in switched_runs([each for each in records if each.folder.parent == sweep]):
            told = {"setting": sweep.name, "seed": run.record.config["seed"]}
            told |= {"update": run.history[-1].num_updates, "cost": run.cost}
            rows.append(told | {signal.__name__: signal(run) for signal in SIGNALS})
    text = table(rows)
    write_csv(folder / "signals.csv", rows)
    (folder / "signals.md").write_text(text, encoding="utf-8")
    print(text)


def switched_runs(records: list[Record]) -> list[Switched]:
    """Return the runs of a sweep that switched, each with full training of its seed."""
    full: dict[int, Record] = {}
    others = []
    for record in records:
        if record.result["switch"]["fired"]:
            others.append(record)
        else:
            full[record.config["seed"]] = record
    found = []
    for record in others:
        seed = record.config["seed"]
        if seed not in full:
            raise ValueError(f"{record.folder} needs full training with seed {seed} beside it")
        found.append(Switched(record, full[seed]))
    check(found)
    return sorted(found, key=lambda run: (run.record.config["seed"], -early(run)))


def check(runs: list[Switched]) -> None:
    """Raise ValueError unless the signals of each run are known, at two dates or more a seed."""
    dates: dict[int, set[int]] = {}
    for run in runs:
        if len(run.history) < 2:
            raise ValueError(
                f"{run.record.folder} was measured once before its switch: give a later one"
            )
        if not all(stats.update_kept_energies for stats in run.history[-1].layers.values()):
            raise ValueError(f"{run.record.folder} was not made with monitor.exact=true")
        dates.setdefault(run.record.config["seed"], set()).add(run.history[-1].num_updates)
    if not dates or min(map(len, dates.values())) < 2:
        raise ValueError("give runs that switched at two dates or more, for each seed")


def loss_after(record: Record, update: int) -> float:
    """Return the mean train loss of the first window after ``update``."""
    for kind in ("measure", "window"):
        for event in read_events(record.folder, kind):
            if event["num_updates"] > update:
                return float(event["train/window_loss"])
    raise ValueError(f"{record.folder} has no window after update {update}")


def table(rows: list[dict[str, float]]) -> str:
    """Return the Markdown table of rank correlations, the best signal of all settings first."""
    settings = sorted({row["setting"] for row in rows})
    names = [signal.__name__ for signal in SIGNALS]
    found = {}
    for name in names:
        found[name] = [correlations(rows, setting, name) for setting in settings]
    header = ["signal", *map(str, settings)]
    lines = [header]
    for name in sorted(names, key=lambda name: -fmean(map(fmean, found[name]))):
        cells = [f"{fmean(c):+.2f} ({min(c):+.2f} to {max(c):+.2f})" for c in found[name]]
        lines.append([name, *cells])
    return lines_of(lines)


def correlations(rows: list[dict[str, float]], setting: object, signal: str) -> list[float]:
    """Return Spearman's correlation of a signal with the cost, for each seed."""
    of_setting = [row for row in rows if row["setting"] == setting]
    found = []
    for seed in sorted({row["seed"] for row in of_setting}):
        of_seed = [row for row in of_setting if row["seed"] == seed]
        told = spearmanr([row[signal] for row in of_seed], [row["cost"] for row in of_seed])
        found.append(float(told.statistic))
    return found


if __name__ == "__main__":
    main()
