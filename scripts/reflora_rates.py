"""Compare adapters over learning rates: ``python scripts/reflora_rates.py RUNS --out FOLDER``.

A line of ``reflora_rates.md`` is a method with a start, under an optimizer. A column is a learning
rate of the factors, ``adapter.factor_lr`` times the rate of the weights. A cell is the mean over
seeds of top1 in %, on all images that were held out. The last columns are of the best rate: top1
and the mean loss of the run with their spread over seeds. ``reflora_rates.png`` draws top1 against
the rate, with the range of the seeds. ``reflora_rates.csv`` has a line for each run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rates import RATE
from study import compare, held_out, lines_of, settings, write_csv

from switchlora.analysis.output import save
from switchlora.analysis.tables.rows import settings_of
from switchlora.storage import Record

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


@dataclass(frozen=True)
class Place:
    """Where a run stands: its line, and its column."""

    optimizer: str
    name: str
    rate: float


def main() -> None:
    """Write and print the table; draw the picture."""
    compare(__doc__, read, write)


def read(record: Record) -> tuple[Place, Result] | None:
    """Return what a run reached, and where that stands."""
    factor_lr, lr, optimizer, init = settings(record, RATE, LR, "full.optimizer", "switch.init")
    if isinstance(factor_lr, str):
        raise ValueError(f"{record.folder} sets {RATE}={factor_lr}: give runs that set a number")
    if record.summary is None:
        return None
    name = name_of(record.config["method"], init, settings_of(record.config))
    return Place(str(optimizer), name, float(f"{factor_lr * lr:.3g}")), result_of(record)


def write(runs: list[tuple[Place, Result]], folder: Path) -> None:
    """Write and print the table; draw the picture."""
    arms = arms_of(runs)
    text = table(arms)
    save(picture(arms), folder, "reflora_rates")
    (folder / "reflora_rates.md").write_text(text, encoding="utf-8")
    write_csv(folder / "reflora_rates.csv", list(rows_of(arms)))
    print(text)


def rows_of(arms: list[Arm]) -> Iterator[dict[str, object]]:
    """Yield a line for each run."""
    for arm in arms:
        for rate, results in arm.results.items():
            for found in results:
                yield {
                    "optimizer": arm.optimizer,
                    "arm": arm.name,
                    "rate": rate,
                    "seed": found.seed,
                    "top1": f"{found.top1:.2f}",
                    "mean train loss": "" if isnan(found.loss) else f"{found.loss:.4f}",
                }


def arms_of(runs: list[tuple[Place, Result]]) -> list[Arm]:
    """Sort runs into arms."""
    found: dict[tuple[str, str], dict[float, list[Result]]] = {}
    for place, result in sorted(runs, key=lambda run: run[1].seed):
        arm = found.setdefault((place.optimizer, place.name), {})
        arm.setdefault(place.rate, []).append(result)
    return [Arm(*arm, dict(sorted(rates.items()))) for arm, rates in sorted(found.items())]


def name_of(method: str, init: str, config: Mapping[str, object]) -> str:
    """Return the method of a run, and what it sets in another way than the method's yaml."""
    words = [method]
    if init != DEFAULT_START:
        words.append(init)
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
