"""The page of a report on data: one HTML file with pictures of the pairs that were found."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from switchlora.analysis.data_findings import Match, Place, Relations, called
from switchlora.analysis.page.colors import PAGE
from switchlora.analysis.page.page import templates
from switchlora.names import counted

TEMPLATE = "data_page.html"
NOTHING = "Nothing was found that a training should wait for."
SHOWN = 24
"""pairs of two splits whose pictures are shown"""
LEAST, MOST = 96, 160
"""pixels of the longer side of a picture"""
NAMES = 12
"""names of odd images that are shown"""
CLASSES = 60
"""classes whose bars are shown"""


def page_of(report: Mapping[str, Any], matches: Relations) -> str:
    """Return the page of a report; ``matches`` are the pairs whose pictures it shows."""
    classes = report["balance"]["classes"] if "balance" in report else []
    pictures = [
        {
            "title": title(split, inside, len(found)),
            "count": len(found),
            "pairs": pairs(found, classes),
        }
        for (split, inside), found in matches.items()
    ]
    found = counted(len(report["findings"]), "finding")
    template = templates(Path(__file__).parent).get_template(TEMPLATE)
    return template.render(
        title=f"Data: {report['data']}",
        sentence=f"{found}." if report["findings"] else NOTHING,
        report=report,
        pictures=pictures,
        bars=bars(report["balance"]) if "balance" in report else [],
        names=NAMES,
        shown=SHOWN,
        hidden=max(0, len(classes) - CLASSES),
        page_colors=PAGE,
    )


def title(split: str, inside: str, count: int) -> str:
    """Return the heading of the pairs of two splits."""
    if split == inside:
        return f"{counted(count, 'image')} of {split} that it has more than once"
    return (
        f"{counted(count, f'{split} image')} that {'is' if count == 1 else 'are'} in {inside} too"
    )


def pairs(found: Sequence[Match], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return pictures and names of some pairs, the least alike last."""
    return [
        {
            "sides": [side(match.one, classes), side(match.other, classes)],
            "alike": "the same pixels" if match.alike == 1 else f"correlation {match.alike:.4f}",
            "labels": match.one.label != match.other.label,
        }
        for match in spread(found)
    ]


def spread(found: Sequence[Match]) -> list[Match]:
    """Return up to ``SHOWN`` pairs: at most half of them of equal images, if there are others."""
    near = [match for match in found if match.alike < 1]
    same = [match for match in found if match.alike == 1]
    kept = max(SHOWN // 2, SHOWN - len(near))
    return [*same[:kept], *near][:SHOWN]


def side(place: Place, classes: Sequence[str]) -> dict[str, str]:
    """Return picture, name and class of an image."""
    where = int(place.survey.places[place.item])
    image, _ = place.survey.split.read_once(where)
    return {
        "picture": data_uri(image),
        "name": place.name,
        "class": called(place.label, classes),
    }


def data_uri(image: Image.Image | np.ndarray) -> str:
    """Return an image as PNG inside of a page, neither tiny nor large."""
    picture = as_rgb(image)
    longer = max(picture.size)
    if longer < LEAST:
        times = -(-LEAST // longer)
        size = (picture.width * times, picture.height * times)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    picture.thumbnail((MOST, MOST))
    file = BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """Return an image of any mode, or pixels (H, W) or (H, W, C), as one that pages show."""
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] != 3 else image
        image = Image.fromarray(pixels)
    return image.convert("RGB")


def bars(balance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return, by class, its number of images in each split and its share of the largest one."""
    largest = {split: max(1, *counts) for split, counts in balance["counts"].items()}
    found = []
    for label, name in enumerate(balance["classes"][:CLASSES]):
        cells = [
            (counts[label], round(100 * counts[label] / largest[split], 1))
            for split, counts in balance["counts"].items()
        ]
        found.append({"name": name, "cells": cells})
    return found
