"""Compare adapters over learning rates: ``python scripts/reflora_rates.py RUNS --out FOLDER``.

A line of ``reflora_rates.md`` is a method with a start, under an optimizer. A column is a learning
rate of the factors, ``adapter.factor_lr`` times the rate of the weights. A cell is the mean over
seeds of top1 in %, on all images that were held out. The last columns are of the best rate: top1
and the mean loss of the run with their spread over seeds. ``reflora_rates.png`` draws top1 against
the rate, with the range of the seeds. ``reflora_rates.csv`` has a line for each run.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rates import RATE, held_out, lines_of, options_of

from switchlora.analysis.output import save
from switchlora.analysis.tables.rows import settings_of
from switchlora.storage import Record, find_records

LR = "full.optimizer.lr"
WARMUP = "adapter.refactoring.warmup_updates"
DEFAULT_START, DEFAULT_WARMUP = "zero_b", 100


@dataclass(frozen=True)
class Result:
    """What a run reached."""

    seed: int
    top1: float
    """in %; 0 without a finite loss"""
    loss: float
    """mean train loss over its windows; NaN without a finite loss"""


@dataclass(frozen=True)
class Arm:
    """What a line of the table compares: a method with a start, under an optimizer."""

    optimizer: str
    name: str
    results: Mapping[float, list[Result]]
    """those of all seeds by the learning rate of the factors"""

    def top1(self, rate: float) -> list[float]:
        """Return top1 in % of each seed."""
        return [result.top1 for result in self.results[rate]]

    @cached_property
    def best(self) -> float:
        """The rate with the highest mean."""
        return max(self.results, key=lambda rate: fmean(self.top1(rate)))

    def losses(self) -> list[float]:
        """Return the mean train loss of each seed at the best rate, over the whole run."""
        return [result.loss for result in self.results[self.best]]


def main() -> None:
    """Write and print the table; draw the picture."""
    options = options_of(__doc__)
    arms = arms_of([record for record in find_records(options.runs) if record.summary])
    text = table(arms)
    save(picture(arms), options.out, "reflora_rates")
    (options.out / "reflora_rates.md").write_text(text, encoding="utf-8")
    write_runs(arms, options.out / "reflora_rates.csv")
    print(text)


def write_runs(arms: list[Arm], path: Path) -> None:
    """Write a line for each run."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["optimizer", "arm", "rate", "seed", "top1", "mean train loss"])
        for arm in arms:
            for rate, results in arm.results.items():
                for found in results:
                    numbers = [
                        f"{found.top1:.2f}",
                        "" if isnan(found.loss) else f"{found.loss:.4f}",
                    ]
                    lines.writerow([arm.optimizer, arm.name, rate, found.seed, *numbers])


def arms_of(records: list[Record]) -> list[Arm]:
    """Sort runs into arms."""
    found: dict[tuple[str, str], dict[float, list[Result]]] = {}
    for record in sorted(records, key=lambda record: record.config["seed"]):
        config = settings_of(record.config)
        rate = float(f"{config[RATE] * config[LR]:.3g}")
        place = str(config["full.optimizer"]), name_of(record.config["method"], config)
        found.setdefault(place, {}).setdefault(rate, []).append(result_of(record))
    return [Arm(*place, dict(sorted(rates.items()))) for place, rates in sorted(found.items())]


def name_of(method: str, config: Mapping[str, object]) -> str:
    """Return the method of a run, and what it sets in another way than the method's yaml."""
    words = [method]
    if config["switch.init"] != DEFAULT_START:
        words.append(str(config["switch.init"]))
    warmup = config.get(WARMUP, DEFAULT_WARMUP)
    if warmup != DEFAULT_WARMUP:
        words.append(f"warm-up {warmup}")
    if config.get("adapter.refactoring.reset_moments"):
        words.append("fresh moments")
    return ", ".join(words)


def result_of(record: Record) -> Result:
    """Read what a run reached."""
    seed = record.config["seed"]
    if not record.finished:
        return Result(seed, 0.0, nan)
    losses = [event["train/window_loss"] for event in record.events("window")]
    return Result(seed, held_out(record), fmean(losses))


def table(arms: list[Arm]) -> str:
    """Return the Markdown tables, one for each optimizer."""
    texts = []
    for optimizer in dict.fromkeys(arm.optimizer for arm in arms):
        chosen = [arm for arm in arms if arm.optimizer == optimizer]
        rates = sorted({rate for arm in chosen for rate in arm.results})
        lines = [[optimizer, *(f"{rate:g}" for rate in rates), "best", "mean train loss"]]
        for arm in chosen:
            cells = [
                f"{fmean(arm.top1(rate)):.1f}" if rate in arm.results else "–" for rate in rates
            ]
            lines.append([arm.name, *cells, spread(arm.top1(arm.best)), spread(arm.losses(), 3)])
        texts.append(lines_of(lines))
    return "\n".join(texts)


def spread(values: list[float], digits: int = 1) -> str:
    """Return the mean and the deviation over seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def picture(arms: list[Arm]) -> Figure:
    """Return top1 against the rate, a panel for each optimizer, of arms with several rates."""
    arms = [arm for arm in arms if len(arm.results) > 1]
    names = list(dict.fromkeys(arm.name for arm in arms))
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    optimizers = list(dict.fromkeys(arm.optimizer for arm in arms))
    figure, axes = plt.subplots(
        1, len(optimizers), figsize=(5.5 * len(optimizers), 4), sharey=True, squeeze=False
    )
    for axis, optimizer in zip(axes[0], optimizers, strict=True):
        for arm in arms:
            if arm.optimizer == optimizer:
                draw(arm, axis, colors[arm.name])
        axis.set_title(optimizer)
        axis.set_xlabel("learning rate of the factors")
    axes[0][0].set_ylabel("top1 of held-out images, %")
    axes[0][0].legend()
    figure.tight_layout()
    return figure


def draw(arm: Arm, axis: Axes, color: str) -> None:
    """Draw the mean over seeds, and a bar from the lowest to the highest."""
    top1 = [arm.top1(rate) for rate in arm.results]
    means = list(map(fmean, top1))
    below = [mean - min(seeds) for mean, seeds in zip(means, top1, strict=True)]
    above = [max(seeds) - mean for mean, seeds in zip(means, top1, strict=True)]
    dashed = "--" if ", " in arm.name else "-"
    look = {"color": color, "linestyle": dashed, "capsize": 3}
    axis.errorbar(list(arm.results), means, [below, above], label=arm.name, **look)
    axis.set_xscale("log")


if __name__ == "__main__":
    main()
