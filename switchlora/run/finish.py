"""End a run: test metrics, exported weights, summary, figures, and the closing lines."""

from pathlib import Path
from typing import Any

from torch import nn

from switchlora.adapters import adapted_modules, without_weight
from switchlora.data import Data
from switchlora.learner import Refactoring, factor_balance, refactored_from, trained_pairs
from switchlora.names import counted
from switchlora.process import is_primary, one_line, together
from switchlora.run.memory import memory_lines
from switchlora.run.messages import (
    export_lines,
    final_table,
    never_refactored_line,
    never_switched_lines,
    no_export_lines,
    not_finite_lines,
)
from switchlora.run.run import Run
from switchlora.run.state import Ledger, Phase, TrainState
from switchlora.run.tell import tell_skipped
from switchlora.storage import (
    environment,
    merged_for_peft,
    save_adapter,
    save_hub_layout,
    save_merged,
)

SPLITS = ("train", "val", "test")


def finish(run: Run, status: str) -> dict[str, Any]:
    """Write everything that a finished or stopped run leaves behind, and return its summary.

    Test metrics are computed unless ``status`` says that training stopped.
    """
    folder = run.log.folder
    run.ledger.end_segment(*run.segment())
    test = None if status.startswith("stopped") else evaluate_on_test(run)
    tell_skipped(run)
    summary = summarise(run, status, test)
    model = run.learner.plain()
    with together():
        if is_primary():
            mergeable = not without_weight(model)
            if mergeable:
                save_models(run, model, folder)
            run.log.summary(summary)
            if mergeable:
                describe(run, model, summary, folder)
            if run.config["log"]["figures"]:
                draw(run, folder)
    run.log.end_progress()
    for line in closing_lines(run, status, test, folder):
        run.log.line(line)
    return summary


def describe(run: Run, model: nn.Module, summary: dict[str, Any], folder: Path) -> None:
    """Write what the hub and timm read beside the weights; a line says what is not written."""
    try:
        for line in save_hub_layout(folder, model, run.config, run.data.classes, summary):
            run.log.line(line)
    except Exception as error:
        run.log.line(f"there is no model card: {one_line(error)}")


def draw(run: Run, folder: Path) -> None:
    """Draw the figures of the run; a line says why there are none."""
    try:
        from switchlora.analysis.figures import draw_figures  # matplotlib: only where it draws

        run.log.figures(draw_figures(folder))
    except Exception as error:
        run.log.line(f"there are no figures: {one_line(error)}")


def status_at_end(state: TrainState) -> str:
    """Return 'finished', or why a switch that was due is missing at the end of the run.

    It is missing when each try failed, and also when the last tries failed for the same reason
    and some weights still train in full.
    """
    failures = state.failed_switches
    stuck = state.given_up and state.phase is not Phase.ADAPTER
    if failures and (state.switch_report is None or stuck):
        return f"switch failed: {failures[-1].removeprefix('switch: ')}"
    return "finished"


def save_models(run: Run, model: nn.Module, folder: Path) -> None:
    """Save the merged weights of ``model``, those of its average, and the adapter alone.

    The average is saved when the run has one, the adapter when ``model`` has adapters.
    """
    save_merged(model, folder / "model.safetensors")
    if run.ema is not None:
        save_merged(run.ema.model, folder / "model_ema.safetensors")
    if adapted_modules(model):
        save_adapter(model, folder / "adapter")


def evaluate_on_test(run: Run) -> dict[str, float]:
    """Evaluate on the official test split, write a 'test' event, and return the metrics.

    No decision of the run is based on this split.
    """
    metrics = run.evaluate(run.data.test)
    named = {f"test/{name}": value for name, value in metrics.items()}
    run.log.event("test", run.state.num_updates, float(run.state.epoch), **named)
    return metrics


def summarise(run: Run, status: str, test: dict[str, float] | None) -> dict[str, Any]:
    """Return the content of ``summary.json``."""
    state, ledger = run.state, run.ledger
    report = state.switch_report
    switch: dict[str, Any] = {
        "fired": report is not None,
        "num_updates": state.switch_update,
        "epoch": ledger.switch_epoch,
        "reason": state.verdict.reason if state.verdict else None,
        "failures": state.failed_switches,
        "taken_back": state.taken_back,
    }
    if report is not None:
        switch |= vars(report)
    found = {
        "status": status,
        "num_updates": state.num_updates,
        "skipped_updates": ledger.skipped_updates,
        "skipped_averages": ledger.skipped_averages,
        "unmeasured": ledger.unmeasured,
        "val": {**(ledger.last_eval or {}), "best_top1": state.best_top1},
        "test": test,
        "images": sizes(run.data),
        "data": run.data_facts.summary() if run.data_facts else None,
        "switch": switch,
        "phases": phases_of(ledger),
        "transitions": ledger.transitions,
        "segments": ledger.segments,
        "cost": cost(ledger),
        "trunk": ledger.reused,
        "branched_from": ledger.branched_from,
        "monitor": {"time_share": run.stopwatch.monitor_share},
        "environment": environment(run.device, run.config["seed"]),
    }
    if run.skipped:
        found["skipped_images"] = sorted(run.skipped)
    return found


def sizes(data: Data) -> dict[str, int]:
    """Return the number of images, or of windows of text, of each split."""
    return {name: len(view) for name, view in zip(SPLITS, data.views, strict=True)}


def phases_of(ledger: Ledger) -> dict[Phase, dict[str, Any]]:
    """Return, by phase, its speed, parameter counts, memory and FLOPs."""
    found = {}
    for phase, figures in ledger.phases.items():
        costs = {"memory": ledger.memory.get(phase), "flops_per_update": ledger.flops.get(phase)}
        found[phase] = {**figures, **costs}
    return found


def cost(ledger: Ledger) -> dict[str, Any]:
    """Return what training cost in all: 'train_flops' and 'train_seconds'.

    'train_flops' is None when it is not known. Updates taken from a trunk count as if this run had
    computed them.
    """
    seconds = sum(figures["train_seconds"] for figures in ledger.phases.values())
    return {"train_flops": ledger.train_flops, "train_seconds": seconds}


def closing_lines(run: Run, status: str, test: dict[str, float] | None, folder: Path) -> list[str]:
    """Return the last lines of a run.

    They hold the table of phases, the memory table if it was not shown before, why the run never
    switched, the test metrics, and where the files are.
    """
    state, ledger = run.state, run.ledger
    phases = {str(phase): figures for phase, figures in phases_of(ledger).items()}
    lines = ["", *final_table(phases, run.device.type), ""]
    if state.phase is Phase.ADAPTER and Phase.ADAPTER not in ledger.memory:
        lines += [*memory_lines(run), ""]
    if state.phase is Phase.FULL and state.verdict is not None:
        if state.taken_back:
            lines.append(f"The switch was taken back {counted(state.taken_back, 'time')}")
        lines += never_switched_lines(state.verdict, len(state.history), state.failed_switches)
    lines += refactoring_missed(run)
    if run.skipped:
        lines.append(f"{len(run.skipped)} image(s) could not be read and were skipped")
    if test is not None:
        average = f" (EMA {test['ema_top1']:.2f} %)" if "ema_top1" in test else ""
        lines.append(f"test top1 {test['top1']:.2f} %{average}, loss {test['loss']:.4f}")
    lines += not_finite_lines(ledger.skipped_averages, ledger.unmeasured)
    share = run.stopwatch.monitor_share
    lines.append(f"the monitor took {share:.2%} of the training time")
    names = ["summary.json", "metrics.jsonl"]
    if run.config["log"]["figures"]:
        names.append("figures/")
    unmergeable = without_weight(run.model)
    lines += no_export_lines(unmergeable)
    if not unmergeable:
        names.insert(0, "model.safetensors")
    if adapted_modules(run.model) and not unmergeable:
        names.append("adapter/")
        lines += export_lines(merged_for_peft(run.model))
    if status.startswith("switch failed"):
        status = f"not as configured, trained in full to the end, {status}"
    lines.append(f"{status}; everything is in {folder}: {', '.join(names)}")
    return lines


def refactoring_missed(run: Run) -> list[str]:
    """Return a line if the run asked for a refactoring of its factors that has not begun."""
    pairs = trained_pairs(run.learner)
    asked = isinstance(run.learner.recipe.refactoring, Refactoring)
    if not asked or not pairs or refactored_from(run.learner) is not None:
        return []
    return [never_refactored_line(factor_balance(pairs))]
