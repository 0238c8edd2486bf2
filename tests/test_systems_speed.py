"""Updates of finished runs, timed side by side: the right phase, and nothing touched."""

import json
import sys

import pytest

from runs import make_run
from switchlora.adapters import is_factor
from switchlora.bench import phases
from switchlora.bench.systems import main
from switchlora.learner import Learner

FEW = ("epochs=1", "max_updates=4", "full.scheduler.warmup_t=2", "monitor.window=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Full training, and low-rank layers from the first update, a few updates each."""
    folder = tmp_path_factory.mktemp("sweep")
    for method in ("full", "low_rank_32"):
        make_run(folder / method, f"+method={method}", "model.depth=2", *FEW)
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


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """A run with two updates in each phase, in a folder of runs."""
    folder = tmp_path_factory.mktemp("demo")
    words = (*FEW, "switch/criterion=at_epoch", "switch.criterion.epoch=0.1")
    make_run(folder / "run", *words, "switch/rank=fixed", "switch.rank.rank=2")
    return folder


def test_both_phases_of_a_run_make_updates_in_turn_and_show_what_they_hold(
    switched, tmp_path, monkeypatch, capsys
):
    made, before = [], stamps(switched)
    update = Learner.update

    def noted(self, *arguments):
        done = update(self, *arguments)
        made.append(any(is_factor(name) for name, _ in self.model.named_parameters()))
        return done

    monkeypatch.setattr(Learner, "update", noted)
    monkeypatch.setattr(
        sys, "argv", ["phases", str(switched), "--rounds", "3", "--out", str(tmp_path)]
    )
    phases.main()
    assert {made.count(adapted) for adapted in (False, True)} == {len(made) // 2}
    assert stamps(switched) == before
    found = json.loads((tmp_path / "speed.json").read_text())
    summary = json.loads((switched / "run" / "summary.json").read_text())
    for name in phases.PHASES:
        memory = summary["phases"][name]["memory"]["measured"]
        assert found["bytes"][name] == memory and len(found["seconds"][name]) == 3
    gradients = [found["bytes"][name]["gradients"] for name in phases.PHASES]
    row = f"| gradients, MiB | {gradients[0] / 2**20:.2f} | {gradients[1] / 2**20:.2f} |"
    assert row in capsys.readouterr().out and gradients[1] < gradients[0]


def test_without_a_run_of_both_phases_there_is_one_line(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["phases", str(runs)])
    with pytest.raises(SystemExit, match="no finished run among them has a full and an adapter"):
        phases.main()
