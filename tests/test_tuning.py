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


@pytest.fixture
def tuned(tmp_path):
    """Runs of LoRA with four rates on the seed of the tuning; the highest rate had no end."""
    for rate, top1 in (("matched", 71.0), ("1", 70.0), ("3", 72.0)):
        words = (*LORA, f"adapter.factor_lr={rate}")
        seed = systems.TUNING_SEED
        write_run(tmp_path / f"runs/{rate}", *words, seed=seed, evals=((80, top1),))
    return [record for record in find_records([tmp_path / "runs"]) if record.finished]


def test_the_best_of_all_rates_is_chosen_and_one_that_has_no_end_is_the_worst(tuned):
    found = systems.tried(tuned, "lora", systems.FACTOR_LR, systems.FACTORS)
    assert found == {"matched": 71.0, "1": 70.0, "3": 72.0, "10": 0.0}
    assert systems.best(found) == "3"
    nothing = systems.tried(tuned, "relora", systems.FACTOR_LR, systems.FACTORS)
    assert set(nothing.values()) == {0.0}


def test_what_was_chosen_among_what_stands_below_the_table(tuned, tmp_path):
    of_full = {"full": {"5e-4": 70.0, "1e-3": 71.0}}
    of_lora = {"lora": systems.tried(tuned, "lora", systems.FACTOR_LR, systems.FACTORS)}
    systems.write_notes({systems.LR: of_full, systems.FACTOR_LR: of_lora}, tmp_path)
    assert json.loads((tmp_path / "tuning.json").read_text())["adapter.factor_lr"] == of_lora
    said, *_ = run(parse([f"{tmp_path}/runs", "--notes", f"{tmp_path}/tuning.md"]))
    among = "chosen among {}, by val top1 of seed 100: {}."
    assert f"adapter.factor_lr was {among.format('matched, 1, 3, 10', 'lora 3')}" in said
    assert f"full.optimizer.lr was {among.format('5e-4, 1e-3', 'full 1e-3')}" in said


def test_no_seed_that_chooses_is_reported_and_own_methods_are_in_the_experiment():
    assert str(systems.TUNING_SEED) not in systems.SEEDS.split(",")
    methods = systems.methods_of(systems.HERE / "experiments" / "systems.yaml")
    assert {"full", "lora", *systems.OWN} <= set(methods)
    assert {*systems.PROJECTED} <= set(methods)
    assert len(systems.FULL) == len(systems.FACTORS) == len(systems.OF_PROJECTED)


def test_a_sweep_may_fail_while_rates_are_tuned_and_not_later(monkeypatch, tmp_path):
    monkeypatch.setattr(systems.sys, "executable", "/bin/false")  # exits with 1
    systems.sweep(tmp_path, [], may_fail=True)
    with pytest.raises(SystemExit):
        systems.sweep(tmp_path, [])
