"""A card as Markdown, and as one HTML page that needs no other file."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from switchlora.analysis.card.pictures import Panels, corruption_panels, reliability_panels
from switchlora.analysis.card.sections import SHOWN_MATRIX, percent, sections, sentence
from switchlora.analysis.formats import markdown
from switchlora.analysis.page import page as report
from switchlora.analysis.page.colors import PAGE
from switchlora.analysis.page.headline import Tile

TEMPLATE = "card_page.html"
LEGENDS = {
    "calibration": "Accuracy over confidence: a dot for each bin, larger with more predictions; "
    "on the line both are equal.",
    "robustness": "Error in % over severity: this model in blue, the runs compared with in "
    "dashes, the grey line for clean images.",
}
"""by section, what its pictures show"""
Found = Mapping[str, Any]


def as_markdown(card: Found) -> str:
    """Return the card as Markdown."""
    parts = [f"# Card of {card['model']['name']}", headline(card)]
    for section in sections(card):
        parts += [f"## {section.title}", *section.sentences, *map(markdown, section.tables)]
    return "\n\n".join(parts) + "\n"


def as_html(card: Found) -> str:
    """Return the card as a page."""
    here = Path(__file__).parent
    template = report.templates(here, Path(report.__file__).parent).get_template(TEMPLATE)
    return template.render(
        title=f"Card of {card['model']['name']}",
        sentence=headline(card),
        regression=card["verdict"]["regression"],
        tiles=tiles(card),
        page_colors=PAGE,
        sections=sections(card),
        panels=panels(card),
        legends=LEGENDS,
        matrix=shades(card),
    )


def headline(card: Found) -> str:
    """Return the verdict, or the accuracy where nothing is compared."""
    if card["verdict"]["regression"] is None:
        count = f"{card['images']:,} {card['inputs']}"
        return f"top1 {percent(card['accuracy']['top1'])} on {count}."
    return sentence(card["verdict"]["sentence"])


def tiles(card: Found) -> list[Tile]:
    """Return the numbers that are shown large."""
    accuracy, calibration = card["accuracy"], card["calibration"]
    found = [Tile(f"{accuracy['top1']['value']:.2f} %", "top1 on test")]
    if "worst" in accuracy:
        worst = accuracy["worst"][0]
        found.append(Tile(f"{worst['accuracy']['value']:.1f} %", f"worst class, {worst['class']}"))
    if card["against"]:
        churn = fmean(each["churn"]["value"] for each in card["against"])
        found.append(Tile(f"{churn:.1f} %", "churn: predictions that differ"))
    found.append(Tile(f"{calibration['before']['ece']['value']:.1f} %", "calibration error"))
    if "mean" in card["robustness"]:
        error = card["robustness"]["mean"]["value"]
        found.append(Tile(f"{error:.1f} %", "error on corrupted images"))
    return found


def panels(card: Found) -> dict[str, Panels]:
    """Return the pictures by the key of their section."""
    found = {"calibration": reliability_panels(card["calibration"])}
    if "corruptions" in card["robustness"]:
        found["robustness"] = corruption_panels(card["robustness"])
    return found


def shades(card: Found) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return the rows of the matrix of confusions: class, then counts with their shade in %.

    Nothing for many classes.
    """
    matrix = card["accuracy"].get("confusion", {}).get("matrix")
    if matrix is None or len(matrix) > SHOWN_MATRIX:
        return []
    rows = []
    for name, counts in zip(card["data"]["classes"], matrix, strict=True):
        most = max(1, sum(counts))
        rows.append((name, [(count, round(70 * count / most)) for count in counts]))
    return rows
