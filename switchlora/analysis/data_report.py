"""Report on data before training: ``switchlora-runs data [data=NAME data.KEY=VALUE ...] | RUN``.

It looks for images that are there more than once, pixel for pixel or nearly, within and between
splits, for the same image under two labels, files that cannot be read or are odd, classes that are
missing or uneven, and for a shift between train and test. With text it looks for passages. Without
words the report is on the data that a run has by default. With RUN it is on those of that run.
"""

import argparse
import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from switchlora.analysis.data_findings import (
    Images,
    Relations,
    Report,
    image_report,
    relations_of,
    some,
    text_report,
)
from switchlora.analysis.evaluate import changed
from switchlora.analysis.formats import markdown
from switchlora.config import (
    TARGET,
    Config,
    as_plain,
    build,
    build_saved,
    check_saved,
    folder_of,
    names_in_yamls,
)
from switchlora.data import build_splits, classes_of, hashed, survey
from switchlora.process import USER_ERRORS, check_keys, checked, one_line
from switchlora.storage import output_folder, read_record, write_whole

IMAGES, TEXT = "switchlora.data.build_data", "switchlora.data.build_text"
BASE = "reported_data"
DEFAULT = "data=fashion_mnist"
FILES = {"json": "data.json", "md": "data.md", "html": "data.html"}
ROWS = 20
"""classes and pairs that the table shows; data.json has all"""


def main() -> None:
    """Report on what the command line names. Exit with one line on a mistake in it."""
    options = parse(sys.argv[1:])
    try:
        report, matches = report_on(options.words, options.config_dir, options.allow)
        if options.output is not None:
            for path in write(report, matches, options.output):
                print(f"wrote {path}", file=sys.stderr)
    except USER_ERRORS as error:
        sys.exit(f"data: {one_line(error)}")
    print(json.dumps(report, indent=2) if options.json else as_markdown(report))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="data=NAME, data.KEY=VALUE, or the folder of a run",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="FOLDER",
        help="write data.html, data.md and data.json there",
    )
    parser.add_argument("--config-dir", type=Path, help="a folder with yamls of your own")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="your class that a run names"
    )
    return parser.parse_intermixed_args(words)


def report_on(
    words: Sequence[str], config_dir: Path | None = None, allow: Collection[str] = ()
) -> tuple[Report, Relations]:
    """Return the report on the data that ``words`` name, and the pairs of images that it found.

    ValueError for a mistake in the words, and for data that cannot be read at all.
    """
    start = time.monotonic()
    if config_dir is not None and not config_dir.is_dir():
        raise ValueError(f"--config-dir {config_dir} is no folder")
    allowed = {*allow, *(names_in_yamls(config_dir) if config_dir else ())}
    runs = [word for word in words if "=" not in word]
    settings = [word for word in words if "=" in word]
    if len(runs) > 1:
        raise ValueError(f"give one run, or data=NAME; not {' and '.join(runs)}")
    data = data_of(runs[0] if runs else None, settings, config_dir, allowed)
    matches: Relations = {}
    if data.get(TARGET) == TEXT:
        report = text_report(build(data))
    else:
        report, matches = report_on_images(data, allowed if runs else None)
    named = " ".join(words) or DEFAULT
    return {"data": named, **report, "seconds": round(time.monotonic() - start, 1)}, matches


def report_on_images(data: Config, allow: Collection[str] | None) -> tuple[Report, Relations]:
    """Return the report on data of images; ``allow`` what a saved configuration may build."""
    if data.get(TARGET) != IMAGES:
        raise ValueError(
            f"data are built by {data.get(TARGET)}: the report reads those of {IMAGES} and {TEXT}"
        )
    parts = {}
    for name in ("train", "test"):
        if not data.get(name):
            raise ValueError(f"data.{name} is missing: the report compares train and test")
        section = data[name]
        parts[name] = (
            build(section) if allow is None else build_saved(section, f"data.{name}", allow)
        )
    keys = {key: value for key, value in data.items() if key not in (TARGET, "train", "test")}
    splits = build_splits(parts["train"], parts["test"], **keys)
    surveys = [survey(split) for split in splits]
    in_memory = data.get("train_transform") is None and data.get("eval_transform") is None
    contents = [hashed(each, in_memory) for each in surveys]
    images = Images(surveys)
    found = images.duplicates()
    matches = relations_of(images, found)
    classes = classes_of(parts["train"])
    return image_report(surveys, contents, classes, matches, found.whole), matches


def data_of(
    run: str | None, words: Sequence[str], config_dir: Path | None, allow: Collection[str]
) -> Config:
    """Return the configuration of the data of a run, or that which the words choose."""
    for word in words:
        if not word.lstrip("+").startswith(("data=", "data.")):
            raise ValueError(f"{word}: write data=NAME or data.KEY=VALUE, or the folder of a run")
    places = ["--config-dir", str(config_dir)] if config_dir else []
    words = checked([*places, *words])[len(places) :]
    if run is None:
        return chosen(words, config_dir)
    if any(word.startswith("data=") for word in words):
        raise ValueError(f"give {run} or data=NAME, not both")
    own = saved_data(Path(run), allow)
    data = changed(own, words)
    check_keys({"data": data}, "")
    return data


def saved_data(run: Path, allow: Collection[str]) -> Config:
    """Return the configuration of the data of a run; ValueError if there is none."""
    if not run.is_dir():
        raise ValueError(f"{run} is no folder: give the folder of a run, or data=NAME")
    own = read_record(run).config.get("data")
    if not isinstance(own, Mapping):
        raise ValueError(f"{run} does not say which data it has: give data=NAME")
    check_saved(own, "data", allow)
    return own


def chosen(words: Sequence[str], config_dir: Path | None) -> Config:
    """Return the data that the words choose; how many classes they have need not be known."""
    choice = [DEFAULT, *(word for word in words if word.startswith("data="))][-1]
    changes = [word for word in words if not word.startswith("data=")]
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    with initialize_config_dir(str(folder_of("conf")), version_base="1.3"):
        base = {"defaults": [{"data": choice.removeprefix("data=")}, "_self_"]}
        ConfigStore.instance().store(BASE, base)
        config: DictConfig = compose(BASE, overrides=[*changes, *search])
    unknown = OmegaConf.is_missing(config.data, "num_classes")
    if unknown:
        config.data.num_classes = 1
    data: dict[str, Any] = as_plain(config)["data"]
    check_keys({"data": data}, "")
    return {**data, "num_classes": None} if unknown else data


def write(report: Report, matches: Relations, folder: Path) -> list[Path]:
    """Write the report as JSON, Markdown and a page, and return the paths."""
    from switchlora.analysis.page.data_page import page_of  # jinja: only where it is written

    texts = {
        "json": json.dumps(report, indent=2) + "\n",
        "md": as_markdown(report) + "\n",
        "html": page_of(report, matches),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, text in texts.items():
        path = folder / FILES[kind]
        write_whole(path, text)
        paths.append(path)
    return paths


def as_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    parts = [f"# Data: {report['data']}", verdict(report), sizes_table(report)]
    if report["findings"]:
        parts.append("\n".join(f"- {line}" for line in report["findings"]))
    if report["unit"] == "images":
        parts += ["## Classes", class_table(report), *class_note(report)]
        parts.append("## Shift from train to test")
        parts += [shift_table(report), *shift_note(report)]
    if report["duplicates"]:
        parts += ["## Found more than once", pairs_table(report)]
    return "\n\n".join(parts)


def verdict(report: Report) -> str:
    """Return one sentence on the whole report."""
    count = len(report["findings"])
    return {
        0: "Nothing was found that a training should wait for.",
        1: "One finding.",
    }.get(count, f"{count} findings.")


def sizes_table(report: Report) -> str:
    """Return sizes and hashes of the splits as a table."""
    rows = [["split", report["unit"], "sha256", "of"]]
    for split, size in report["sizes"].items():
        rows.append([split, f"{size:,}", report["sha256"][split][:16], report["sha256_of"][split]])
    return markdown(rows)


def class_table(report: Report) -> str:
    """Return the number of images of each class and split; those of few classes if many."""
    balance = report["balance"]
    rows = [["class", *balance["counts"]]]
    for label, name in enumerate(balance["classes"][:ROWS]):
        rows.append([name, *(f"{counts[label]:,}" for counts in balance["counts"].values())])
    rows.append(["largest / smallest", *(f"{each:.2f}" for each in balance["ratio"].values())])
    if len(balance["classes"]) > ROWS:
        rows.insert(-1, [f"... {len(balance['classes']) - ROWS:,} more", "", "", ""])
    return markdown(rows)


def class_note(report: Report) -> list[str]:
    """Return a sentence on what the table of the classes leaves out, if it does."""
    return ["Images that cannot be read are not counted."] if report["unreadable"] else []


def shift_table(report: Report) -> str:
    """Return how statistics of images differ between train and test, as a table."""
    rows = [["statistic", "train", "test", "effect, deviations", "p"]]
    for each in report["shift"]["statistics"]:
        rows.append(
            [
                each["statistic"],
                f"{each['first']:.4f}",
                f"{each['second']:.4f}",
                f"{each['effect']:+.3f}",
                f"{each['p_value']:.2g}",
            ]
        )
    return markdown(rows)


def shift_note(report: Report) -> list[str]:
    """Return a sentence on how well a classifier tells test images from train images."""
    told = report["shift"]["two_sample"]
    if told is None:
        return ["There are too few images for a classifier to tell train from test."]
    return [
        f"A classifier ({told['classifier']}) tells test from train images in "
        f"{told['accuracy']:.1%} of {told['images']:,} cases it has not seen; 50 % is chance, "
        f"p = {told['p_value']:.2g}."
    ]


def pairs_table(report: Report) -> str:
    """Return how much of each split stands in which, with a few pairs, as a table."""
    rows = [["split", "in", "pixel for pixel", "nearly", "such as"]]
    for each in report["duplicates"]:
        named = [f"{pair['one']} = {pair['other']}" for pair in each["pairs"]]
        near = f"{each['near']:,}" if "near" in each else ""
        rows.append([each["split"], each["inside"], f"{each['exact']:,}", near, some(named)])
    return markdown(rows)
