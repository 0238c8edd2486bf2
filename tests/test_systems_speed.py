"""Updates of finished runs, timed side by side: the right phase, and nothing touched."""

import json
import sys

import pytest

from runs import make_run
from switchlora.adapters import is_factor
from switchlora.bench.systems import main
from switchlora.learner import Learner

FEW = ("epochs=1", "max_updates=4", "full.scheduler.warmup_t=2", "monitor.window=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Full training, and low-rank layers from the first update, a few updates each."""
    folder = tmp_path_factory.mktemp("sweep")
    for method in ("full", "low_rank_32"):
        make_run(folder / method, f"+method={method}", *FEW)
    return folder


def timed(monkeypatch, out, *words):
    """What the command measures, or the line with which it ends."""
    monkeypatch.setattr(sys, "argv", ["systems_speed.py", *map(str, words), "--out", str(out)])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return json.loads((out / "speed.json").read_text())


def stamps(folder):
    """When each file of the runs was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_each_method_makes_updates_of_its_last_phase_and_its_run_stays_as_it_is(
    runs, tmp_path, monkeypatch
):
    made, before = [], stamps(runs)
    update = Learner.update

    def noted(self, *arguments):
        done = update(self, *arguments)
        moved = [name for name, p in self.model.named_parameters() if p.grad is not None]
        made.append((done.applied, any(is_factor(name) for name in moved)))
        return done

    monkeypatch.setattr(Learner, "update", noted)
    found = timed(monkeypatch, tmp_path, runs, "--rounds", 3)
    assert list(found["seconds"]) == ["full", "low_rank_32"]
    assert {len(seconds) for seconds in found["seconds"].values()} == {3}
    assert set(made) == {(True, False), (True, True)}
    assert stamps(runs) == before
    assert "| `full` |" in (tmp_path / "speed.md").read_text()


def test_without_full_training_there_is_nothing_to_compare_with(runs, tmp_path, monkeypatch):
    said = timed(monkeypatch, tmp_path, runs / "low_rank_32")
    assert said.startswith("switchlora-bench systems: no finished run of method=full")
