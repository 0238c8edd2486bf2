"""Signals of the full phase are read at the switch and ranked by what the switch cost."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import signals
import study

from runs import make_run
from switchlora.storage import read_record

WORDS = ("monitor.window=5", "monitor.exact=true", "switch/criterion=at_epoch", "max_updates=20")
WORDS += ("switch/rank=fixed", "switch.rank.rank=4")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Full training, and a switch after 10 and after 15 updates."""
    folder = tmp_path_factory.mktemp("sweep")
    for epoch in (99, 0.5, 0.75):
        make_run(folder / str(epoch), *WORDS, f"switch.criterion.epoch={epoch}")
    return folder


def test_each_switch_has_its_cost_and_what_was_known_before_it(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["signals", str(sweep), "--out", str(tmp_path)])
    signals.main()
    with (tmp_path / "signals.csv").open() as file:
        first, second = csv.DictReader(file)
    assert [row["update"] for row in (first, second)] == ["10", "15"]
    full, early = (study.held_out(read_record(sweep / name)) for name in ("99", "0.5"))
    assert float(first["cost"]) == pytest.approx(full - early)
    for row in (first, second):
        assert 0 < float(row["lost_energy"]) < 1 and 0 < float(row["update_norm"]) <= 1
    table = (tmp_path / "signals.md").read_text()
    assert all(f"| {signal.__name__} |" in table for signal in signals.SIGNALS)
