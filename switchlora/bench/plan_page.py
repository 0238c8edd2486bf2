"""Show a plan: a table for a terminal, numbers for programs, and the published cases."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import ceil
from typing import Any

from switchlora.bench.plan_numbers import IMAGES_PER_CORE, Phase, Plan

GIB = 2**30
Row = tuple[str, ...]


def page(plan: Plan) -> str:
    """Return a table of both phases, what follows from them, and a line for each warning.

    ValueError when one example does not fit: then times mean nothing.
    """
    refuse_what_cannot_fit(plan)
    remarks = [*misfits(plan), *warnings(plan)]
    return "\n".join([*head(plan), "", *aligned(rows(plan)), "", *conclusions(plan), *remarks])


def head(plan: Plan) -> list[str]:
    """Return what was asked for, and that it is predicted."""
    r = plan.request
    how = how_computed(r.compiled, r.graphs)
    parallel = f", {r.parallel}" if r.gpus > 1 else ""
    dtype = f", frozen weights in {r.residual_dtype}" if r.residual_dtype else ""
    rates = plan.machine
    source = "measured here" if plan.measured else plan.hardware.source
    return [
        f"{r.model}, {plan.parameters / 1e6:,.1f} M parameters, on {r.gpus} x "
        f"{plan.hardware.name}: {r.precision}, {how}{parallel}",
        f"batch {r.batch:,} ({r.share:,} a device), rank {r.rank}, trains "
        f"{' and '.join(r.train_factors)}{dtype}; predicted, intervals in brackets",
        f"rates ({source}): products {rates.product_rate / 1e12:,.3g} TFLOP/s, element-wise "
        f"{rates.bandwidth / 1e12:,.3g} TB/s, host {rates.host * 1e6:,.0f} us",
    ]


def how_computed(compiled: bool, graphs: bool) -> str:
    """Return how an update is computed, in a word."""
    return "graphs" if graphs else "compiled" if compiled else "eager"


def rows(plan: Plan) -> list[Row]:
    """Return the rows of the table: a title, and a cell for each phase."""
    share = plan.request.gpus
    return [
        ("", "full", "adapter"),
        row(plan, "an update, ms", lambda p: interval(1000 * p.seconds, p.error)),
        row(plan, f"{plan.unit} a second", lambda p: interval(plan.rate(p), p.error)),
        row(plan, f"{plan.unit} a second and device", lambda p: f"{plan.rate(p) / share:,.1f}"),
        row(plan, "device alone, ms", lambda p: f"{1000 * p.device:,.1f}"),
        row(plan, "host alone, ms", lambda p: f"{1000 * p.host:,.1f}"),
        row(plan, "exchange that nothing hides, ms", lambda p: f"{1000 * p.exchange:,.1f}"),
        row(plan, "memory of a device, GiB", lambda p: digits(p.memory / GIB)),
        row(plan, "  weights, moments, buckets", lambda p: digits(p.states / GIB)),
        row(plan, "largest batch of a device", lambda p: f"{p.largest:,}"),
        row(plan, "trained parameters, M", lambda p: f"{p.trained / 1e6:,.1f}"),
    ]


def row(plan: Plan, title: str, cell: Any) -> Row:
    """Return a row with a cell for each phase."""
    return title, cell(plan.full), cell(plan.adapter)


def interval(value: float, error: float) -> str:
    """Return a number with its interval, to three digits.

    >>> interval(812.3, 0.15)
    '812 (690-934)'
    """
    return f"{digits(value)} ({digits(value * (1 - error))}-{digits(value * (1 + error))})"


def digits(value: float) -> str:
    """Return a number to about three digits.

    >>> digits(0.0123), digits(12.34), digits(1234.5)
    ('0.012', '12.3', '1,234')
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}" if value < 1 else f"{value:.2f}"


def aligned(table: Sequence[Row]) -> list[str]:
    """Return lines with the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for title, *cells in table:
        shown = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join([title.ljust(widths[0]), *shown]))
    return lines


def conclusions(plan: Plan) -> list[str]:
    """Return the lines about the whole run."""
    r = plan.request
    hours, switched = plan.full_hours, plan.switched_hours
    lines = [
        f"the adapter phase is {interval(plan.speedup, plan.speedup_error)} times as fast as full "
        "training",
        f"{r.epochs} epochs of {r.size:,}: {digits(hours)} hours; with a switch at epoch "
        f"{r.switch_epoch} {digits(switched)} ({hours / switched:.2f} times as fast)",
        f"device-hours: {digits(hours * r.gpus)} and {digits(switched * r.gpus)}",
        break_even_line(plan),
        loader_line(plan),
    ]
    if plan.hardware.watts:
        energy = [digits(plan.kilowatt_hours(each)) for each in (hours, switched)]
        lines[2] += f"; at full power {energy[0]} and {energy[1]} kWh"
    return lines


def break_even_line(plan: Plan) -> str:
    """Return the last epoch at which a switch saves time."""
    if plan.break_even is None:
        return "a switch saves no time here, at any epoch"
    return (
        f"a switch takes about {plan.switch_seconds:.0f} s: it saves time up to epoch "
        f"{plan.break_even} of {plan.request.epochs}"
    )


def loader_line(plan: Plan) -> str:
    """Return what the loader has to bring in the faster phase."""
    fastest = max(plan.rate(plan.full), plan.rate(plan.adapter))
    line = (
        f"the loader must bring {digits(fastest)} {plan.unit} a second, "
        f"{digits(fastest * plan.example_bytes / 1e9)} GB/s"
    )
    if plan.unit != "images" or plan.example_bytes < 3 * 96**2:
        return line
    cores = ceil(fastest / IMAGES_PER_CORE)
    return f"{line}: about {cores} cores that decode JPEG"


def refuse_what_cannot_fit(plan: Plan) -> None:
    """Raise ValueError when full training cannot hold one example on a device."""
    if plan.full.largest:
        return
    r = plan.request
    model = f"full training of {r.model} does not fit {r.gpus} x {plan.hardware.name}"
    states = f"{plan.full.states / GIB:,.0f} of {plan.capacity / GIB:,.0f} GiB"
    alone = "; the adapter phase alone would fit" if plan.adapter.largest else ""
    raise ValueError(
        f"{model}: weights, gradients and moments take {states}; {way_out(plan)}{alone}"
    )


def way_out(plan: Plan) -> str:
    """Return what would make a model fit."""
    needed = ceil(plan.full.all_states / (0.8 * plan.capacity))
    if plan.request.parallel == "ddp" and needed > 1:
        return (
            f"system.parallel=fsdp shares them: at least {needed} of these devices, beside "
            "activations; or tensor parallelism, which this project does not have"
        )
    if plan.full.states > plan.capacity:
        return (
            f"it needs at least {needed} of these devices, or tensor parallelism, which this "
            "project does not have"
        )
    return "one example's activations do not: full.activation_checkpointing=blocks"


def misfits(plan: Plan) -> list[str]:
    """Return a line for each phase whose batch does not fit."""
    lines = []
    for phase in (plan.full, plan.adapter):
        if phase.memory > plan.capacity:
            lines.append(misfit(plan, phase))
    return lines


def misfit(plan: Plan, phase: Phase) -> str:
    """Return by how much the batch of a phase is too large, and what to do."""
    r = plan.request
    micro = r.share // r.accumulation
    parts = [
        n for n in range(1, r.share + 1) if r.share % n == 0 and r.share // n <= phase.largest
    ]
    what = f"full.accumulation={parts[0]}" if parts else "fewer examples on each device"
    return (
        f"DOES NOT FIT: {micro} examples in the {phase.name} phase take "
        f"{phase.memory / GIB:,.1f} of {plan.capacity / GIB:,.1f} GiB: {what}"
    )


def warnings(plan: Plan) -> list[str]:
    """Return a line where the host is the limit, and one where the adapter is slower."""
    found = []
    waiting = [phase.name for phase in (plan.full, plan.adapter) if phase.waits_for_host]
    if waiting:
        found.append(
            f"waits for the host ({', '.join(waiting)}): a larger batch, a faster host; "
            "host=... sets its microseconds"
        )
    if plan.speedup < 1:
        found.append("the adapter phase is slower: what it saves here is memory, not time")
    return found


def plain(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain numbers, in seconds, bytes and hours."""
    refuse_what_cannot_fit(plan)
    phases = {}
    for name, phase in (("full", plan.full), ("adapter", plan.adapter)):
        span = [phase.seconds * (1 - phase.error), phase.seconds * (1 + phase.error)]
        phases[name] = {
            **asdict(phase),
            "seconds": phase.seconds,
            "seconds_interval": span,
            "examples_per_second": plan.rate(phase),
            "fits": phase.memory <= plan.capacity,
        }
    return {
        "predicted": True,
        "request": asdict(plan.request),
        "rates_measured": plan.measured,
        "machine": asdict(plan.machine),
        "parameters": plan.parameters,
        "phases": phases,
        "speedup": plan.speedup,
        "speedup_interval": [
            plan.speedup * (1 - plan.speedup_error),
            plan.speedup * (1 + plan.speedup_error),
        ],
        "hours": {"full": plan.full_hours, "switched": plan.switched_hours},
        "kilowatt_hours": {
            "full": plan.kilowatt_hours(plan.full_hours),
            "switched": plan.kilowatt_hours(plan.switched_hours),
        },
        "break_even_epoch": plan.break_even,
        "remarks": [*misfits(plan), *warnings(plan)],
    }


def cases_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return measured updates beside predicted ones."""
    table: list[Row] = [("model", "device", "batch", "arm", "measured ms", "predicted", "off", "")]
    for case in cases:
        off = case["predicted"] / case["measured"] - 1
        how = how_computed(case.get("compiled", True), case.get("graphs", False))
        table.append(
            (
                f"{case['model']}, {how}",
                case["hardware"],
                str(case["batch"]),
                case.get("arm", "full"),
                f"{case['measured']:.1f}",
                f"{case['predicted']:.1f}",
                f"{100 * off:+.0f} %",
                "fitted" if case.get("fitted") else "held out",
            )
        )
    return "\n".join(aligned(table))
