"""The changes of a run's trained tensors, each with its log lines, events and record.

``try_switch`` puts adapters on targets. ``end_joint_phase`` freezes their weights.
``restart_adapter`` and ``try_growing`` replace the adapters. ``try_taking_back`` returns to full
training. When a change fails, the run goes on as it was (``attempt``).
"""

import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from switchlora.adapters import Target, set_mix
from switchlora.cost import Prediction, speedup_parts, warning
from switchlora.criteria import Verdict
from switchlora.errors import SwitchFailed
from switchlora.learner import Learner, module_gradients
from switchlora.policy import Standing, extrapolate
from switchlora.process import distributed
from switchlora.run.forecast import predicted_update
from switchlora.run.messages import change_line, speedup_lines, switch_lines, switch_metrics
from switchlora.run.run import Run
from switchlora.run.saving import save
from switchlora.run.state import Phase, TrainState
from switchlora.switching import (
    Outcome,
    SwitchReport,
    grow,
    restart,
    settle,
    switch,
    take_back,
    with_frozen_front,
)


def weight_gradients(run: Run, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Return the loss gradient (out, in) with respect to each target's effective weight.

    It is computed on this rank's share of the first micro-batch of epoch ``state.epoch``. After an
    evaluation that is the next one to train on. ``.grad`` and the order of the epoch's batches
    stay as they are.
    """
    run.data.set_epoch(run.state.epoch)
    inputs, labels = next(iter(run.data.train))
    if run.data.mixup is not None:
        inputs, labels = run.data.mixup(inputs, labels)
    micro_batch = run.learner.recipe.accumulation
    inputs, labels = inputs.chunk(micro_batch)[0], labels.chunk(micro_batch)[0]
    names = sorted({target.module for target in targets.values()})
    recipe = run.learner.recipe
    found = module_gradients(run.model, names, run.data.loss, recipe.precision, inputs, labels)
    return {name: found[target.module][target.rows] for name, target in targets.items()}


T = TypeVar("T", bound=Outcome)
TRIES = 3
"""after this many failures in a row for the same reason, no further change is tried"""


def given_up(state: TrainState) -> bool:
    """Return whether the last ``TRIES`` failed changes all failed for the same reason."""
    last = state.failed_switches[-TRIES:]
    return len(last) == TRIES and len(set(last)) == 1


def try_switch(run: Run, verdict: Verdict, chosen: list[str]) -> bool:
    """Put adapters on the ``chosen`` targets, and return whether that succeeded."""
    state, whole = run.state, len(chosen) == len(run.monitor.targets)
    figures = run.phase_summary()
    expected = None if run.policy.joint_epochs else predicted_update(run)
    phase = Phase.JOINT if run.policy.joint_epochs else Phase.ADAPTER if whole else Phase.STAGED
    known, probe = run.monitor.known, run.probe

    def change() -> tuple[Learner, SwitchReport]:
        policy = with_frozen_front(run.model, run.policy, known, verdict.margins, chosen, probe)
        return switch(
            run.learner,
            policy,
            run.monitor,
            state.fresh_history,
            probe,
            lambda model: run.build_learner(model, phase),
            chosen,
            run.sample if policy.least_gain is not None else None,
        )

    report = attempt(run, "switch", change)
    if report is None:
        return False
    kind = "stage" if run.policy.stages else "switch"
    reason = verdict.reason if verdict.fires else f"{len(chosen)} targets have converged alone"
    enter(run, phase, kind, report, reason, figures)
    state.transitions[-1] |= {"ranks": dict(report.ranks), "left_full": list(report.left_full)}
    if state.switch_report is None:
        state.switch_report = report
        state.switch_update, state.switch_epoch = state.num_updates, run.epoch
    else:
        state.switch_report = report.after(state.switch_report)
    state.last_stage = state.guarded_since = state.num_updates
    if phase is Phase.JOINT:
        length = max(1, round(run.policy.joint_epochs * len(run.data.train)))
        state.joint_until = state.num_updates + length
    watch_the_rest(run, report.waiting)
    tell_switch(run, report, verdict, expected)
    return True


def tell_switch(
    run: Run, report: SwitchReport, verdict: Verdict, expected: Prediction | None
) -> None:
    """Log lines and a 'switch' event: its reason, what changed, and the predicted speed-up."""
    state = run.state
    for line in switch_lines(report, verdict, state.num_updates, run.epoch):
        run.log.line(line)
    if state.joint_until is not None:
        late = ", which never comes" if state.joint_until > run.last_update else ""
        run.log.line(
            f"  weights and factors train together until update {state.joint_until}{late}"
        )
    if run.policy.guard is not None and extrapolate(state.losses, "train") is None:
        run.log.line("  the guard has too short a full phase to compare with, and stays silent")
    tell_agreement(run, report)
    speedup = tell_speed(run, expected)
    metrics = switch_metrics(report, verdict) | {f"speedup/{k}": v for k, v in speedup.items()}
    run.log.event("switch", state.num_updates, run.epoch, **metrics)


def tell_speed(run: Run, expected: Prediction | None) -> dict[str, float]:
    """Log and return the predicted speed-up of an update, split into its factors.

    ``expected`` is the cost model's prediction for the phase before the change. Return an empty
    dictionary when either prediction is missing.
    """
    if expected is None or (now := predicted_update(run)) is None:
        return {}
    speedup = speedup_parts(expected, now)
    run.state.transitions[-1]["predicted_speedup"] = speedup
    for line in speedup_lines(speedup, warning(expected, now)):
        run.log.line(line)
    return speedup


def watch_the_rest(run: Run, waiting: Collection[str]) -> None:
    """Let the monitor watch only what is still to be measured, and drop the other references.

    - In the adapter phase of a policy with restarts: the adapted targets, from one merge to the
      next.
    - Otherwise: the ``waiting`` targets, which may switch later.
    """
    monitor, how = run.monitor, run.policy.restart
    adapted = run.adapted_targets if how is not None and run.state.phase is Phase.ADAPTER else ()
    cycle = 0.0 if how is None else how.every_epochs * len(run.data.train)
    monitor.window = max(1, round(cycle)) if adapted else run.window
    monitor.watch(adapted or waiting, run.state.num_updates)


def watch_as_configured(run: Run) -> None:
    """Set the monitor's window and targets as this run's configuration says.

    A run that goes on from another run's checkpoint may have another window, or restarts where
    the other run had none.
    """
    if run.state.phase is not Phase.ADAPTER or run.policy.restart is None:
        run.monitor.window = run.window
    if run.state.phase is Phase.ADAPTER and bool(run.policy.restart) != bool(run.monitor.targets):
        watch_the_rest(run, ())


def end_joint_phase(run: Run) -> None:
    """End the joint phase: freeze the targets' weights, so that only their factors train."""
    state = run.state
    assert state.switch_report is not None
    set_mix(run.model, 0.0, state.num_updates)
    with run.stopwatch.paused():
        figures, expected = run.phase_summary(), predicted_update(run)
        change = partial(
            settle,
            run.learner,
            run.policy,
            run.monitor.known,
            state.switch_report.ranks,
            run.probe,
            lambda model: run.build_learner(model, Phase.ADAPTER),
        )
        outcome = attempt(run, "end of the joint phase", change)
        state.joint_until = None
        if outcome is None:
            return
        reason = f"the joint phase of {run.policy.joint_epochs:g} epochs is over"
        enter(run, Phase.ADAPTER, "settle", outcome, reason, figures)
        watch_the_rest(run, ())
        tell(run, "settle", outcome, reason)
        tell_speed(run, expected)
    if run.policy.skip_rest_of_epoch:
        state.position = len(run.data.train)
    begin_segment(run)


def restart_adapter(run: Run) -> None:
    """Merge the adapters and go on with new ones (ReLoRA, arXiv 2307.05695)."""
    state = run.state
    change = partial(
        restart,
        run.learner,
        run.policy,
        run.monitor,
        state.fresh_history,
        run.probe,
        lambda model: run.build_learner(model, Phase.ADAPTER),
        state.num_updates,
    )
    outcome = attempt(run, "restart", change)
    if outcome is None:
        return
    release_memory(run.device)
    note_transition(run, "restart", outcome, "a cycle of updates is over")
    tell(run, "restart", outcome, "the adapters are merged, new ones begin")


def try_growing(run: Run, standing: Standing) -> bool:
    """Multiply the ranks by the guard's ``growth``, and return whether that succeeded."""
    state, guard = run.state, run.policy.guard
    assert guard is not None and state.switch_report is not None
    figures = run.phase_summary()
    change = partial(
        grow,
        run.learner,
        run.policy,
        run.monitor.known,
        lambda: weight_gradients(run, run.adapted_targets),
        guard.growth,
        run.probe,
        lambda model: run.build_learner(model, state.phase),
    )
    outcome = attempt(run, "growth of the ranks", change)
    if outcome is None:
        return False
    enter(run, state.phase, "grow", outcome, standing.reason, figures)
    state.transitions[-1]["ranks"] = dict(outcome.ranks)
    merged = {**state.switch_report.ranks, **outcome.ranks}
    state.switch_report = replace(state.switch_report, ranks=merged)
    tell(run, "grow", outcome, f"ranks are {guard.growth} times what they were")
    return True


def try_taking_back(run: Run, standing: Standing) -> bool:
    """Merge the adapters and train all parameters again; return whether that succeeded.

    The criterion then sees only measurements made from now on.
    """
    state = run.state
    figures = run.phase_summary()
    change = partial(
        take_back,
        run.learner,
        run.policy,
        state.full_parameters,
        run.probe,
        lambda model: run.build_learner(model, Phase.FULL),
    )
    state.taken_back += 1
    outcome = attempt(run, "return to full training", change)
    if outcome is None:
        state.taken_back -= 1
        return False
    enter(run, Phase.FULL, "take_back", outcome, standing.reason, figures)
    state.switch_report = state.switch_update = state.switch_epoch = None
    state.joint_until = state.last_stage = None
    state.forgotten = len(state.history)
    watch_the_rest(run, run.monitor.known)
    tell(run, "take_back", outcome, "all parameters train again")
    return True


def enter(
    run: Run,
    phase: Phase,
    kind: str,
    outcome: Outcome,
    reason: str,
    figures: Mapping[str, Any],
) -> None:
    """Record a change of the trained tensors, and enter ``phase``.

    ``figures`` describe the segment of training that ends here.
    """
    run.state.end_segment(figures)
    note_transition(run, kind, outcome, reason)
    run.state.phase = phase
    run.state.recorded = False
    run.monitor.model = run.model


def note_transition(run: Run, kind: str, outcome: Outcome, reason: str) -> None:
    """Add a change of the trained tensors to the run's record."""
    run.state.transitions.append(
        {
            "kind": kind,
            "num_updates": run.state.num_updates,
            "epoch": run.epoch,
            "reason": reason,
            "trainable_before": outcome.trainable_before,
            "trainable_after": outcome.trainable_after,
            "drift": outcome.drift,
            "moments_carried": outcome.moments_carried,
            "seconds": outcome.seconds,
        }
    )


def begin_segment(run: Run) -> None:
    """Start a new segment: free the replaced tensors, restart the stopwatch, save a checkpoint."""
    release_memory(run.device)
    run.stopwatch.start_phase()
    save(run)


def tell(run: Run, kind: str, outcome: Outcome, what: str) -> None:
    """Log a line and an event for a change other than a switch."""
    where = f"update {run.state.num_updates} (epoch {run.epoch:.2f})"
    run.log.line(change_line(kind, where, what, outcome))
    tell_agreement(run, outcome)
    here = ("kind", "num_updates", "epoch")
    noted = run.state.transitions[-1]
    metrics = {f"{kind}/{key}": value for key, value in noted.items() if key not in here}
    run.log.event(kind, run.state.num_updates, run.epoch, **metrics)


def tell_agreement(run: Run, outcome: Outcome) -> None:
    """Log, with several processes, that all of them train the same tensors."""
    if distributed.world_size() > 1:
        run.log.line(f"  {distributed.agreement_line(outcome.checksum)}")


def attempt(run: Run, what: str, change: Callable[[], tuple[Learner, T]]) -> T | None:
    """Make a ``change`` and return its outcome.

    When it fails, log the failure and return None. The run then goes on as it was.
    """
    try:
        run.learner, outcome = change()
    except SwitchFailed as failure:
        not_changed(run, what, failure)
        return None
    return outcome


def not_changed(run: Run, what: str, failure: SwitchFailed) -> None:
    """Log that a change failed and was undone, and add it to ``state.failed_switches``."""
    state = run.state
    run.log.line(f"the {what} failed and was undone, {state.phase} training goes on: {failure}")
    run.log.event("switch_failed", state.num_updates, run.epoch, what=what, reason=str(failure))
    state.failed_switches.append(f"{what}: {failure}")
    if given_up(state):
        run.log.line(f"it failed {TRIES} times in the same way and is not tried again")


def release_memory(device: torch.device) -> None:
    """Free the memory of replaced optimizer state, gradients and weights."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
