"""Format what a run reports: lines on the terminal, keys of its events, the final table."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from statistics import median
from typing import Any

from switchlora.criteria import LOSS, Verdict
from switchlora.learner import FactorBalance
from switchlora.monitor import Measurement
from switchlora.names import counted, family
from switchlora.switching import Outcome, SwitchReport

SHOWN_HOLDING_BACK = 3
EXPECTED_DRIFT = 1e-5
ENOUGH = 0.9
"""captured energy below which runs lost accuracy, on images and text (docs/results/signals.md)"""
BALANCED_ENOUGH = 0.3
"""||B|| / ||A|| at which refactoring begins without a warning; published runs begin at 0.5 to 3"""
WITHOUT_RATIO = ("updates", "last val top1, %")
LATER_PHASES = ("adapter", "staged", "joint")
MEMORY_PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "ema": "EMA",
    "monitor_reference": "monitor reference ({reference})",
    "ddp_buckets": "DDP buckets",
    "activations": "activations",
    "total": "total on {model}",
}


NOTHING = f"{0:,.2f}"
"""MiB of a part that holds nothing"""


def switch_metrics(report: SwitchReport, verdict: Verdict) -> dict[str, Any]:
    """Return the keys and values of the 'switch' event."""
    metrics: dict[str, Any] = {
        "switch/fired": True,
        "switch/reason": verdict.reason,
        "switch/drift": report.drift,
        "switch/rounding_drift": report.rounding_drift,
        "switch/seconds": report.seconds,
        "switch/moments_carried": report.moments_carried,
        "params/trainable_before": report.trainable_before,
        "params/trainable": report.trainable_after,
        "switch/left_full": list(report.left_full),
        "switch/checksum": report.checksum,
    }
    rows = []
    for name, rank in report.ranks.items():
        energy = report.captured_energy[name]
        metrics[f"switch/rank/{name}"] = rank
        metrics[f"switch/captured_energy/{name}"] = energy
        rows.append([name, rank, energy])
    columns = ["target", "rank", "captured_energy"]
    metrics["switch/ranks"] = {"columns": columns, "data": rows}
    return metrics


def measurement_line(measurement: Measurement, verdict: Verdict) -> str:
    """Return one line: the loss, the median relative update norm, and the criterion's answer."""
    moved = median(stats.relative_update_norm for stats in measurement.layers.values())
    return (
        f"update {measurement.num_updates:>6} | epoch {measurement.epoch:6.2f} | "
        f"loss {measurement.train_loss:.4f} | update norm {100 * moved:.2f} % | "
        f"{_standing(verdict)}"
    )


def eval_line(epoch: int, phase: str, metrics: Mapping[str, float]) -> str:
    """Return one line of validation metrics."""
    average = f" | EMA top1 {metrics['ema_top1']:.2f} %" if "ema_top1" in metrics else ""
    return (
        f"epoch {epoch:>3} done | {phase} phase | val loss {metrics['loss']:.4f} | "
        f"val top1 {metrics['top1']:.2f} %{average}"
    )


def switch_lines(
    report: SwitchReport, verdict: Verdict, num_updates: int, epoch: float
) -> list[str]:
    """Return lines that say why the switch fired, the ranks per family, and what it changed."""
    lines = [f"{_title(report)} at update {num_updates} (epoch {epoch:.2f}): {verdict.reason}"]
    frozen = [name for name, rank in report.ranks.items() if not rank]
    if frozen:
        lines.append(f"  frozen without an adapter: {', '.join(frozen)}")
    for row in rank_rows(report.ranks):
        lines.append(f"  ranks {row}")
    if report.left_full:
        lines.append(
            f"  left full, since factors of their rank would save too little: "
            f"{', '.join(report.left_full)}"
        )
    lines.append(
        f"  trained parameters {report.trainable_before:,} -> {report.trainable_after:,} "
        f"({report.trainable_after / report.parameters:.1%} of the model{_left_out(report)}) | "
        f"captured energy {_captured(report)} | max logit drift {report.drift:.1e} | "
        f"{report.seconds:.2f} s"
    )
    if report.rounding_drift is not None:
        lines.append(
            f"  residual weights rounded: the logits move by {report.rounding_drift:.1e} more"
        )
    if report.drift > EXPECTED_DRIFT:
        lines.append(f"  warning: the logits moved by more than {EXPECTED_DRIFT:g}")
    return lines


def missing_rank_lines(report: SwitchReport, asked: float) -> list[str]:
    """Return a line where an adapter holds less than ``ENOUGH`` of the recent update, or none.

    None too where it holds the share that was ``asked`` for.
    """
    held = _held_energy(report)
    thin = [name for name, energy in held.items() if energy < min(ENOUGH, asked)]
    if not thin:
        return []
    least = min(thin, key=held.__getitem__)
    return [
        f"  {len(thin)} of {len(held)} adapters hold less than {ENOUGH:g} of the recent update "
        f"({least}: {held[least]:.2f}), where runs lost accuracy: a larger switch.rank.share "
        "holds more"
    ]


def change_line(kind: str, where: str, what: str, outcome: Outcome) -> str:
    """Return one line about a change other than a switch."""
    rounded = ""
    if outcome.rounding_drift is not None:
        rounded = f" and {outcome.rounding_drift:.1e} by rounding residual weights"
    return (
        f"{kind.upper().replace('_', ' ')} at {where}: {what} | trained parameters "
        f"{outcome.trainable_before:,} -> {outcome.trainable_after:,} | max logit drift "
        f"{outcome.drift:.1e}{rounded} | {outcome.seconds:.2f} s"
    )


def speedup_lines(parts: Mapping[str, float], warning: str | None) -> list[str]:
    """Return lines with the predicted speed-up of an update and its factors.

    The cost model's ``warning``, if any, is the last line.
    """
    shown = " x ".join(f"{name} {part:.2f}" for name, part in parts.items())
    lines = [f"  predicted speed of an update: {math.prod(parts.values()):.2f} = {shown}"]
    if warning:
        lines.append(f"  warning: {warning}")
    return lines


def _title(report: SwitchReport) -> str:
    if not report.waiting:
        return "SWITCH"
    return f"STAGE of {len(report.ranks)} targets, {len(report.waiting)} train on,"


def _left_out(report: SwitchReport) -> str:
    return "; B trains, A stays" if list(report.factors) == ["B"] else ""


def _held_energy(report: SwitchReport) -> dict[str, float]:
    """Return the captured energy of the targets that have an adapter."""
    return {name: e for name, e in report.captured_energy.items() if report.ranks[name]}


def _captured(report: SwitchReport) -> str:
    found = _held_energy(report).values()
    if not found or any(map(math.isnan, found)):
        return "of no update"
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def rank_rows(ranks: Mapping[str, int]) -> list[str]:
    """Return one row per family of targets: its ranks from the first block to the last.

    Targets of rank 0 are left out.
    """
    families: dict[str, list[str]] = {}
    for name, rank in ranks.items():
        if rank:
            families.setdefault(family(name), []).append(str(rank))
    width = max(map(len, families), default=0)
    return [f"{name:<{width}}  {' '.join(found)}" for name, found in families.items()]


def balance_metrics(found: FactorBalance) -> dict[str, float]:
    """Return the keys and values that say how balanced the factors are."""
    return {"factors/norm_ratio": found.norm_ratio, "factors/spread": found.spread}


def refactoring_lines(num_updates: int, found: FactorBalance) -> list[str]:
    """Return lines that say how balanced the factors were when their refactoring began."""
    lines = [
        f"refactoring begins at update {num_updates}: median |B|/|A| {found.norm_ratio:.2g}, "
        f"spread of S {found.spread:.2g}"
    ]
    if found.norm_ratio < BALANCED_ENOUGH:
        lines.append(
            "  warning: B is so much smaller than A that refactoring can slow it down: raise "
            "adapter.refactoring.warmup_updates, or give adapter.refactoring.start_balance=0.5"
        )
    return lines


def never_refactored_line(found: FactorBalance) -> str:
    """Return a line about a run that ends before its refactoring began."""
    return (
        f"refactoring never began: median |B|/|A| is {found.norm_ratio:.2g} at the end; lower "
        "adapter.refactoring.warmup_updates or start_balance, or make the run longer"
    )


def never_switched_lines(
    verdict: Verdict, measured: int, failures: Sequence[str] = ()
) -> list[str]:
    """Return lines that say why the run ends in the full phase.

    - With ``failures``: the switch was undone, for the last of these reasons.
    - Otherwise: the criterion never fired, and which margins held it back most.
    """
    if failures:
        times = counted(len(failures), "time")
        return [f"The criterion fired, but the switch was undone {times}: {failures[-1]}"]
    windows = counted(measured, "measurement")
    lines = [f"The switch never fired in {windows}: {verdict.reason}"]
    negative = {name: margin for name, margin in verdict.margins.items() if margin < 0}
    worst = sorted(negative, key=lambda name: negative[name])[:SHOWN_HOLDING_BACK]
    if worst:
        held = ", ".join(f"{name} by {-negative[name]:.3g}" for name in worst)
        lines.append(f"  held back most by: {held}")
    return lines


def export_lines(merged: Sequence[str]) -> list[str]:
    """Return a line about the linears of ``adapter/`` that PEFT gets merged, if there are any."""
    if not merged:
        return []
    return [
        f"adapter/: {len(merged)} linear(s), such as {merged[0]}, are merged into its "
        "residual.safetensors, since timm and torch read their weights past an adapter"
    ]


def no_export_lines(unmergeable: Sequence[str]) -> list[str]:
    """Return a line on why the run has no merged model and no adapter, if there is a reason."""
    if not unmergeable:
        return []
    return [
        f"there is no model.safetensors and no adapter/: {len(unmergeable)} layer(s), such as "
        f"{unmergeable[0]}, are no matrix that timm or PEFT could load; the last checkpoint holds "
        "the model"
    ]


def not_finite_lines(skipped_averages: int, unmeasured: int) -> list[str]:
    """Return lines on how often a weight or a measured number was not finite; none for never."""
    lines = []
    if skipped_averages:
        updates = counted(skipped_averages, "update")
        lines.append(f"the weight average (EMA) left out {updates}")
    if unmeasured:
        windows = counted(unmeasured, "measurement")
        lines.append(f"{windows} held a number that was not finite")
    return lines


def final_table(phases: Mapping[str, Mapping[str, Any]], device: str) -> list[str]:
    """Return a table of the phases side by side.

    With exactly two phases, a last column has the ratio of the second to the first. On a CPU the
    table has no peak memory: that of a process is mostly the libraries that it has loaded.
    """
    rows: list[tuple[str, Callable[[Any], Any], Callable[[Any], str]]] = [
        ("updates", itemgetter("num_updates"), "{:,}".format),
        ("images/s", itemgetter("images_per_second"), "{:,.0f}".format),
        ("epoch, s", itemgetter("epoch_seconds"), "{:,.1f}".format),
        ("memory held, MiB", partial(_held, part="total"), _mebibytes),
        ("optimizer state, MiB", partial(_held, part="optimizer_state"), _mebibytes),
        ("peak memory, MiB", itemgetter("peak_memory_bytes"), _mebibytes),
        ("trained parameters", itemgetter("trainable_parameters"), "{:,}".format),
        ("last val top1, %", itemgetter("val_top1"), "{:.2f}".format),
    ]
    titles = [f"{name} phase" for name in phases]
    if len(phases) == 2:
        titles.append("ratio")
    lines = [_row("", titles)]
    for label, read, form in rows:
        if device == "cpu" and label.startswith("peak"):
            continue
        values = list(map(read, phases.values()))
        cells = ["-" if value is None else form(value) for value in values]
        if len(values) == 2 and all(values) and label not in WITHOUT_RATIO:
            cells.append(f"{values[1] / values[0]:.2f}")
        lines.append(_row(label, cells))
    return lines


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:<20}" + "".join(f"{cell:>16}" for cell in cells)


def _held(phase: Mapping[str, Any], part: str) -> int | None:
    """Return the bytes of a part, measured after an update of the phase, if it had one."""
    memory = phase.get("memory") or {}
    size: int | None = (memory.get("measured") or {}).get(part)
    return size


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def memory_metrics(
    measured: Mapping[str, int | None], predicted: Mapping[str, int | None]
) -> dict[str, Any]:
    """Return the keys of a 'memory' event, in bytes.

    They are ``memory/<part>`` and ``memory/<part>_predicted``.
    """
    metrics: dict[str, Any] = {}
    for part, size in measured.items():
        metrics[f"memory/{part}"] = size
        metrics[f"memory/{part}_predicted"] = predicted[part]
    return metrics


def memory_table(
    memory: Mapping[str, Mapping[str, Mapping[str, int | None]]], **devices: str
) -> list[str]:
    """Return a table of the MiB of each part in the full phase and in the latest phase.

    A '-' stands for an unknown value. A part that holds nothing has no row. ``devices`` has two
    names: ``model``, the device whose total is shown, and ``reference``, the device of the
    monitor's reference weights.
    """
    later = next((phase for phase in LATER_PHASES if phase in memory), "adapter")
    columns = []
    for phase in ("full", later):
        found = memory.get(phase, {})
        columns += [found.get("measured", {}), found.get("predicted", {})]
    titles = ["full", "predicted", later, "predicted", "ratio"]
    lines = [_memory_row("memory, MiB", titles)]
    for part, label in MEMORY_PARTS.items():
        sizes = [column.get(part) for column in columns]
        cells = ["-" if size is None else f"{size / 2**20:,.2f}" for size in sizes]
        if part != "total" and NOTHING in cells and not set(cells) - {NOTHING, "-"}:
            continue
        full, _, adapter, _ = sizes
        cells.append(f"{adapter / full:.2f}" if full and adapter is not None else "-")
        lines.append(_memory_row(label.format(**devices), cells))
    return lines


def _memory_row(label: str, cells: Sequence[str]) -> str:
    return f"  {label:<24}" + "".join(f"{cell:>11}" for cell in cells)


def _standing(verdict: Verdict) -> str:
    if verdict.fires:
        return "the criterion fires"
    if not verdict.margins:
        return verdict.reason
    worst = min(verdict.margins, key=lambda name: verdict.margins[name])
    layers = [margin for name, margin in verdict.margins.items() if name != LOSS]
    converged = ""
    if layers:
        number = sum(margin >= 0 for margin in layers)
        converged = f"converged {number}/{len(layers)} | "
    return f"{converged}smallest margin {verdict.margins[worst]:.3g} ({worst})"
