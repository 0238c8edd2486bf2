"""Write the tables of when_faster.md anew: ``python docs/when_faster.py``, a minute."""

from dataclasses import replace
from math import hypot
from pathlib import Path

from switchlora.adapters import as_on_a_gpu
from switchlora.bench.plan import milliseconds_of, read_cases
from switchlora.bench.plan_models import planned
from switchlora.bench.plan_numbers import Request, exposed, sizes_of, traces_of, whole_of
from switchlora.bench.plan_page import how_computed
from switchlora.cost import hardware_named, price

PAGE = Path(__file__).with_name("when_faster.md")
BEGIN, END = "<!-- {}: made by docs/when_faster.py -->", "<!-- end of {} -->"
RANK = 64
MODELS = {
    "vit_small_patch16_224": 128,
    "vit_base_patch16_224": 128,
    "vit_large_patch16_224": 64,
    "vit_huge_patch14_224": 64,
    "vit_giant_patch14_224": 32,
    "gpt3-6.7b": 1,
}
"""examples of an update and device"""
COLUMNS = {
    "a100-80gb": {"device": "a100-80gb"},
    "h100": {"device": "h100"},
    "h100, graphs": {"device": "h100", "graphs": True},
    "h100, eager": {"device": "h100", "compiled": False},
    "rtx4090": {"device": "rtx4090"},
    "mi300x": {"device": "mi300x"},
}
ARMS = ("full", "adapter", "adapter-B", "frozen")
ADAPTERS = ("adapter", "adapter-B")
NETWORKS = {"NVLink, one machine": None, "100 GbE": 12.5, "25 GbE": 3.1, "10 GbE": 1.25}
"""GB/s between machines"""
SLOW = "vit_large_patch16_224"
SLOW_BATCHES = (16, 64)


def measured_by_trace(model, batch, arm, compiled=True):
    """Return the request, the depth and the traces of an arm."""
    request = Request(model=model, hardware="", options={}, batch=batch, rank=RANK)
    found = planned(model, {})
    with as_on_a_gpu(compiled=compiled):
        return request, found.depth, traces_of(found, request, arm)


def passes_and_whole(depth, traces, device, compiled=True, graphs=False):
    """Return the seconds of both passes, and of an update that exchanges nothing."""
    machine = hardware_named(device).machine("bf16", compiled, graphs=graphs)
    seconds = whole_of(depth, [price(trace, machine, compiled) for trace in traces])
    passes = seconds["forward"] + seconds["backward"]
    return passes, hypot(passes + seconds["optimizer"], seconds["host"])


def model_row(model):
    """Return the row of a model: on each device full training, and the others' speed."""
    batch = MODELS[model]
    compiled = {arm: measured_by_trace(model, batch, arm)[1:] for arm in ARMS}
    eager = {arm: measured_by_trace(model, batch, arm, False)[1:] for arm in ADAPTERS}
    eager = {**compiled, **eager}  # products without adapters are the same
    cells = [f"{model}, {batch}"]
    for settings in COLUMNS.values():
        arms = compiled if settings.get("compiled", True) else eager
        full, *others = (passes_and_whole(*arms[arm], **settings)[1] for arm in ARMS)
        ratios = " / ".join(f"{full / other:.2f}" for other in others)
        cells.append(f"{1000 * full:,.0f} ms: {ratios}")
    return line(cells)


def models_table():
    """Return the table of models by hardware."""
    head = ["model, batch of a device", *COLUMNS]
    return [line(head), line(["---"] * len(head)), *map(model_row, MODELS)]


def network_row(batch):
    """Return the speed of the adapter phase of ``SLOW`` on A100s, by the network between them."""
    arms = [measured_by_trace(SLOW, batch, arm) for arm in ("full", "adapter")]
    cells = [str(batch)]
    for network in NETWORKS.values():
        full, adapter = (networked_seconds(*arm, network) for arm in arms)
        cells.append(f"{full / adapter:.2f}")
    return line(cells)


def networked_seconds(request, depth, traces, network):
    """Return the seconds of an update with its exchange; eight machines if there is a network."""
    hardware = hardware_named("a100-80gb")
    passes, alone = passes_and_whole(depth, traces, hardware.name)
    if network is not None:
        hardware = replace(hardware, network=1e9 * network)
    request = replace(request, gpus=8 if network is None else 64)
    return alone + exposed(sizes_of(depth, traces), passes, request, hardware)


def networks_table():
    """Return the table of networks."""
    head = ["images a device", *NETWORKS]
    return [line(head), line(["---"] * len(head)), *map(network_row, SLOW_BATCHES)]


def case_row(case):
    """Return the row of a measured update."""
    how = how_computed(case.get("compiled", True), case.get("graphs", False))
    arm = case.get("arm", "full")
    name = f"{case['model']}, {case['batch']}, {how}" + (f", {arm}" if arm != "full" else "")
    found = milliseconds_of(case)
    off = f"{100 * (found['predicted'] / found['measured'] - 1):+.0f} %"
    use = "fitted" if case.get("fitted") else "held out"
    times = [f"{found[key]:.1f}" for key in ("measured", "predicted")]
    return line([name, case["hardware"], *times, off, use, case["source"]])


def cases_table():
    """Return the table of measured updates."""
    head = ["update", "device", "measured ms", "predicted ms", "off", "constants", "source"]
    return [line(head), line(["---"] * len(head)), *map(case_row, read_cases())]


def line(cells):
    """Return a row of Markdown."""
    return f"| {' | '.join(cells)} |"


def between(text, name):
    """Return where the table ``name`` begins and ends in ``text``."""
    begin = text.index(BEGIN.format(name)) + len(BEGIN.format(name)) + 1
    return begin, text.index(END.format(name))


def main():
    """Write all tables into the page."""
    tables = {"models": models_table, "networks": networks_table, "cases": cases_table}
    for name, make in tables.items():
        table = make()
        text = PAGE.read_text()
        begin, end = between(text, name)
        PAGE.write_text(text[:begin] + "\n".join(table) + "\n" + text[end:])


if __name__ == "__main__":
    main()
