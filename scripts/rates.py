"""Compare learning rates of the factors: ``python scripts/rates.py SWEEP --out FOLDER``.

Each line is one setting: width, epoch of the switch, start and share of parameters that trains.
Each column is one value of ``adapter.factor_lr``. A cell is the mean accuracy over seeds, in %, on
all images that were held out: the validation and the test split together. The last columns
compare the matched rate, seed by seed, with the fixed rate that is best in the mean.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from switchlora.analysis.tables.columns import Cell
from switchlora.analysis.tables.rows import settings_of
from switchlora.storage import Record, find_records

SETTING = ("model.embed_dim", "switch.criterion.epoch", "switch.init", "switch.rank.share")
RATE = "adapter.factor_lr"
STEP = "adapter.matched_step"
Accuracies = dict[int, float]  # by seed


def main() -> None:
    """Write and print the table."""
    options = options_of(__doc__)
    text = table([record for record in find_records(options.runs) if record.finished])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rates.md").write_text(text, encoding="utf-8")
    print(text)


def options_of(documentation: str) -> argparse.Namespace:
    """Return what the command line of a script names: ``runs``, and the folder ``out``."""
    parser = argparse.ArgumentParser(description=documentation.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def lines_of(rows: list[list[str]]) -> str:
    """Return a Markdown table without padding; the first row is the header."""
    header, *others = rows
    lines = [header, ["---"] * len(header), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(records: list[Record]) -> str:
    """Return the Markdown table of finished runs."""
    found: dict[tuple[str, ...], dict[str, Accuracies]] = {}
    for record in records:
        config = settings_of(record.config)
        setting = tuple(str(config[key]) for key in SETTING)
        by_rate = found.setdefault(setting, {})
        by_rate.setdefault(rate_of(config), {})[record.config["seed"]] = held_out(record)
    rates = sorted({rate for by_rate in found.values() for rate in by_rate}, key=_matched_first)
    header = ["width", "switch at epoch", "start", "trained", *rates]
    header += ["best fixed", "matched to it, points"]
    lines = [header]
    for setting in sorted(found):
        by_rate = found[setting]
        cells = [shown(by_rate.get(rate, {})) for rate in rates]
        lines.append([*setting, *cells, *compared(by_rate)])
    return lines_of(lines)


def rate_of(config: Mapping[str, object]) -> str:
    """Return the name of a run's learning rate of the factors."""
    rate = config[RATE]
    return f"matched {config[STEP]:g}" if rate == "matched" else f"{rate:g} x"


def held_out(record: Record) -> float:
    """Return top1 in % over the validation and the test split."""
    splits = [record.result["val"], record.result["test"]]
    images = [record.result["images"][name] for name in ("val", "test")]
    total = sum(split["top1"] * count for split, count in zip(splits, images, strict=True))
    return float(total) / sum(images)


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
