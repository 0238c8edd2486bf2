"""Each system chooses its learning rate among as many as any other, on a seed of its own."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import systems

from switchlora.analysis.tables.table import parse, run
from switchlora.storage import find_records
from test_tables import write_run

LORA = ("method=lora", "switch/criterion=at_start")
VALUES = systems.BUDGETS["systems"].adapters


@pytest.fixture
def tuned(tmp_path):
    """Runs of LoRA with four rates on the seed of the tuning; the highest rate had no end."""
    for rate, top1 in (("matched", 71.0), ("1", 70.0), ("3", 72.0)):
        words = (*LORA, f"adapter.factor_lr={rate}")
        seed = systems.TUNING_SEED
        write_run(tmp_path / f"runs/{rate}", *words, seed=seed, evals=((80, top1),))
    return [record for record in find_records([tmp_path / "runs"]) if record.finished]


def test_the_best_of_all_rates_is_chosen_and_one_that_has_no_end_is_the_worst(tuned):
    found = systems.tried(tuned, "lora", systems.FACTOR_LR, VALUES)
    assert found == {"matched": 71.0, "1": 70.0, "3": 72.0, "10": 0.0}
    assert systems.best(found) == "3"
    nothing = systems.tried(tuned, "relora", systems.FACTOR_LR, VALUES)
    assert set(nothing.values()) == {0.0}


def test_what_was_chosen_among_what_stands_below_the_table(tuned, tmp_path):
    of_full = {"full": {"5e-4": 70.0, "1e-3": 71.0}}
    of_lora = {"lora": systems.tried(tuned, "lora", systems.FACTOR_LR, VALUES)}
    systems.write_notes({systems.LR: of_full, systems.FACTOR_LR: of_lora}, ["staged"], tmp_path)
    assert json.loads((tmp_path / "tuning.json").read_text())["adapter.factor_lr"] == of_lora
    said, *_ = run(parse([f"{tmp_path}/runs", "--notes", f"{tmp_path}/tuning.md"]))
    among = "chosen among {}, by val top1 of seed 100: {}."
    assert f"adapter.factor_lr was {among.format('matched, 1, 3, 10', 'lora 3')}" in said
    assert f"full.optimizer.lr was {among.format('5e-4, 1e-3', 'full 1e-3')}" in said


@pytest.mark.parametrize("experiment", systems.BUDGETS)
def test_no_seed_that_chooses_is_reported_and_every_method_has_as_many_rates(experiment):
    assert str(systems.TUNING_SEED) not in f"{systems.SEEDS},{systems.MORE_SEEDS}".split(",")
    methods = systems.methods_of(systems.HERE / "experiments" / f"{experiment}.yaml")
    assert {"full", "lora"} <= set(methods)
    budget = systems.BUDGETS[experiment]
    assert len(budget.full) == len(budget.adapters) == len(systems.OF_PROJECTED)


def test_methods_that_are_treated_in_another_way_are_in_the_experiment():
    methods = systems.methods_of(systems.HERE / "experiments" / "systems.yaml")
    named = {*systems.OWN, *systems.PROJECTED, *systems.LEADERS}
    assert named <= {*methods, "full_short"}


def test_every_method_runs_at_the_rate_it_chose_and_leaders_with_more_seeds(monkeypatch, tmp_path):
    """The sweeps are noted instead of run."""
    monkeypatch.chdir(tmp_path)
    swept = []
    monkeypatch.setattr(
        systems.Study, "sweep", lambda self, folder, words, **_: swept.append((folder, words))
    )
    study = systems.Study("systems", [])
    found = {"lora": {"1": 70.0, "3": 71.0}, "cola": {"1": 72.0, "3": 71.0}}
    study.report_best(found, systems.FACTOR_LR, "full.optimizer.lr=1e-3")
    lr = "full.optimizer.lr=1e-3"
    assert swept == [
        ("sweep", ["+method=lora", "seed=0,1,2", "adapter.factor_lr=3", lr]),
        ("sweep", ["+method=cola", "seed=0,1,2", "adapter.factor_lr=1", lr]),
        ("sweep", ["+method=cola", "seed=3,4", "adapter.factor_lr=1", lr]),
    ]


def test_a_sweep_may_fail_while_rates_are_tuned_and_not_later(monkeypatch):
    monkeypatch.setattr(systems.sys, "executable", "/bin/false")  # exits with 1
    study = systems.Study("systems", [])
    study.sweep("tuning", [], may_fail=True)
    with pytest.raises(SystemExit):
        study.sweep("sweep", [])
