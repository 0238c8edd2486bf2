"""Compare learning rates of the factors: ``python scripts/rates.py SWEEP --out FOLDER``.

Each line is one setting: width, epoch of the switch, start and share of parameters that trains.
Each column is one value of ``adapter.factor_lr``. A cell is the mean accuracy over seeds, in %, on
all images that were held out: the validation and the test split together. The last columns
compare the matched rate, seed by seed, with the fixed rate that is best in the mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from study import compare, held_out, lines_of, settings

from switchlora.analysis.tables.columns import Cell
from switchlora.storage import Record

SETTING = ("model.embed_dim", "switch.criterion.epoch", "switch.init", "switch.rank.share")
RATE = "adapter.factor_lr"
STEP = "adapter.matched_step"
Accuracies = dict[int, float]  # by seed


@dataclass(frozen=True)
class Run:
    """What the table needs of a run."""

    setting: tuple[str, ...]
    rate: str
    seed: int
    top1: float


def main() -> None:
    """Write and print the table."""
    compare(__doc__, read, write)


def read(record: Record) -> Run | None:
    """Return what a finished run reached."""
    rate, step, *setting = settings(record, RATE, STEP, *SETTING)
    if not record.finished:
        return None
    name = f"matched {step:g}" if rate == "matched" else f"{rate:g} x"
    return Run(tuple(map(str, setting)), name, record.config["seed"], held_out(record))


def write(runs: list[Run], folder: Path) -> None:
    """Write and print the table."""
    text = table(runs)
    (folder / "rates.md").write_text(text, encoding="utf-8")
    print(text)


def table(runs: list[Run]) -> str:
    """Return the Markdown table."""
    found: dict[tuple[str, ...], dict[str, Accuracies]] = {}
    for run in runs:
        by_rate = found.setdefault(run.setting, {})
        by_rate.setdefault(run.rate, {})[run.seed] = run.top1
    rates = sorted({rate for by_rate in found.values() for rate in by_rate}, key=_matched_first)
    header = ["width", "switch at epoch", "start", "trained", *rates]
    header += ["best fixed", "matched to it, points"]
    lines = [header]
    for setting in sorted(found):
        by_rate = found[setting]
        cells = [shown(by_rate.get(rate, {})) for rate in rates]
        lines.append([*setting, *cells, *compared(by_rate)])
    return lines_of(lines)


def shown(accuracies: Accuracies) -> str:
    """Return the mean over seeds, with their number."""
    if not accuracies:
        return "–"
    return f"{fmean(accuracies.values()):.2f} ({len(accuracies)})"


def compared(by_rate: Mapping[str, Accuracies]) -> list[str]:
    """Return the best fixed rate, and the distance of each matched one with its 95 % interval."""
    fixed = {rate: found for rate, found in by_rate.items() if not rate.startswith("matched")}
    if not fixed:
        return ["–", "–"]
    best = max(fixed, key=lambda rate: fmean(fixed[rate].values()))
    told = []
    for rate, found in by_rate.items():
        if rate in fixed:
            continue
        common = found.keys() & fixed[best].keys()
        differences = [found[seed] - fixed[best][seed] for seed in common]
        told.append(f"{rate}: {interval(differences)}")
    return [best, "; ".join(told)]


def interval(differences: list[float]) -> str:
    """Return the mean and half the width of its 95 % interval."""
    cell = Cell(tuple(differences))
    half = "" if cell.interval is None else f" ± {cell.interval:.2f}"
    return f"{cell.mean:+.2f}{half}"


def _matched_first(rate: str) -> tuple[bool, float]:
    number = rate.removeprefix("matched ").removesuffix(" x")
    return not rate.startswith("matched"), float(number)


if __name__ == "__main__":
    main()
