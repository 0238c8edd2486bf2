"""Publish a run in a registry: ``switchlora-runs publish RUN REGISTRY [--force REASON]``.

A version holds weights, adapter, card, configuration, checksums, and what drift is measured
against. A run whose card finds a regression is refused, unless there is a reason.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchlora.analysis.drift.sample import SAMPLE, Sample, reference_of, save_sample
from switchlora.analysis.evaluate import add_loading_options
from switchlora.analysis.versions.artifact import log_version, options_of
from switchlora.analysis.versions.options import add_change_options, check_force
from switchlora.process import USER_ERRORS, one_line
from switchlora.registry import CANDIDATE, PRODUCTION, publish
from switchlora.storage import (
    BEFORE,
    CONFIG,
    SUMMARY,
    FileDamaged,
    content_of,
    is_regular,
    load_saved,
    parse_json,
    read_record,
    sha256_of,
)

WEIGHTS = "model.safetensors"
FILES = (
    *(WEIGHTS, "model_ema.safetensors", BEFORE),
    *(CONFIG, SUMMARY, "config.json", "README.md"),
)
CARD, ADAPTER = "card", "adapter"
ALIAS = re.compile(r"(?!v\d)[a-z][a-z0-9_-]*")


def main() -> None:
    """Publish what the command line names. Exit with one line on a mistake in it."""
    options = parse(sys.argv[1:])
    try:
        lines = published(
            *(options.run, options.registry, options.alias, options.force, options.why),
            *(options.allow, options.device, options.wandb),
        )
    except USER_ERRORS as error:
        sys.exit(f"publish: {one_line(error)}")
    print("\n".join(lines))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run that has ended")
    parser.add_argument("registry", type=Path, metavar="REGISTRY", help="folder; made if need be")
    parser.add_argument("--alias", default=CANDIDATE, help=f"its alias; default: {CANDIDATE}")
    add_change_options(parser, "publish")
    add_loading_options(parser, words=False)
    return parser.parse_args(words)


def published(
    run: Path,
    registry: Path,
    alias: str = CANDIDATE,
    force: str | None = None,
    why: str | None = None,
    allow: Collection[str] = (),
    device: str = "auto",
    wandb: bool = False,
) -> list[str]:
    """Publish a run, with ``wandb`` also as an artifact there; return lines on what was done.

    ValueError for what holds no run that has ended, and for one with an objection to it that no
    reason overrules (``force``).
    """
    check_words(alias, force)
    summary = summary_of(run)
    if wandb:
        options_of(run)
    weights = sha256_of(run / WEIGHTS)
    card = read_card(run, weights)
    objection = objection_to(summary, card)
    if objection is not None and force is None:
        raise ValueError(f"{run} {objection}; --force REASON publishes it, and the reason is kept")
    reference = reference_or_reason(run, allow, device)
    about = {
        "run": str(run.resolve()),
        "weights_sha256": weights,
        "data": summary.get("data"),
        "val": summary["val"],
        "test": summary.get("test"),
        "verdict": card.verdict if card else None,
        "objection": objection,
        "reference": told_of(reference),
    }
    copies = [name for name in FILES if (run / name).exists()]
    folders = [ADAPTER, *([CARD] if card is not None and card.fits else [])]

    def fill(folder: Path) -> None:
        copy(run, folder, copies, folders)
        if sha256_of(folder / WEIGHTS) != weights:
            raise ValueError(f"{run / WEIGHTS} was changed while it was published: try again")
        if isinstance(reference, Sample):
            save_sample(reference, folder / SAMPLE)

    version = publish(registry, fill, about, alias, force or why, objection)
    lines = [f"{version} is published in {registry} as {alias}"]
    if objection is not None:
        lines.append(f"it {objection}; overruled: {force}")
    if card is None:
        lines.append(f"no card was made of it: switchlora-runs card {run} makes one")
    lines.append(told_of(reference))
    return [*lines, log_version(registry, version, alias, run)] if wandb else lines


def check_words(alias: str, force: str | None) -> None:
    """Raise ValueError for an alias that can be none, and for a reason without words."""
    if alias == PRODUCTION:
        raise ValueError(
            f"--alias {alias}: publish it first, switchlora-runs promote does the rest"
        )
    if not ALIAS.fullmatch(alias):
        raise ValueError(
            f"--alias {alias}: give small letters, digits, - and _, such as {CANDIDATE}"
        )
    check_force(force)


def summary_of(run: Path) -> Mapping[str, Any]:
    """Return the summary of a run that can be published; ValueError for any other."""
    record = read_record(run)
    if record.summary is None:
        raise ValueError(f"{run} has no {SUMMARY}: only a run that has ended can be published")
    if not is_regular(run / WEIGHTS):
        raise ValueError(f"{run} has no {WEIGHTS}: there is no model to publish")
    return record.summary


@dataclass(frozen=True)
class Card:
    """What the card of a run says."""

    verdict: Mapping[str, Any]
    fits: bool
    """whether it is of the run's weights"""


def read_card(run: Path, weights: str) -> Card | None:
    """Return the card of a run with these weights, None if it has none; FileDamaged if damaged."""
    path = run / CARD / "card.json"
    if not path.exists():
        return None
    found = parse_json(content_of(path), path)
    verdict = found.get("verdict")
    if not isinstance(verdict, dict) or verdict.get("regression", ...) not in (True, False, None):
        raise FileDamaged(f"{path} is damaged: it has no 'verdict' on a 'regression'")
    return Card(verdict, found.get("source_sha256") == weights)


def objection_to(summary: Mapping[str, Any], card: Card | None) -> str | None:
    """Return why a run should not be published, or None."""
    if summary["status"] != "finished":
        return f"is not finished: {summary['status']}"
    if card is None:
        return None
    if not card.fits:
        return "has a card of other weights: make it anew by switchlora-runs card"
    if card.verdict["regression"]:
        return f"has a regression by its card: {card.verdict.get('sentence')}"
    return None


def reference_or_reason(run: Path, allow: Collection[str], device: str) -> Sample | str:
    """Return what drift is measured against, or why there is nothing."""
    saved = load_saved(run, set(allow))
    try:
        return reference_of(saved, allow, device)
    except USER_ERRORS as error:
        return one_line(error)


def told_of(reference: Sample | str) -> str:
    """Return a line on what drift is measured against."""
    if isinstance(reference, Sample):
        return f"drift is measured against {len(reference)} images of {reference.split}"
    return f"drift cannot be measured against it: {reference}"


def copy(run: Path, folder: Path, files: Collection[str], folders: Collection[str]) -> None:
    """Copy files of a run, and those inside of its folders; ValueError for a link or a pipe."""
    names = list(files)
    for inside in folders:
        for path in sorted((run / inside).rglob("*")):
            if path.is_symlink() or not path.is_dir():
                names.append(path.relative_to(run).as_posix())
    for name in names:
        if not is_regular(run / name):
            raise ValueError(f"{run / name} is no plain file: put the file itself there")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, folder / name)
