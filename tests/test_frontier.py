"""Full training of the same cost: shortened runs, the curve through them, the distance to it."""

from statistics import mean, stdev

import pytest
import torch
from scipy import stats

from conf_yamls import composed
from runs import DIGITS
from switchlora.storage import find_records, read_events
from switchlora.train import train
from test_tables import NEVER, table_of, text_of, write_run

SEEDS = (0, 1, 2)


def shortened(folder, seed, length, top1):
    """Full training over a share of the 80 updates, at 3 GFLOPs each."""
    updates = round(80 * length)
    words = (*NEVER, "method=full_short", f"length={length}")
    write_run(folder, *words, seed=seed, evals=((updates, top1),))


@pytest.fixture
def sweep(tmp_path):
    """Full training at three lengths, and a method that switches at update 30 of 80."""
    for seed in SEEDS:
        write_run(tmp_path / f"full-{seed}", *NEVER, "method=full", seed=seed, evals=((80, 80.0),))
        shortened(tmp_path / f"short-{seed}", seed, 0.5, 70.0 + seed)
        shortened(tmp_path / f"middle-{seed}", seed, 0.75, 76.0 + seed)
        write_run(tmp_path / f"mine-{seed}", "method=update_norm", seed=seed, evals=((80, 79.0),))
    return tmp_path


def row_of(method, rows):
    (found,) = (row for label, row in rows.items() if label.startswith(method))
    return found


def over(rows):
    return row_of("update_norm", rows).cells["over_full"].values


def test_a_run_is_compared_with_full_training_of_its_cost_seed_by_seed(sweep):
    table, rows = table_of(sweep)
    row = rows["update_norm"]
    # 30 updates of 3 GFLOPs and 50 of 2: 190, of which 180 are 60 full updates
    expected = [79.0 - (76.0 + seed + (80 - 76 - seed) * 10 / 60) for seed in SEEDS]
    assert row.cells["over_full"].values == pytest.approx(expected)
    half = stats.t.interval(0.95, 2, scale=stdev(expected) / 3**0.5)[1]
    low, high = mean(expected) - half, mean(expected) + half
    assert (
        text_of(table, row, "over_full")
        == f"{mean(expected):+.2f} [{low:+.2f} to {high:+.2f}] (3)"
    )
    assert "over_full" not in rows["full"].cells
    assert any("Over full training of the cost" in note for note in table.notes)


def test_nothing_is_said_of_a_cost_that_no_full_training_has(sweep):
    words = ("method=cheap", "switch.rank.share=0.05")
    write_run(sweep / "cheap", *words, seed=0, evals=((80, 79.0),), flops=(1e9, 1e8))
    table, rows = table_of(sweep)
    assert text_of(table, row_of("cheap", rows), "over_full") == "–"
    assert row_of("update_norm", rows).cells["over_full"].n == 3


def test_a_run_that_is_cut_off_is_no_shortened_full_training(sweep):
    _, before = table_of(sweep)
    cut = (*NEVER, "method=full", "max_updates=70")
    write_run(sweep / "cut", *cut, seed=0, evals=((70, 10.0),))
    _, rows = table_of(sweep)
    assert over(rows) == over(before)


def test_other_learning_rates_have_other_curves(sweep):
    words = (*NEVER, "method=full_short", "length=0.6", "full.optimizer.lr=0.5")
    _, before = table_of(sweep)
    write_run(sweep / "other", *words, seed=0, evals=((48, 1.0),))
    _, rows = table_of(sweep)
    assert over(rows) == over(before)


def test_without_shortened_runs_there_is_no_column_for_them(tmp_path):
    write_run(tmp_path / "full", *NEVER)
    write_run(tmp_path / "mine")
    table, _ = table_of(tmp_path)
    assert "over_full" not in [column.key for column in table.columns]
    assert not any("Over full training of the cost" in note for note in table.notes)


def test_the_schedule_of_a_shortened_run_ends_with_it(tmp_path):
    words = (*DIGITS, "+method=full_short", "length=0.55", "epochs=2", "log.every=1")
    words += ("full.scheduler.warmup_t=2", "monitor.window=5", "full.scheduler.lr_min=1e-6")
    summary = train(composed(*words), tmp_path)
    (record,) = find_records([tmp_path])
    per_epoch = 20
    assert summary["num_updates"] == round(0.55 * 2 * per_epoch) == 22
    rates = [event["train/lr"] for event in read_events(tmp_path, "train")]
    assert rates[-1] < 0.02 * max(rates)
    evals = list(record.events("eval"))
    assert evals[-1]["num_updates"] == 22 and summary["test"]["top1"] >= 0
    assert torch.isfinite(torch.tensor(summary["val"]["top1"]))
