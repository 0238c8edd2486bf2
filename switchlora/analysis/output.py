"""Write figures as PNG, PDF or SVG: the one place where pictures become files."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
"""what is left out of a file, so that the same figure gives the same bytes"""
SVG_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "switchlora"}


def save(
    figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("png",), dpi: int = 150
) -> list[Path]:
    """Write a figure into ``folder`` in each of the ``formats``, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(SVG_STYLE):
        for ending in formats:
            path = folder / f"{name}.{ending}"
            figure.savefig(path, dpi=dpi, metadata=METADATA.get(ending))
            paths.append(path)
    return paths


def add_formats(parser: argparse.ArgumentParser, default: str = "png") -> None:
    """Add the option ``--formats`` to the command line of a program that draws."""
    parser.add_argument(
        "--formats",
        type=formats_of,
        default=formats_of(default),
        metavar="png,pdf,svg",
        help=f"the kinds of picture files; default: {default}",
    )


def formats_of(words: str) -> tuple[str, ...]:
    """Return the formats in a list with commas; ArgumentTypeError for an unknown one."""
    formats = tuple(word.strip().lower().lstrip(".") for word in words.split(","))
    for ending in formats:
        if ending not in FORMATS:
            known = ", ".join(FORMATS)
            raise argparse.ArgumentTypeError(f"'{ending}' is no kind of picture: {known}")
    return formats
