"""What a method changes besides accuracy, over seeds: ``switchlora-runs cards FOLDERS...``.

Reads every ``card.json`` in the folders. A column is a method. Differences are to full training of
the same seed (``--full`` names it); their interval is Student's over the seeds.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from switchlora.analysis.formats import markdown
from switchlora.analysis.tables.columns import Cell, Column
from switchlora.analysis.tables.formats import MISSING, shown
from switchlora.errors import ODD
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import content_of, parse_json

FULL = "full"
Card = Mapping[str, Any]


class Measure(NamedTuple):
    """One row of the table."""

    title: str
    number: Callable[[Card], float]
    digits: int = 1
    beside: str | None = None
    """the unit of its difference to full training; None where it is a comparison already"""


MEASURES = (
    Measure("top1, %", lambda card: card["accuracy"]["top1"]["value"], 2, "points"),
    Measure("worst class, %", lambda card: worst_class(card), 1, "points"),
    Measure("churn to full training of the same seed, %", lambda card: churn(card, True)),
    Measure("churn to full training of other seeds, %", lambda card: churn(card, False)),
    Measure("calibration error, %", lambda card: ece(card, "before"), 2, "points"),
    Measure("the same after a temperature, %", lambda card: ece(card, "after"), 2, "points"),
    Measure("NLL", lambda card: card["calibration"]["before"]["nll"]["value"], 3, "nats"),
    Measure("error on corrupted images, %", lambda card: corrupted(card), 1, "points"),
    Measure("mean corruption error, full = 100", lambda card: card["robustness"]["mce"]),
    Measure("AUROC, largest probability", lambda card: auroc(card, "max_softmax"), 3, ""),
    Measure("AUROC, energy", lambda card: auroc(card, "energy"), 3, ""),
)


def main() -> None:
    """Print the table. Exit with one line on a mistake in the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="holds cards")
    parser.add_argument("--full", default=FULL, metavar="METHOD", help=f"default: {FULL}")
    options = parser.parse_args()
    try:
        print(markdown(table_of(read_cards(options.folders), options.full)))
    except USER_ERRORS as error:
        sys.exit(f"cards: {one_line(error)}")


def read_cards(folders: Sequence[Path]) -> list[Card]:
    """Return the cards in folders. ValueError for a folder without any; FileDamaged names one."""
    cards: list[Card] = []
    for folder in folders:
        paths = sorted(folder.rglob("card.json"))
        if not paths:
            raise ValueError(f"{folder} holds no card.json: switchlora-runs card RUN makes one")
        cards += [parse_json(content_of(path), path) for path in paths]
    return cards


def table_of(cards: Sequence[Card], full: str = FULL) -> list[list[str]]:
    """Return the table, its header first. ValueError where no card is of full training."""
    methods: dict[str, list[Card]] = {}
    for card in cards:
        methods.setdefault(name_of(card), []).append(card)
    if full not in methods:
        raise ValueError(f"no card is of {full}: give --full, one of {', '.join(methods)}")
    names = sorted(methods, key=lambda name: name != full)
    references = {card["model"]["seed"]: card for card in methods[full]}
    rows = [["", *names]]
    for measure in MEASURES:
        rows.append([measure.title, *(mean(measure, methods[name]) for name in names)])
        if measure.beside is not None:
            changes = [change(measure, methods[name], references) for name in names[1:]]
            rows.append([f"– to full, {measure.beside}".rstrip(", "), MISSING, *changes])
    return [*rows, ["regression by its card", *(regressions(methods[name]) for name in names)]]


def name_of(card: Card) -> str:
    """Return the method of a card's run, or else the name of its model."""
    return str(card["model"].get("method") or card["model"]["name"])


def mean(measure: Measure, cards: Sequence[Card]) -> str:
    """Return the mean and the standard deviation over the seeds as text."""
    return told(measure, [number for _, number in pairs(measure, cards)], paired=False)


def change(measure: Measure, cards: Sequence[Card], references: Mapping[Any, Card]) -> str:
    """Return the mean change to full training of the same seed, and its interval, as text."""
    there = dict(pairs(measure, list(references.values())))
    found = [value - there[seed] for seed, value in pairs(measure, cards) if seed in there]
    return told(measure, found, paired=True)


def pairs(measure: Measure, cards: Sequence[Card]) -> list[tuple[Any, float]]:
    """Return the seed and the number of each card that has it."""
    found = []
    for card in cards:
        with suppress(*ODD, ValueError):  # left out of the card
            found.append((card["model"]["seed"], float(measure.number(card))))
    return found


def told(measure: Measure, values: Sequence[float], paired: bool) -> str:
    """Return numbers of several seeds as text, or a dash."""
    digits = (lambda value: f"{value:+.{measure.digits}f}") if paired else measure.digits
    column = Column("", "", "", lambda record: None, digits, paired=paired)
    return shown(Cell(tuple(values)) if values else None, column)


def regressions(cards: Sequence[Card]) -> str:
    """Return how many cards find a regression."""
    return f"{sum(card['verdict']['regression'] is True for card in cards)} of {len(cards)}"


def worst_class(card: Card) -> float:
    """Return the accuracy of the class that has the lowest, in %."""
    return card["accuracy"]["worst"][0]["accuracy"]["value"]


def churn(card: Card, same: bool) -> float:
    """Return the mean churn beside the runs of the same seed, or of other seeds, in %."""
    seed = card["model"]["seed"]
    found = [each for each in card["against"] if (each["seed"] == seed) is same]
    return fmean(each["churn"]["value"] for each in found)


def ece(card: Card, when: str) -> float:
    """Return the expected calibration error before or after a temperature, in %."""
    return card["calibration"][when]["ece"]["value"]


def corrupted(card: Card) -> float:
    """Return the mean error on corrupted images, in %."""
    return card["robustness"]["mean"]["value"]


def auroc(card: Card, score: str) -> float:
    """Return the area under the curve of telling other images by a score."""
    return card["ood"][score]["value"]
