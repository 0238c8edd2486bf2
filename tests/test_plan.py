"""A plan: both phases priced for hardware by name, beside updates that others measured."""

import json
import sys
from dataclasses import replace
from math import hypot
from pathlib import Path

import pytest
import torch

from switchlora.bench import plan, plan_models, plan_numbers, plan_page
from switchlora.cost import Machine, all_hardware, fuse, hardware_named, price
from switchlora.cost.machine import INNER, NARROW, _Counts, _half_width
from switchlora.cost.trace import Operation

DOCS = Path(__file__).parents[1] / "docs"
TINY = (
    *("model=vit_tiny_patch16_224", "data.image_size=32", "model.embed_dim=64", "model.depth=5"),
    *("model.num_heads=2", "data.batch_size=16", "rank=4"),
)
LARGE = ("base", "large", "giant")
SHOWN = (
    ("vit_giant_patch14_224", "a100-80gb", 32, "full"),
    ("vit_giant_patch14_224", "h100", 32, "full"),
    ("vit_base_patch16_224", "rtx3090", 192, "full"),
    ("vit_small_patch16_224", "rtx3090", 384, "full"),
    ("vit_tiny_patch16_224", "rtx3090", 512, "full"),
    ("vit_small_patch16_224", "h100", 256, "full"),
    ("vit_base_patch16_224", "h100", 64, "full"),
    ("vit_base_patch16_224", "h100", 64, "frozen"),
    ("vit_base_patch16_224", "h200", 128, "full"),
    ("vit_base_patch16_224", "h200", 128, "adapter"),
    ("vit_base_patch16_224", "h200", 128, "adapter-B"),
    ("vit_base_patch16_224", "h200", 128, "frozen"),
    ("vit_small_patch16_224", "h200", 128, "full"),
    ("vit_small_patch16_224", "h200", 128, "adapter"),
)
"""published updates, and some of this project that no constant was fitted to"""


def key(case):
    return case["model"], case["hardware"], case["batch"], case.get("arm", "full")


def cases_of(keys):
    """The cases with these keys; compiled ones of the H100."""
    for case in plan.read_cases():
        eager_h100 = case["hardware"] == "h100" and not case.get("compiled", True)
        if key(case) in keys and not eager_h100:
            yield case


@pytest.fixture(scope="module")
def tiny():
    """The plan of a tiny model."""
    return made(*TINY, "hardware=h100", "gpus=2", "epochs=10", "data.size=1600")


def made(*words):
    request = plan.request_of(words)
    return plan_numbers.make_plan(request, *plan.hardware_of(request, calibrate=False))


@pytest.mark.parametrize(
    "case", [*cases_of(SHOWN)], ids=lambda case: "-".join(map(str, key(case)))
)
def test_measured_updates_are_predicted(case):
    found = plan.milliseconds_of(case)
    error = 0.15 if any(size in case["model"] for size in LARGE) else 0.30
    assert found["predicted"] == pytest.approx(found["measured"], rel=error)


def test_most_measured_updates_were_not_fitted_to():
    cases = plan.read_cases()
    fitted = [case for case in cases if case.get("fitted")]
    assert len(fitted) <= 6 and len(cases) >= 4 * len(fitted)
    assert {key(case) for case in cases_of(SHOWN)} == set(SHOWN)


def test_memory_measured_on_a_gpu_is_predicted():
    """5,500 MiB were allocated at the peak: experiments/gpu/updates.jsonl."""
    request = plan_numbers.Request("vit_base_patch16_224", "h100", {}, batch=64, compiled=False)
    found = plan_models.planned(request.model, {})
    few = plan_numbers.traces_of(found, request, "full")
    states = plan_numbers.held_states(plan_numbers.sizes_of(12, few), 12, request)
    peak = states + plan_numbers.held_beside(12, few)
    assert peak == pytest.approx(5500 * 2**20, rel=0.05)


def test_two_blocks_tell_what_all_of_them_take():
    request = plan.request_of([*TINY, "hardware=h100"])
    found = plan_models.planned(request.model, request.options)
    machine = hardware_named("h100").machine("bf16", compiled=True)
    assert found.stack == "blocks" and found.depth == 5
    few = plan_numbers.traces_of(found, request, "adapter")
    whole = plan_numbers.traced(found, request, "adapter", found.depth)
    sizes = plan_numbers.sizes_of(found.depth, few)
    assert sizes == dict(whole.memory)
    prices = [price(trace, machine, True) for trace in (*few, whole)]
    seconds = plan_numbers.whole_of(found.depth, prices[:2])
    assert seconds["backward"] == pytest.approx(prices[2].backward)
    assert seconds["host"] == pytest.approx(prices[2].host)
    beside = plan_numbers.held_beside(1, [whole, whole])
    assert plan_numbers.held_beside(found.depth, few) == pytest.approx(beside, rel=0.02)


def moves(reads, writes, name="aten.mul", **changes):
    size = sum(bytes_ for _, bytes_ in [*reads, *writes])
    operation = Operation(name, "", "forward", 0, size, reads=reads, writes=writes)
    return replace(operation, **changes)


def test_a_compiled_chain_reads_what_was_before_and_writes_what_is_needed_later():
    chain = [
        moves([(0, 100)], [(1, 100)]),
        moves([(1, 100), (2, 4)], [(3, 100)]),  # tensor 1 lives only inside
    ]
    product = moves([(3, 100), (4, 50)], [(5, 100)], "aten.mm", flops=10)
    view = moves([], [])
    found = fuse([chain[0], view, chain[1], product])
    assert [operation.bytes for operation in found] == [100 + 4 + 100, 250]
    assert found[1] is product


def test_the_optimizer_and_other_passes_are_not_fused():
    first, second = moves([(0, 8)], [(1, 8)]), moves([(1, 8)], [(2, 8)])
    apart = fuse([first, replace(second, part="backward")])
    assert [operation.part for operation in apart] == ["forward", "backward"]
    steps = [replace(each, part="optimizer") for each in (first, second)]
    assert fuse(steps) == steps


def test_host_and_device_take_the_root_of_their_squares(tiny):
    full = tiny.full
    assert full.seconds == hypot(full.device, full.host) + full.exchange
    assert full.waits_for_host


def test_a_narrow_product_is_slower_than_a_wide_one_of_as_many_flops():
    machine = Machine(1e12, 1e12, 1e12, half_width=64.0)
    wide, narrow = (Operation("mm", "", "", 1000, 1, width=w) for w in (10**9, 64))
    assert machine.seconds(narrow) == pytest.approx(2 * machine.seconds(wide))


def test_the_half_width_is_found_from_two_rates():
    rate, half = 5e14, 60.0
    counts, seconds = {}, {}
    for name, width in (("product", INNER), ("narrow", NARROW)):
        counts[name] = _Counts(flops=10**12, bytes=1, operations=1)
        seconds[name] = 1e12 / (rate * width / (width + half))
    assert _half_width(counts, seconds) == pytest.approx(half)
    seconds["narrow"] = seconds["product"] / 2  # noise: narrow products faster than wide ones
    assert _half_width(counts, seconds) == 0.0


def test_an_exchange_hides_behind_the_backward_pass_until_it_is_longer():
    request = plan_numbers.Request("m", "h", {}, gpus=8, batch=8)
    hardware = hardware_named("a100-80gb")
    sizes = {"gradients": 4e9, "parameters": 4e9}
    ring = 2 * 4e9 * 7 / 8 / hardware.link
    hidden = plan_numbers.exposed(sizes, 1.0, request, hardware)
    assert hidden < 0.01 * ring
    assert plan_numbers.exposed(sizes, 0.0, request, hardware) == pytest.approx(ring)
    sharded = replace(request, parallel="fsdp")
    assert plan_numbers.exposed(sizes, 0.0, sharded, hardware) == pytest.approx(0.75 * ring)
    far = replace(request, gpus=16)
    slow = replace(hardware, network=1e9)
    assert plan_numbers.exposed(sizes, 0.1, far, slow) > 7.0


def test_the_largest_batch_is_the_last_that_fits():
    hardware = replace(hardware_named("h100"), memory=1.02 * 2**30)
    request = plan.request_of([*TINY, "hardware=h100"])
    found = plan_models.planned(request.model, request.options)
    machine = hardware.machine("bf16", compiled=True)
    phase = plan_numbers.phase_of(found, request, hardware, machine, "full")
    largest = replace(request, batch=phase.largest)
    held = plan_numbers.held_beside(5, plan_numbers.traces_of(found, largest, "full"))
    free = plan_numbers.free_bytes(hardware, request, phase.states)
    assert held == pytest.approx(free, rel=0.02)


def test_hours_add_up_and_a_switch_that_saves_nothing_has_no_last_epoch(tiny):
    epoch = (100 + 50_000 / 16 / 3) * tiny.full.seconds
    assert tiny.full_hours == pytest.approx(10 * epoch / 3600)
    assert tiny.speedup < 1 and tiny.break_even is None
    fast = replace(tiny, adapter=replace(tiny.full, device=0.0, host=0.0, exchange=0.0))
    saved = fast.full_hours - fast.switched_hours
    assert saved == pytest.approx((6 * epoch - fast.switch_seconds) / 3600)


def test_the_page_fits_a_terminal_and_says_that_all_is_predicted(tiny):
    lines = plan_page.page(tiny).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 110
    assert "predicted" in lines[1]
    assert any(line.startswith("waits for the host") for line in lines)
    assert "a switch saves no time here, at any epoch" in lines


def test_numbers_for_programs_are_those_of_the_page(tiny):
    found = json.loads(json.dumps(plan_page.plain(tiny)))
    assert found["speedup"] == pytest.approx(tiny.speedup)
    low, high = found["phases"]["full"]["seconds_interval"]
    assert low < found["phases"]["full"]["seconds"] < high
    assert found["request"]["rank"] == 4 and found["break_even_epoch"] is None


def test_this_machine_is_measured_on_the_spot(monkeypatch, tiny):
    rates = Machine(1e11, 5e10, 5e9)
    monkeypatch.setattr(plan, "measure_machine", lambda device, precision: rates)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    request = plan.request_of([*TINY, "hardware=here"])
    hardware, machine = plan.hardware_of(request, calibrate=False)
    assert machine == rates and hardware.memory > 0 and not request.compiled
    named = plan.request_of([*TINY, "hardware=h100"])
    hardware, machine = plan.hardware_of(named, calibrate=True)
    assert machine == rates.compiled() and hardware == hardware_named("h100")
    assert "rates (measured here)" in plan_page.page(replace(tiny, measured=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hardware=h100"], "model has no value: give a timm name"),
        (["model=vit_tiny_patch16_22", "hardware=h100"], "near names: vit_tiny_patch16_224"),
        (["model=gpt3-7b", "hardware=h100"], "near names: gpt3-6.7b"),
        (["hardware=h10", "model=small"], "hardware 'h10' is not known; near names: h100, h200"),
        (["epoch=3"], "no key 'epoch'; near names: epochs"),
        (["epochs"], "'epochs' is no KEY=VALUE"),
        (["--jsn"], "no option '--jsn'; near names: "),
        (["gpus=two"], "gpus=two: give a whole number"),
        (["full.precision=fp17"], "choose one of bf16, fp32"),
        ([*TINY, "hardware=h100", "gpus=3"], "give a multiple of 3"),
        ([*TINY, "hardware=h100", "rank=999"], "rank is 999: give 1 to 64"),
        ([*TINY, "hardware=h100", "switch.epoch=301"], "switch.epoch is 301: give 0 to 300"),
        (["model=small", "hardware=h100", "model.dept=2"], "refuses its options"),
        (["model=small", "hardware=here", "gpus=2"], "hardware=here measures one device"),
    ],
)
def test_a_mistake_is_one_line(words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["switchlora-bench plan", *words])
    with pytest.raises(SystemExit) as stop:
        plan.main()
    line = str(stop.value)
    assert said in line and "\n" not in line
    assert line.startswith("switchlora-bench plan: ")


def test_what_fits_nowhere_needs_more_devices_or_what_is_not_here():
    found = made("model=gpt3-175b", "hardware=h100", "gpus=8", "data.batch_size=8")
    with pytest.raises(ValueError, match=r"does not fit 8 x h100: .*fsdp.* at least \d+ of these"):
        plan_page.page(found)
    sharded = replace(
        found,
        request=replace(found.request, parallel="fsdp"),
        full=replace(found.full, states=found.full.all_states / 8),
    )
    with pytest.raises(ValueError, match="needs at least .* tensor parallelism, which this"):
        plan_page.plain(sharded)


def test_a_batch_that_does_not_fit_is_said_with_what_helps(tiny):
    small = replace(tiny, full=replace(tiny.full, memory=2.0**40, largest=4))
    lines = plan_page.page(small).splitlines()
    told = [line for line in lines if line.startswith("DOES NOT FIT")]
    assert told and told[0].endswith("full.accumulation=2")


@pytest.mark.parametrize("name", all_hardware())
def test_every_device_has_rates_in_both_precisions_and_a_source(name):
    hardware = hardware_named(name)
    half, single = (hardware.machine(precision, True) for precision in ("bf16", "fp32"))
    assert half.product_rate > 1.5 * single.product_rate
    assert hardware.source and hardware.link >= 1e9 and hardware.network >= 1e9
    assert hardware.machine("bf16", False).bandwidth < half.bandwidth < hardware.bandwidth


def test_the_tables_of_the_docs_are_up_to_date(monkeypatch):
    """After a change of what an update does: ``python docs/when_faster.py``."""
    monkeypatch.syspath_prepend(str(DOCS))
    import when_faster

    lines = (DOCS / "when_faster.md").read_text().splitlines()
    assert when_faster.model_row("vit_small_patch16_224") in lines
    assert when_faster.network_row(16) in lines


@pytest.mark.parametrize(
    "words, compiled, graphs",
    [
        (["hardware=h100"], True, True),
        (["hardware=h100", "gpus=2"], True, False),
        (["hardware=h100", "full.accumulation=2"], True, False),
        (["hardware=h100", "full.activation_checkpointing=blocks"], True, False),
        (["hardware=mi300x"], True, False),
        (["hardware=h100", "full.compile=false"], False, False),
    ],
)
def test_a_plan_compiles_as_a_run_does_by_default(words, compiled, graphs):
    request = plan.request_of(["model=vit_tiny_patch16_224", *words])
    assert (request.compiled, request.graphs) == (compiled, graphs)
