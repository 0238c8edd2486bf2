"""The documentation: every key has its row, every page is reached, every link leads somewhere."""

import json
import re
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from conf_yamls import composed

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = sorted((DOCS / "results").glob("*.md"))
RECORDS = DOCS.parent / "experiments/README.md"
PAGES = [*sorted(DOCS.glob("*.md")), *RESULTS, RECORDS]
sys.path.insert(0, str(DOCS))
from reference import page  # noqa: E402


def keys_of(config, above=""):
    """Dotted names of all leaves of a config, interpolations unresolved."""
    for name in config:
        raw = OmegaConf.to_container(config, resolve=False)[name]
        if isinstance(raw, dict):
            yield from keys_of(config[name], f"{above}{name}.")
        else:
            yield f"{above}{name}"


@pytest.mark.parametrize(
    "words", [(), ("switch/rank=energy", "switch/guard=full", "data=cifar10")]
)
def test_the_reference_has_a_row_for_every_key(words):
    """A mapping that a yaml writes on one line, such as ``data.train``, has one row."""
    told = set(re.findall(r"^\| `([\w.]+)`", page(), re.M))
    config = composed(*words)
    assert isinstance(config, DictConfig)
    missing = {key for key in keys_of(config) if not {key, key.rpartition(".")[0]} & told}
    assert not missing


def test_the_committed_reference_is_that_of_the_yamls():
    """After a change of a yaml: ``python docs/reference.py``."""
    assert page() == (DOCS / "configuration.md").read_text()


def test_the_reference_explains_the_keys_of_a_plain_run():
    silent = set(re.findall(r"^\| `([\w.]+)` \| .* \| .* \|  \|$", page(), re.M))
    ours = {
        key for key in keys_of(composed()) if not re.search(r"_target_|_partial_|\.path$", key)
    }
    assert len(silent & ours) <= 5, sorted(silent & ours)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        place, _, _ = link.partition("#")
        known = link.startswith(("http", "#", "mailto:"))
        assert known or (path.parent / place).exists(), link


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_begins_with_how_it_was_made(path):
    table = re.match(r"# .*\n\n((?:\|.*\n)+)", path.read_text())
    assert table
    rows = re.findall(r"^\| (\w+) \| \S", table[1], re.M)
    assert rows == ["Date", "Command", "Commit", "Hardware", "Seeds", "Files"]


def test_the_overview_has_every_result_with_its_date():
    overview = (DOCS / "results.md").read_text()
    told = dict(re.findall(r"^- \[.*\]\((.*)\), ([\d-]+)\.$", overview, re.M))
    made = {f"results/{path.name}": path.read_text().split("|", 3)[2].strip() for path in RESULTS}
    assert told == made


DEMO = DOCS.parent / "experiments/demo"
DEMO_RUNS = {
    "switched by its criterion": "switched",
    "full training (`switch/criterion=never`)": "never",
    "full training of 0.85 of the updates": "short",
}


@pytest.mark.parametrize("path", ["first_run.md", "results/demo.md"])
def test_what_a_page_says_of_the_demo_is_what_its_records_say(path):
    full = json.loads((DEMO / "never.json").read_text())["cost"]["train_flops"]
    rows = (DOCS / path).read_text().splitlines()
    told = [row.split(" | ") for row in rows if row.count(" % |") == 3]
    assert len(told) == len(DEMO_RUNS)
    for name, flops, test, val, share in told:
        run = json.loads((DEMO / f"{DEMO_RUNS[name.removeprefix('| ')]}.json").read_text())
        assert flops == f"{run['cost']['train_flops'] / full:.2f}"
        assert test == f"{run['test']['top1']:.2f} %"
        assert val == f"{run['val']['top1']:.2f} %"
        switch = run["switch"]
        trained = switch["trainable_after"] / switch["trainable_before"] if switch["fired"] else 1
        assert share == f"{100 * trained:.0f} % |"


@pytest.mark.parametrize("path", ["../README.md", "first_run.md"])
def test_the_lines_of_the_demo_are_those_of_its_record(path):
    run = json.loads((DEMO / "switched.json").read_text())
    text = (DOCS / path).read_text()
    switch = run["switch"]
    before, after = switch["trainable_before"], switch["trainable_after"]
    assert f"{before:,} -> {after:,} ({after / before:.1%} of" in text
    assert switch["reason"] in text
    for family in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        ranks = [switch["ranks"][f"blocks.{block}.{family}"] for block in range(4)]
        assert re.search(rf"^  ranks {family} +{' '.join(map(str, ranks))}$", text, re.M)
    tops = [run["phases"][phase]["val_top1"] for phase in ("full", "adapter")]
    assert re.search(r"last val top1, % +{:.2f} +{:.2f}\n".format(*tops), text)
