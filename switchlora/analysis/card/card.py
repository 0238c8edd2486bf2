"""Write a card of a saved model: ``switchlora-runs card RUN [data words] [--against RUN ...]``.

RUN is whatever ``switchlora-runs eval`` takes. The card tells accuracy with intervals, classes,
calibration, robustness, cost in use, and how the model differs from runs of full training on the
same images. It is written as ``card.json``, ``card.md`` and ``card.html`` into ``RUN/card``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchlora import __version__
from switchlora.analysis.card.accuracy import measure_accuracy
from switchlora.analysis.card.calibration import measure_calibration
from switchlora.analysis.card.ood import measure_ood
from switchlora.analysis.card.page import as_html, as_markdown
from switchlora.analysis.card.paired import compare, verdict
from switchlora.analysis.card.predictions import class_names
from switchlora.analysis.card.robustness import measure_robustness
from switchlora.analysis.card.sources import (
    Source,
    check_same_test,
    open_source,
    validation_of,
)
from switchlora.analysis.card.use import measure_use
from switchlora.analysis.evaluate import add_loading_options
from switchlora.analysis.figures import run_labels
from switchlora.config import names_in_yamls
from switchlora.errors import check_range
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import check_folder, is_run, name_of_data, read_record, warn, write_whole

FOLDER = "card"
OWN = "its own test split"
SAMPLE = 1000
"""images that are corrupted, unless told otherwise"""


def main() -> None:
    """Write the card that the command line asks for. Exit with one line on a mistake."""
    options = parse(sys.argv[1:])
    folder = options.output or default_output(options.path)
    try:
        check_folder(folder)
        card = make_card(options)
        written = write_card(card, folder)
    except USER_ERRORS as error:
        sys.exit(f"card: {one_line(error)}")
    if options.json:
        print(json.dumps(card, indent=2))
        return
    print(as_markdown(card))
    print(f"wrote {', '.join(map(str, written))}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, metavar="RUN", help="what holds the model")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="data=NAME or data.KEY=VALUE"
    )
    parser.add_argument(
        *("--against",),
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="runs of full training on the same data; with two their own churn is the yardstick",
    )
    parser.add_argument(
        *("--ood",), nargs="+", default=[], metavar="KEY=VALUE", help="data=NAME of other images"
    )
    parser.add_argument(
        "--robustness",
        type=int,
        default=SAMPLE,
        metavar="N",
        help=f"test images to corrupt; default: {SAMPLE}; 0 leaves it out",
    )
    parser.add_argument("--no-cost", action="store_true", help="no latency, compiler and ONNX")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN/card")
    add_loading_options(parser)
    return parser.parse_intermixed_args(words)


def make_card(options: argparse.Namespace) -> dict[str, Any]:
    """Return the card of a model. ValueError for a mistake in the options or the files."""
    check_range("--robustness", options.robustness, 0)
    check_against(options.against)
    source, against = open_all(options)
    names = class_names(source.classes, source.test.num_classes)
    return {
        **subject(source, options.overrides, names),
        **measured(source, against, options, names),
        **beside_others(source, against, names),
        "switchlora_version": __version__,
    }


def open_all(options: argparse.Namespace) -> tuple[Source, list[Source]]:
    """Return the model and those it is compared with; all were asked about the same images."""
    how = {key: getattr(options, key) for key in ("config_dir", "allow", "device")}
    source = open_source(options.path, options.overrides, how)
    against: list[Source] = []
    for path in options.against:
        other = open_source(path, options.overrides, how)
        for earlier in (source, *against):
            check_same_test(earlier, other)
        against.append(other)
    return source, against


def subject(source: Source, words: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Return what the card is about: the model, its weights, and what it was tested on."""
    return {
        "model": described(source),
        "source_sha256": source.sha256,
        "data": described_data(source, words, names),
        "images": source.test.units,
        "inputs": "images" if "image_size" in source.opened.data else "windows",
    }


def measured(
    source: Source, against: Sequence[Source], options: argparse.Namespace, names: Sequence[str]
) -> dict[str, Any]:
    """Return all that is measured. Words that may be wrong are read before what takes long."""
    places = options.config_dir
    allowed = {*options.allow, *(names_in_yamls(places) if places else ())}
    ood = measure_ood(source, against, options.ood, places, allowed)
    validation = validation_of(source, options.overrides, allowed)
    return {
        "accuracy": measure_accuracy(source.test, names),
        "calibration": measure_calibration(source.test, validation),
        "robustness": measure_robustness(source, against, options.robustness, warn),
        "ood": ood,
        "cost": measure_use(source, not options.no_cost, warn),
    }


def beside_others(
    source: Source, against: Sequence[Source], names: Sequence[str]
) -> dict[str, Any]:
    """Return the comparison with each of the other runs, and the verdict."""
    labels = run_labels([other.path for other in against])
    compared = []
    for label, other in zip(labels, against, strict=True):
        seed = other.opened.saved.config.get("seed")
        place = {"name": label, "path": str(other.path), "seed": seed}
        compared.append({**place, **compare(source.test, other.test, names)})
    tests = [other.test for other in against]
    said = verdict(source.test, tests, names, noun_of(against))
    return {"against": compared, "verdict": said}


def check_against(paths: Sequence[Path]) -> None:
    """Raise ValueError for a word about data that stands behind --against."""
    for path in paths:
        if "=" in str(path) and not path.exists():
            raise ValueError(f"--against {path} is no run: put words on the data right behind RUN")


def described(source: Source) -> dict[str, Any]:
    """Return what is known of a model and of the run that made it."""
    saved = source.opened.saved
    model = saved.config.get("model") or {}
    found: dict[str, Any] = {
        "path": str(source.path),
        "source": str(saved.source),
        "name": model.get("name") or type(saved.model).__name__,
        "adapted": saved.adapted,
        "method": saved.config.get("method"),
        "seed": saved.config.get("seed"),
    }
    if not is_run(source.path):
        return found
    summary = read_record(source.path).summary or {}
    switch = summary.get("switch") or {}
    return {
        **found,
        "status": summary.get("status"),
        "num_updates": summary.get("num_updates"),
        "switch_update": switch.get("num_updates"),
        "train_flops": (summary.get("cost") or {}).get("train_flops"),
        "git": (summary.get("environment") or {}).get("git"),
    }


def described_data(source: Source, words: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Return what the model was tested on."""
    view: Any = source.opened.loader.dataset
    return {
        "words": " ".join(words) or OWN,
        "name": name_of_data(source.opened.data),
        "classes": list(names),
        "digest": view.digest() if hasattr(view, "digest") else None,
    }


def noun_of(against: Sequence[Source]) -> str:
    """Return what the runs compared with are called."""
    adapted = any(other.opened.saved.adapted for other in against)
    return "the reference" if adapted else "full training"


def default_output(path: Path) -> Path:
    """Return where the card of a model goes: into its folder, or beside its file."""
    return (path if path.is_dir() else path.parent) / FOLDER


def write_card(card: dict[str, Any], folder: Path) -> list[Path]:
    """Write the three files, each whole or not at all, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "card.json": json.dumps(card, indent=2, allow_nan=False) + "\n",
        "card.md": as_markdown(card),
        "card.html": as_html(card),
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]
