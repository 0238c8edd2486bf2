"""Tell what a run did: its lines and events about a measurement or a change."""

from switchlora.criteria import Verdict
from switchlora.initializers import from_updates
from switchlora.monitor import Measurement
from switchlora.policy import extrapolate
from switchlora.process import distributed
from switchlora.ranks import Budget
from switchlora.run.messages import (
    balance_metrics,
    change_line,
    measurement_line,
    missing_rank_lines,
    refactoring_lines,
    speedup_lines,
    switch_lines,
    switch_metrics,
)
from switchlora.run.run import Run
from switchlora.run.transitions import Changed
from switchlora.storage import measurement_metrics
from switchlora.switching import TRIES, ChangeFailed, SwitchReport

OMITTED = ("kind", "num_updates", "epoch", "predicted_speedup")
"""entries of a change's record that its event has no key for"""


def tell(run: Run, change: Changed) -> None:
    """Write the lines and the event about a change."""
    if isinstance(change.outcome, SwitchReport):
        _tell_switch(run, change, change.outcome)
    else:
        _tell_change(run, change)


def tell_measurement(run: Run, measurement: Measurement, verdict: Verdict) -> None:
    """Write a 'measure' event and a line on the terminal."""
    metrics = measurement_metrics(measurement, verdict)
    run.log.event("measure", measurement.num_updates, measurement.epoch, **metrics)
    run.log.line(measurement_line(measurement, verdict))


def tell_refactoring(run: Run) -> None:
    """Say how balanced the factors were when their refactoring began, if it just has."""
    learner = run.learner
    found, learner.balance_then = learner.balance_then, None
    if found is None or learner.refactored_from is None:
        return
    for line in refactoring_lines(learner.refactored_from, found):
        run.log.line(line)
    run.log.event("refactoring", learner.refactored_from, run.epoch, **balance_metrics(found))


def tell_compiler_fault(run: Run) -> None:
    """Say why blocks are not compiled, if the compiler has just failed."""
    fault, run.learner.compiler_fault = run.learner.compiler_fault, None
    if fault is not None:
        run.log.line(
            f"warning: torch.compile failed, the {run.state.phase} phase goes on without it "
            f"(full.compile=false asks for that): {fault}"
        )


def tell_skipped(run: Run) -> None:
    """Name the images that have turned out to be unreadable since it was last called.

    All ranks must call it.
    """
    skipped = run.all_skipped()
    for name in sorted(skipped - run.skipped):
        run.log.line(f"skipped, since it cannot be read: {name}")
    run.skipped = skipped


def _tell_switch(run: Run, change: Changed, report: SwitchReport) -> None:
    """Say why it switched, what changed, and how much faster an update should be."""
    state, verdict = run.state, run.state.verdict
    assert verdict is not None
    lines = switch_lines(report, verdict, state.num_updates, run.epoch)
    ranks = run.policy.rank
    if isinstance(ranks, Budget) and from_updates(run.policy.init):
        lines += missing_rank_lines(report, ranks.captured or 1.0)
    for line in lines:
        run.log.line(line)
    if state.joint_until is not None:
        late = ", which never comes" if state.joint_until > run.last_update else ""
        run.log.line(
            f"  weights and factors train together until update {state.joint_until}{late}"
        )
    if run.policy.guard is not None and extrapolate(state.losses, "train") is None:
        run.log.line("  the guard has too short a full phase to compare with, and stays silent")
    _tell_agreement(run, change)
    _tell_speed(run, change)
    metrics = switch_metrics(report, verdict)
    for name, ratio in change.record.get("predicted_speedup", {}).items():
        metrics[f"speedup/{name}"] = ratio
    run.log.event("switch", state.num_updates, run.epoch, **metrics)


def _tell_change(run: Run, change: Changed) -> None:
    """Write a line and an event for a change other than a switch."""
    state, kind = run.state, change.record["kind"]
    where = f"update {state.num_updates} (epoch {run.epoch:.2f})"
    run.log.line(change_line(kind, where, change.what, change.outcome))
    _tell_agreement(run, change)
    metrics = {}
    for key, value in change.record.items():
        if key not in OMITTED:
            metrics[f"{kind}/{key}"] = value
    run.log.event(kind, state.num_updates, run.epoch, **metrics)
    _tell_speed(run, change)


def _tell_agreement(run: Run, change: Changed) -> None:
    """Say, with several processes, that all of them train the same tensors."""
    if distributed.world_size() > 1:
        run.log.line(f"  {distributed.agreement_line(change.outcome.checksum)}")


def _tell_speed(run: Run, change: Changed) -> None:
    """Write the predicted speed-up of an update, if it is known."""
    speedup = change.record.get("predicted_speedup")
    if speedup is not None:
        for line in speedup_lines(speedup, change.slow):
            run.log.line(line)


def tell_failure(run: Run, failed: ChangeFailed) -> None:
    """Say that a change failed and was undone, and whether it is tried again."""
    state, what, reason = run.state, failed.what, str(failed)
    run.log.line(f"the {what} failed and was undone, {state.phase} training goes on: {reason}")
    run.log.event("switch_failed", state.num_updates, run.epoch, what=what, reason=reason)
    if failed.for_good:
        run.log.line(f"it failed {TRIES} times in the same way and is not tried again")
