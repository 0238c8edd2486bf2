"""Are new images like the known ones: ``switchlora-runs drift VERSION IMAGES``.

VERSION is a version of a registry. IMAGES is a folder of images in any nesting, or words as in
``switchlora-runs eval``, such as data=imagefolder data.root=FOLDER. No labels are read.

The exit status is 0 without drift, 2 with drift, and 1 when something is wrong.
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from switchlora.analysis.drift.picture import draw
from switchlora.analysis.drift.sample import MOST, SAMPLE, Sample, read_sample, sample_of
from switchlora.analysis.drift.statistics import Found, compared
from switchlora.analysis.evaluate import (
    add_loading_options,
    check_fits,
    data_of,
    opened,
    precision_of,
)
from switchlora.analysis.formats import markdown
from switchlora.analysis.output import save
from switchlora.data import Unlabelled, build_test
from switchlora.names import counted
from switchlora.process import USER_ERRORS, find_device, one_line
from switchlora.registry import check, is_version
from switchlora.storage import Saved, load_saved, output_folder, write_whole

LEVEL = 0.01
LEAST = 30
"""images of a sample"""
DRIFT = 2
"""exit status"""


def main() -> None:
    """Measure the drift of what the command line names. Exit with one line on a mistake in it."""
    options = parsed(sys.argv[1:])
    try:
        report = drift_of(
            *(options.version, options.images, options.level),
            *(options.config_dir, options.allow, options.device),
        )
        if options.output is not None:
            write(report, options.output)
    except USER_ERRORS as error:
        sys.exit(f"drift: {one_line(error)}")
    print(json.dumps(report.content(), indent=2) if options.json else report.text())
    sys.exit(DRIFT if report.found.drift else 0)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line; a mistake has exit status 1, as 2 means drift."""
    try:
        return parse(words)
    except SystemExit as stop:
        sys.exit(1 if stop.code else 0)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("version", type=Path, metavar="VERSION", help="folder of a version")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="a folder, or data=NAME; data.KEY=VALUE"
    )
    parser.add_argument(
        "--level", type=float, default=LEVEL, help=f"of a false alarm; default: {LEVEL}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="FOLDER",
        help="write drift.png and drift.json there",
    )
    add_loading_options(parser)
    return parser.parse_intermixed_args(words)


@dataclass(frozen=True)
class Report:
    """What was compared, and what was found."""

    version: str
    images: str
    known: Sample
    new: Sample
    found: Found
    skipped: tuple[str, ...]
    """images that could not be read"""

    def verdict(self) -> str:
        """Return what was found, in one line."""
        differing = [t.about for t in self.found.tests if t.adjusted <= self.found.level]
        least = min(test.adjusted for test in self.found.tests)
        sizes = f"{len(self.new)} images against {len(self.known)} of {self.known.split}"
        what = f"drift in {', '.join(differing)}" if differing else "no drift"
        return f"{what} at level {self.found.level:g} (smallest p {least:.2g}; {sizes})"

    def text(self) -> str:
        """Return a table of the questions, and the verdict."""
        rows = [["of", "statistic", "value", "p", "p, Holm", ""]]
        for test in self.found.tests:
            numbers = [f"{number:.3g}" for number in (test.value, test.p, test.adjusted)]
            rows.append([test.about, test.statistic, *numbers, test.detail])
        lines = [markdown(rows), ""]
        if self.skipped:
            lines.append(f"{len(self.skipped)} cannot be read and are left out: {self.skipped[0]}")
        return "\n".join([*lines, self.verdict()])

    def content(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "version": self.version,
            "images": self.images,
            "verdict": self.verdict(),
            "drift": self.found.drift,
            "level": self.found.level,
            "sizes": {"new": len(self.new), "known": len(self.known)},
            "split": self.known.split,
            "psi": self.found.psi,
            "tests": [asdict(test) for test in self.found.tests],
            "drifted_features": list(self.found.drifted),
            "skipped": list(self.skipped),
        }


def drift_of(
    version: Path,
    images: Sequence[str],
    level: float = LEVEL,
    config_dir: Path | None = None,
    allow: Collection[str] = (),
    device: str = "auto",
) -> Report:
    """Return how images differ from those that a version's model was validated on.

    ValueError for a mistake in the words, a version that is damaged or knows no images, and for
    too few images.
    """
    if not 0 < level < 1:
        raise ValueError(f"--level {level:g} is no probability: give one such as {LEVEL:g}")
    path = version / SAMPLE
    if not path.is_file():
        raise ValueError(f"{version} has no {SAMPLE}: give a version that knows its images")
    if is_version(version):
        check(version.resolve())
    known = read_sample(path)
    saved, loader = model_and_images(version, images, config_dir, allow, device)
    new = sample_of(saved.model, loader, precision_of(saved), "new")
    view: Any = loader.dataset
    where = " ".join(images)
    for sample, told in ((new, f"{where} has{left_out(view.skipped())}"), (known, f"{path} has")):
        if len(sample) < LEAST:
            raise ValueError(f"{told} {len(sample)} images: drift needs {LEAST} or more")
    found = compared(known, new, level)
    return Report(str(version), " ".join(images), known, new, found, tuple(view.skipped()))


def model_and_images(
    version: Path,
    images: Sequence[str],
    config_dir: Path | None,
    allow: Collection[str],
    device: str,
) -> tuple[Saved, DataLoader]:
    """Return the model of a version on its device, and the images to look at."""
    folder, words = folder_and_words(images)
    if folder is None:
        if not any(word.startswith("data.eval_size=") for word in words):
            words.append(f"data.eval_size={MOST}")
        found = opened(version, words, config_dir, allow, device)
        return found.saved, found.loader
    dataset = Unlabelled(folder)
    if len(dataset) < LEAST:
        raise ValueError(f"{folder} has {len(dataset)} images: drift needs {LEAST} or more")
    saved = load_saved(version, set(allow))
    data = data_of(saved, words, config_dir, allow)
    workers = (saved.config.get("system") or {}).get("workers", 0)
    given = {"test": dataset, "classes": (), "workers": workers}
    loader = build_test(**{**data, "eval_size": MOST, "skip_unreadable": True, **given})
    check_fits(saved.model.to(find_device("--device", device)), loader)
    return saved, loader


def left_out(skipped: Sequence[str]) -> str:
    """Return how many images the model cannot take, with one of them; nothing if it takes all."""
    if not skipped:
        return ""
    cannot = "cannot be read, or has colours that the model has no channels for"
    return f" {counted(len(skipped), 'image')} left out, such as {skipped[0]}, which {cannot}, and"


def folder_and_words(images: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the folder of images, if one is given, and the words on the data."""
    words = [word for word in images if "=" in word and not Path(word).exists()]
    folders = [word for word in images if word not in words]
    if len(folders) > 1:
        raise ValueError(f"{folders[1]} is one folder too many: give one, or words on the data")
    return (folders[0] if folders else None), words


def write(report: Report, folder: Path) -> None:
    """Write the picture and the numbers."""
    save(draw(report.known, report.new, report.found, report.verdict()), folder, "drift")
    write_whole(folder / "drift.json", json.dumps(report.content(), indent=2) + "\n")
