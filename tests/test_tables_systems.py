"""The table of systems: methods by name, their last phase beside full training's, who switched."""

import json

import pytest

from test_tables import NEVER, SWITCH_AT, rewrite, table_of, text_of, write_run

FULL = ("method=full", *NEVER)


def segment(phase, until, num_updates, images_per_second, trainable, parameters, total):
    """What lay between two transitions."""
    measured = {"parameters": parameters, "optimizer_state": 2**20 * trainable, "total": total}
    return {
        "phase": phase,
        "until": until,
        "num_updates": num_updates,
        "images_per_second": images_per_second,
        "trainable_parameters": trainable,
        "memory": {"measured": measured},
    }


def change(kind, num_updates):
    """One transition."""
    return {"kind": kind, "num_updates": num_updates, "epoch": num_updates / 20}


@pytest.fixture
def systems(tmp_path):
    """Full training, and a staged run whose last stage came with its last update."""
    full = write_run(tmp_path / "full", *FULL)
    rewrite(full, segments=[segment("full", 80, 80, 100.0, 1000, 4000, 20_000)], transitions=[])
    staged = write_run(tmp_path / "staged", "method=staged", "monitor.window=20")
    made = [
        segment("full", 30, 30, 100.0, 1000, 4000, 20_000),
        segment("staged", 60, 30, 110.0, 500, 4400, 15_000),
        segment("staged", 80, 20, 125.0, 300, 4800, 12_000),
        segment("adapter", 80, 0, None, 100, 5000, None),
    ]
    stages = [change("stage", n) for n in (30, 60, 80)]
    rewrite(staged, segments=made, transitions=stages, cost={"train_flops": 60 * 3e9})
    return tmp_path


def test_the_last_phase_with_updates_is_compared_with_full_training(systems):
    table, rows = table_of(systems, "systems")
    assert list(rows) == ["full", "staged"]
    expected = {
        **{"val_top1": 61, "test_top1": 60, "top1_difference": 0, "cost_flops": 60 * 3e9},
        **{"trainable": 100, "trainable_share": 10, "weights_ratio": 1.2, "step_ratio": 0.8},
        **{
            "optimizer_state": 300,
            "held_ratio": 0.6,
            "cost_ratio": 0.75,
            "switch_epoch": 1.5,
            "changes": 3,
        },
    }
    assert {k: c.mean for k, c in rows["staged"].cells.items()} == pytest.approx(expected)
    assert set(expected) == {column.key for column in table.columns}
    assert text_of(table, rows["full"], "step_ratio") == "–"
    assert text_of(table, rows["full"], "changes") == "0 (1)"


def test_a_smaller_optimizer_state_is_compared_with_full_training_and_is_no_baseline(systems):
    for method, trainable in (("galore", 300), ("apollo", 200), ("apollo_mini", 100)):
        words = ("method=" + method, *NEVER, f"recipe@full={method}")
        made = segment("full", 80, 80, 80.0, 1000, 4000, 15_000)
        made["memory"]["measured"]["optimizer_state"] = 2**20 * trainable
        rewrite(write_run(systems / method, *words), segments=[made], transitions=[])
    table, rows = table_of(systems, "systems")
    assert list(rows) == ["full", "apollo", "apollo_mini", "galore", "staged"]
    state = {label: row.cells["optimizer_state"].mean for label, row in rows.items()}
    assert [state[name] for name in ("full", "galore", "apollo_mini")] == [1000, 300, 100]
    assert rows["galore"].cells["held_ratio"].mean == 0.75
    assert rows["staged"].cells["held_ratio"].mean == pytest.approx(0.6)
    assert "not_switched" not in rows["galore"].cells


def test_without_times_the_step_ratio_is_left_out(systems):
    table, _ = table_of(systems, "systems", times=False)
    assert "step_ratio" not in {column.key for column in table.columns}
    assert not any("Step ratio" in note for note in table.notes)


def test_a_joint_phase_and_stages_take_the_conditions_of_the_adapters_recipe(systems):
    for name, clip in (("same", "adapter.clip_grad=2"), ("other", "adapter.precision=bf16")):
        run = write_run(systems / name, f"method={name}", clip)
        phases = json.loads((run / "summary.json").read_text())["phases"]
        phases["joint"] = phases["staged"] = phases["adapter"]
        rewrite(run, phases=phases)
    table, rows = table_of(systems, "systems")
    assert "top1_difference" in rows["same"].cells
    assert "other: no ratio to 'full', where adapter.precision is auto, not bf16." in table.notes


def test_a_method_names_its_row_and_says_what_differs_within_it(tmp_path):
    write_run(tmp_path / "full", *FULL)
    for rank in (4, 8):
        settings = ("switch/init=zero_b", "switch/rank=fixed", f"switch.rank.rank={rank}")
        write_run(tmp_path / f"lora-{rank}", "method=lora", *settings)
    write_run(tmp_path / "svd", "method=svd", "switch/init=weight_svd", "monitor.window=5")
    write_run(tmp_path / "none", "switch.criterion.fraction=0.5")
    _, rows = table_of(tmp_path)
    assert list(rows) == ["full", "lora, rank=4", "lora, rank=8", "svd", "update_norm"]


def test_rows_of_one_method_are_named_as_if_there_were_none(tmp_path):
    for fraction in (0.5, 0.6):
        chosen = f"switch.criterion.fraction={fraction}"
        write_run(tmp_path / str(fraction), "method=staged", chosen)
    _, rows = table_of(tmp_path)
    assert list(rows) == ["fraction=0.5", "fraction=0.6"]


def test_what_no_method_consists_of_is_told_beside_it(tmp_path):
    for size in (32, 64):
        write_run(tmp_path / f"full-{size}", *FULL, f"data.batch_size={size}")
    write_run(tmp_path / "lora", "method=lora")
    _, rows = table_of(tmp_path)
    assert list(rows) == ["full, batch_size=32", "full, batch_size=64", "lora, batch_size=32"]
    assert rows["lora, batch_size=32"].cells["top1_difference"].values == (0,)


@pytest.mark.parametrize("preset", ["default", "systems"])
def test_rows_of_which_not_all_seeds_switched_say_so(tmp_path, preset):
    write_run(tmp_path / "full", *FULL)
    fired = {"fired": True, "num_updates": SWITCH_AT, "parameters": 1000}
    held = {"fired": False, "num_updates": None}
    for seed, switch in enumerate((fired, fired, held)):
        run = write_run(tmp_path / f"lora-{seed}", "method=lora", seed=seed)
        rewrite(run, switch=switch)
    run = write_run(tmp_path / "late", "method=late", "switch.earliest=70")
    rewrite(run, switch=held)
    run = write_run(tmp_path / "part", "method=part", "switch.dropout=0.1")
    rewrite(run, switch={**fired, "waiting": ["blocks.0.attn.qkv"]})
    run = write_run(tmp_path / "back", "method=back", "switch.dropout=0.2")
    rewrite(run, switch=held, transitions=[change("switch", 30), change("take_back", 60)])
    table, rows = table_of(tmp_path, preset)
    notes = table.notes
    held = {
        label: row.cells["not_switched"].mean for label, row in rows.items() if label != "full"
    }
    assert held == {"lora": pytest.approx(1 / 3), "late": 1, "part": 0, "back": 0}
    assert "not_switched" not in rows["full"].cells
    assert any(note.startswith("Not switched: the share of seeds") for note in notes)
    assert "part: in 1 of 1 seeds some targets train in full to the end." in notes
    assert "back: in 1 of 1 seeds the guard took the switch back." in notes
    assert not any(note.startswith(("full: ", "back: 0", "part: 0")) for note in notes)
