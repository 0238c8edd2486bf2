"""Scripts that compare the runs of a study say in one line why a folder does not serve."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import quantise
import rates
import reflora_rates
import signals

from runs import make_run

EARLY = ("switch/criterion=at_epoch", "switch.criterion.epoch=0.5", "monitor.window=5")
SCRIPTS = {each.__name__: each for each in (quantise, rates, reflora_rates, signals)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A switched run with the rate that sets itself, and nothing beside it."""
    folder = tmp_path_factory.mktemp("sweep")
    make_run(folder / "alone", *EARLY, "max_updates=12")
    make_run(folder / "full", "switch/criterion=never", "seed=3", "max_updates=12")
    return folder


def said_by(name, folder, out, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(folder), "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[name].main()
    return str(stop.value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_without_runs_is_refused_in_one_line(name, tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "missing"):
        told = said_by(name, folder, tmp_path / "out", monkeypatch)
        assert told == f"{name}: {folder} is no run folder and holds none: give runs or a sweep"


@pytest.mark.parametrize(
    "name,of,told",
    [
        ("quantise", "full", "full did not switch: give runs that did"),
        ("quantise", "alone", "holds no trunk: give the folder of a sweep"),
        ("rates", "full", "full has no switch.criterion.epoch: give the runs of this study"),
        ("reflora_rates", "alone", "alone sets adapter.factor_lr=matched: give runs that set a"),
        ("signals", "alone", "alone needs full training with seed 0 beside it"),
        ("signals", "full", "give runs that switched at two dates or more, for each seed"),
    ],
)
def test_runs_of_something_else_are_refused_in_one_line(
    sweep, name, of, told, tmp_path, monkeypatch
):
    said = said_by(name, sweep / of, tmp_path / "out", monkeypatch)
    assert said.startswith(f"{name}: ") and told in said and "\n" not in said


def test_signals_are_not_read_from_runs_that_measured_no_directions(tmp_path, monkeypatch):
    words = ("monitor.window=5", "switch/criterion=at_epoch", "max_updates=20")
    for epoch in (99, 0.5, 0.75):
        make_run(tmp_path / f"sweep/{epoch}", *words, f"switch.criterion.epoch={epoch}")
    said = said_by("signals", tmp_path / "sweep", tmp_path / "out", monkeypatch)
    assert said.endswith("was not made with monitor.exact=true")


def test_the_matched_rate_is_compared_with_the_best_fixed_one(
    sweep, tmp_path, monkeypatch, capsys
):
    for rate in (3, 10):
        make_run(tmp_path / f"sweep/{rate}", *EARLY, "max_updates=12", f"adapter.factor_lr={rate}")
    words = [str(tmp_path / "sweep"), str(sweep / "alone"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rates.py", *words])
    rates.main()
    table = (tmp_path / "rates.md").read_text()
    header, _, line = [row.strip("| ").split(" | ") for row in table.splitlines()]
    cells = dict(zip(header, line, strict=True))
    top1 = {name: float(cells[name].split()[0]) for name in ("matched 1", "3 x", "10 x")}
    best = top1[cells["best fixed"]]
    assert best == max(top1["3 x"], top1["10 x"])
    ahead = float(cells["matched to it, points"].removeprefix("matched 1: "))
    assert ahead == pytest.approx(top1["matched 1"] - best, abs=0.02)
    assert capsys.readouterr().out.endswith(f"{table}\n")
