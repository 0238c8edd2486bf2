"""Columns of what accuracy hides, for runs of which ``switchlora-runs card`` made a card."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from switchlora.analysis.tables.columns import ACCURACY, Column
from switchlora.analysis.tables.rows import Row
from switchlora.errors import ODD, is_number
from switchlora.storage import FileDamaged, Record, content_of, parse_json

CARD = Path("card/card.json")
MEANING = (
    "From the runs' cards: calibration error, expected, over 15 bins of confidence; corruption "
    "error, on corrupted test images, averaged over kinds and five severities; churn, the share "
    "of predictions that differ from those of the runs that the card compares with."
)
Card = Mapping[str, Any]


def ece(card: Card) -> float:
    """Return the expected calibration error before a temperature, in %."""
    return card["calibration"]["before"]["ece"]["value"]


def corruption_error(card: Card) -> float:
    """Return the mean error on corrupted images, in %."""
    return card["robustness"]["mean"]["value"]


def churn(card: Card) -> float:
    """Return the mean churn beside the runs compared with, in %."""
    return fmean(each["churn"]["value"] for each in card["against"])


TOLD: tuple[tuple[str, str, Callable[[Card], float]], ...] = (
    ("ece", "calibration error", ece),
    ("corruption_error", "corruption error", corruption_error),
    ("churn", "churn", churn),
)
"""key, title and number of each column"""


def card_columns(rows: Sequence[Row], preset: str) -> tuple[list[Column], list[str]]:
    """Return the columns that the cards of the runs fill, and notes on them.

    The table of the preset 'prelora' has no room for them.
    """
    if preset == "prelora":
        return [], []
    cards, notes = read_cards([record for row in rows for record in row.records])
    part = ACCURACY if preset == "default" else ""
    columns = []
    for key, title, number in TOLD:
        values = {folder: value for folder, value in numbers_in(cards, number)}
        if values:
            columns.append(Column(key, title, "%", reader(values), 2, part))
    return columns, [*([MEANING] if columns else []), *notes]


def read_cards(records: Sequence[Record]) -> tuple[dict[Path, Card], list[str]]:
    """Return the cards by the folders of their runs, and a note for each that is damaged."""
    cards: dict[Path, Card] = {}
    notes = []
    for record in records:
        path = record.folder / CARD
        if not path.is_file():
            continue
        try:
            cards[record.folder] = parse_json(content_of(path), path)
        except FileDamaged as error:
            notes.append(f"{error}: make it anew by switchlora-runs card {record.folder}.")
    return cards, notes


def numbers_in(
    cards: Mapping[Path, Card], number: Callable[[Card], float]
) -> list[tuple[Path, float]]:
    """Return the folder and the number of each card that has it."""
    found = []
    for folder, card in cards.items():
        try:
            value = number(card)
        except (*ODD, ValueError):  # left out of the card, or a card of another version
            continue
        if is_number(value):
            found.append((folder, value))
    return found


def reader(values: Mapping[Path, float]) -> Callable[[Record], float | None]:
    """Return a function that reads the number of a run."""
    return lambda record: values.get(record.folder)
