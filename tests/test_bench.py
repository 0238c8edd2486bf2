"""The benchmark: fair arms, paired arithmetic, and results that stay."""

import copy
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from switchlora.adapters import adapted_modules, count_parameters
from switchlora.bench import (
    arms as bench_arms,
    bench,
    memory as bench_memory,
    picture as bench_picture,
    report as bench_report,
    rounds as bench_rounds,
)

WORDS = (
    *("--model", "vit_tiny_patch16_224", "--image-size", "32", "--batch", "4", "--rank", "2"),
    *("--model-option", "depth=1", "embed_dim=32", "num_heads=2", "num_classes=5"),
    *("--rounds", "3", "--warmup", "1"),
)
LORA = {"lora_A", "lora_B"}


@pytest.fixture
def cell():
    """The cell of the command line above."""
    (found,) = bench.cells_of(bench.parse(WORDS))
    return found


@pytest.fixture
def arms(cell):
    """All arms of the cell by name."""
    base = bench_arms.base_model(cell)
    names = bench_arms.ARMS
    return {name: bench_arms.make_arm(name, copy.deepcopy(base), cell) for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run of all arms leaves."""
    folder = tmp_path_factory.mktemp("bench")
    bench.bench(bench.parse([*WORDS, "--out", str(folder)]))
    return folder


def timed(result, seconds):
    """A result with these times."""
    return {**result, "arms": {n: {"seconds": {"total": s}} for n, s in seconds.items()}}


def test_a_run_leaves_results_tables_and_a_picture_of_every_arm(folder):
    (result,) = bench_report.read(folder / "bench.json")
    table = (folder / "bench.md").read_text()
    for name in bench_arms.ARMS:
        assert len(bench_report.times(result, name)) == 3
        assert result["arms"][name]["predicted"]["total"] > 0
        assert table.count(f"\n| {name} ") == 2
    assert result["environment"]["versions"]["peft"] in table
    assert (folder / "bench.png").stat().st_size > 10_000


def test_a_finished_cell_is_added_to_those_before_it(folder, tmp_path):
    (result,) = bench_report.read(folder / "bench.json")
    bench_report.append(tmp_path, result)
    bench_report.append(tmp_path, result)
    assert bench_report.read(tmp_path / "bench.json") == [result, result]


@pytest.mark.parametrize("name", bench_arms.ON_DEMAND)
def test_an_arm_on_demand_has_a_bar_too(folder, name):
    (result,) = bench_report.read(folder / "bench.json")
    both = {"full": result["arms"]["full"], name: result["arms"]["adapter"]}
    drawn = bench_picture.bars([{**result, "arms": both}], bench_picture.speed_bar)
    assert [bar.label for bar in drawn] == ["full", f"{name} r2"]


def test_whole_rounds_outlive_an_interruption(tmp_path, at_update):
    def interrupt(images):
        raise KeyboardInterrupt

    at_update(4, interrupt)
    words = [*WORDS, "--arms", "full", "frozen", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        bench.bench(bench.parse(words))
    (result,) = bench_report.read(tmp_path / "bench.json")
    assert [len(bench_report.times(result, name)) for name in ("full", "frozen")] == [2, 2]


def trained(arm):
    """Names of the tensors that an arm trains, with PEFT's additions to them left out."""
    names = [n for n, p in arm.model.named_parameters() if p.requires_grad]
    return {n.replace("base_layer.", "").replace(".default.weight", "") for n in names}


def test_arms_train_what_their_names_say(arms):
    everything = trained(arms["full"])
    targets = {f"{name}.weight" for name in adapted_modules(arms["adapter"].model)}
    factors = {t.replace("weight", f) for t in targets for f in LORA}
    assert len(targets) == 4
    assert trained(arms["frozen"]) == everything - targets
    for name in ("adapter", "adapter-merged", "adapter-split", "peft", "peft-nocast"):
        assert trained(arms[name]) == everything - targets | factors
    only_B = {factor for factor in factors if "lora_B" in factor}
    assert trained(arms["adapter-B"]) == everything - targets | only_B
    forms = [
        {module.form for module in adapted_modules(arms[name].model).values()}
        for name in ("adapter", "adapter-merged", "adapter-split")
    ]
    assert forms == [{None}, {"merged"}, {"split"}]


def test_every_arm_starts_as_the_same_function(arms):
    for arm in arms.values():
        with torch.no_grad():
            output, wanted = (each.model(arm.images) for each in (arm, arms["full"]))
        torch.testing.assert_close(output, wanted)


def test_the_refactored_arms_are_the_adapter_with_hooks_on_its_steps(cell):
    base = bench_arms.base_model(cell)
    names = ("adapter", *bench_arms.REFACTORED)
    found = {name: bench_arms.make_arm(name, copy.deepcopy(base), cell) for name in names}
    assert trained(found["adapter-reflora"]) == trained(found["adapter"])
    for arm in found.values():
        arm.lap(), arm.lap()
    plain, refactored, scaled = (
        adapted_modules(found[name].model)["blocks.0.attn.qkv"] for name in names
    )
    assert not torch.equal(refactored.lora_B, plain.lora_B)
    torch.testing.assert_close(scaled.lora_A.norm(), scaled.lora_B.norm())


def test_a_peft_that_trains_other_tensors_is_refused(arms):
    ours, theirs = arms["adapter"].model, arms["peft"].model
    bench_arms.check_same_shapes_train(ours, theirs)
    theirs.head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="PEFT would train .* no fair comparison"):
        bench_arms.check_same_shapes_train(ours, theirs)


def test_each_round_is_one_update_of_each_arm_in_an_order_of_its_own(arms):
    rounds = list(bench_rounds.timed_rounds(list(arms.values()), 6, 1, ""))
    orders = [tuple(laps) for laps in rounds]
    assert all(Counter(order) == Counter(bench_arms.ARMS) for order in orders)
    assert len(set(orders[:6])) == 6
    shown = [{key for lap in laps.values() for key in lap} for laps in rounds]
    assert shown == [{"total"}] * 6 + [set(bench_report.PARTS)] * bench_rounds.ROUNDS_OF_PARTS
    assert {arm.num_updates for arm in arms.values()} == {7 + bench_rounds.ROUNDS_OF_PARTS}


def test_parts_of_an_update_add_up_over_micro_batches(cell):
    split = replace(cell, accumulation=2)
    arm = bench_arms.make_arm("adapter", bench_arms.base_model(split), split)
    readings = iter(range(100))
    arm.clock._now = lambda: next(readings)
    parts = arm.lap_of_parts()
    assert set(parts) == set(bench_report.PARTS) and min(parts.values()) > 0
    assert sum(parts.values()) == next(readings) - 1
    assert all(p.grad is None for p in arm.model.parameters())


@pytest.mark.parametrize("name", ["full", "adapter", "peft"])
def test_nothing_waits_for_the_device_inside_an_update_that_counts(arms, name):
    arm = arms[name]
    readings = []
    arm.clock._now = lambda: readings.append(0.0) or 0.0
    arm.lap()
    assert len(readings) == 2
    hooked = [m for m in arm.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooked


def test_peft_casts_inputs_in_one_arm_and_leaves_them_in_the_other(cell):
    moved = {}
    for name in ("peft", "peft-nocast"):
        each = replace(cell, precision="bf16")
        arm = bench_arms.make_arm(name, bench_arms.base_model(each), each)
        trace = bench.trace_of(arm, each)
        moved[name] = sum(operation.bytes for operation in trace.operations)
    assert moved["peft-nocast"] < moved["peft"]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("batch", {"batch": 2}),
        ("precision", {"precision": "bf16"}),
        ("accumulation", {"accumulation": 2}),
        ("dropout", {"options": {"depth": 2, "drop_path_rate": 0.1}}),
    ],
)
def test_arms_under_different_conditions_are_refused(cell, what, change):
    other = replace(cell, **change | {"options": {**cell.options, **change.get("options", {})}})
    arms = [
        bench_arms.make_arm(name, bench_arms.base_model(each), each)
        for name, each in (("full", cell), ("adapter", other))
    ]
    with pytest.raises(ValueError, match=f"no comparison: {what} is .* 'full' and .* 'adapter'"):
        next(bench_rounds.timed_rounds(arms, 1, 0, ""))


@pytest.mark.parametrize("key", ["model", "image_size", "device", "threads", "batch", "dropout"])
def test_a_run_is_not_compared_with_one_under_other_conditions(folder, key):
    (result,) = bench_report.read(folder / "bench.json")
    path = folder / "bench.json"
    assert bench_report.earlier_cell(path, result["conditions"]) == result
    with pytest.raises(ValueError, match=f"no comparison: {key} is 'other' in this run"):
        bench_report.earlier_cell(path, result["conditions"] | {key: "other"})


def test_speed_against_an_earlier_run_is_the_ratio_of_medians(folder):
    (result,) = bench_report.read(folder / "bench.json")
    now, before = timed(result, {"full": [1.0, 2.0, 3.0]}), timed(result, {"full": [3.0]})
    (line,) = bench_report.against_lines(now, before)
    assert line.startswith("full: 1.50x")


def test_ratios_are_of_medians_and_their_spread_is_that_of_pairs():
    ratio = bench_report.paired_ratio([2.0, 4.0, 6.0, 8.0, 20.0], [1.0, 4.0, 2.0, 4.0, 5.0])
    # pairs: 2, 1, 3, 2, 4; medians: 6 and 4
    assert (ratio.value, ratio.low, ratio.high) == (1.5, 2.0, 3.0)
    assert str(bench_report.paired_ratio([3.0], [2.0])) == "1.50 (1.50-1.50)"


def test_frozen_weights_are_cast_where_that_runs_and_a_note_says_where_not(cell):
    for precision, casts in (("bf16", True), ("fp32", False)):
        each = replace(cell, precision=precision, residual_dtype="bf16")
        arm = bench_arms.make_arm("frozen", bench_arms.base_model(each), each)
        dtype = arm.model.blocks[0].mlp.fc1.weight.dtype
        assert dtype == (torch.bfloat16 if casts else torch.float32)
        assert casts or "frozen weights stay torch.float32" in arm.notes[0]


def test_peak_memory_of_a_fresh_process_holds_what_full_training_needs(cell):
    options = {"depth": 6, "embed_dim": 256, "num_heads": 4, "num_classes": 5}
    large = replace(cell, options=options)
    states = 16 * count_parameters(bench_arms.base_model(large))  # weight, gradient, two moments
    peak = bench_memory.peak_in_fresh_process("full", large)
    assert states < peak < 1.5 * states


def test_memory_is_not_measured_where_too_little_is_free():
    bench_memory.refuse_full_memory("full", 2**20)
    with pytest.raises(ValueError, match="memory of 'full' cannot be measured: it needs about"):
        bench_memory.refuse_full_memory("full", 2**60)


def test_what_others_hold_on_a_gpu_is_what_no_context_of_ours_explains():
    assert bench_memory.held_by_others(used=800, used_by_both=1100) == 500


def test_a_batch_that_does_not_split_is_refused(cell):
    with pytest.raises(ValueError, match="--batch 4 does not split into 3 micro-batches"):
        replace(cell, accumulation=3)


def test_model_options_are_values_or_words():
    assert bench.model_options(["depth=2", "class_token=False", "global_pool=avg"]) == {
        **{"depth": 2, "class_token": False},
        "global_pool": "avg",
    }
    with pytest.raises(ValueError, match="'depth' is no KEY=VALUE"):
        bench.model_options(["depth"])


def test_the_command_says_in_one_line_what_is_wrong(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model", "vit_tiny_patch16_22"])
    with pytest.raises(SystemExit, match="bench: unknown model 'vit_tiny_patch16_22'; near"):
        bench.main()


def test_the_bandwidth_that_makes_an_adapter_three_times_as_fast_does_so():
    full = {"predicted": {"total": 9.0, "communication": 1.0}}
    adapter = {"predicted": {"total": 5.1, "communication": 0.1}}
    found = bench_report.bandwidth_for(3.0, full, adapter, all_reduce=1000.0)
    times = [8.0 + 1000.0 / found, 5.0 + 100.0 / found]
    assert times[0] / times[1] == pytest.approx(3.0)
    fast = {"predicted": {"total": 2.1, "communication": 0.1}}
    assert bench_report.bandwidth_for(3.0, full, fast, all_reduce=1000.0) == float("inf")
