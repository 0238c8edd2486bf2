"""What changes a run between two updates: a switch, or a stage of it, the end of the joint phase,
a restart, what the guard asks for. Each ends a segment of the run and begins another one."""

import gc
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from switchlora import distributed
from switchlora.cost import Prediction, speedup_parts, warning
from switchlora.criteria import Verdict
from switchlora.errors import SwitchFailed
from switchlora.forecast import predicted_update
from switchlora.gradients import weight_gradients
from switchlora.guard import Loss, Standing, extrapolate
from switchlora.lowrank import cosine_mix, set_mix
from switchlora.monitor import Measurement
from switchlora.plan import with_frozen_front
from switchlora.report import (
    change_line,
    measurement_line,
    measurement_metrics,
    speedup_lines,
    switch_lines,
    switch_metrics,
    window_metrics,
)
from switchlora.run import Run
from switchlora.saves import save
from switchlora.state import Phase, TrainState
from switchlora.switch import Outcome, SwitchReport, grow, restart, settle, switch, take_back

TRIES = 3
"""changes that fail for the same reason until no other is tried"""


def after_update(run: Run) -> None:
    """End the joint phase, or a window of updates, where it is time."""
    state = run.state
    if state.joint_until is not None and state.num_updates >= state.joint_until:
        end_joint_phase(run)
    if run.monitor.due(state.num_updates):
        end_window(run)


def end_window(run: Run) -> None:
    """Measure; then ask the criterion while weights train in full, or restart the adapter."""
    state = run.state
    with run.stopwatch.paused(monitor=True):
        here = run.monitor.measure(state.num_updates, run.epoch)
        measured = distributed.from_primary(lambda: here)
        note_loss(run, "train", measured.train_loss)
    if state.phase in (Phase.FULL, Phase.STAGED):
        state.history.append(measured)
        state.undecided = True
        consider_switch(run)
        return
    with run.stopwatch.paused():
        run.log.event("window", measured.num_updates, measured.epoch, **window_metrics(measured))
        restarts = state.phase is Phase.ADAPTER and run.policy.restart is not None
        if restarts and goes_on(run) and not given_up(state):
            restart_adapter(run)
        run.monitor.start_window(state.num_updates)


def goes_on(run: Run) -> bool:
    """Whether updates are left to make: a change after the last one would serve nothing."""
    return run.state.num_updates < run.last_update


def note_loss(run: Run, split: str, value: float) -> None:
    """For the guard: the loss of a window, or on the validation split."""
    run.state.losses.append(Loss(run.state.num_updates, split, str(run.state.phase), value))


def guide(run: Run) -> None:
    """Set how much guided layers still lean on their dense weights (2406.16450)."""
    state = run.state
    if state.joint_until is not None and state.switch_update is not None:
        length = state.joint_until - state.switch_update
        done = (state.num_updates - state.switch_update) / length
        set_mix(run.model, cosine_mix(done), state.num_updates)


def consider_switch(run: Run) -> None:
    """Ask the criterion; switch what has converged; when that fails, go on as before."""
    state = run.state
    share_measurement(run)
    verdict = distributed.from_primary(
        lambda: run.policy.decide(state.fresh_history, again=state.taken_back > 0)
    )
    chosen = run.policy.chosen(verdict, run.monitor.targets, state.num_updates, state.last_stage)
    if not goes_on(run) or given_up(state):
        chosen = []
    state.verdict = verdict
    if chosen:
        leave_trunk(run)
        save(run)
    with run.stopwatch.paused():
        if state.history:
            report_measurement(run, state.history[-1], verdict)
        switched = bool(chosen) and try_switch(run, verdict, chosen)
        state.undecided = False
    if switched:
        begin_segment(run)
    elif state.history:
        with run.stopwatch.paused(monitor=True):
            run.monitor.start_window(state.num_updates)


def given_up(state: TrainState) -> bool:
    """Whether the last changes that were tried failed for one and the same reason."""
    last = state.failed_switches[-TRIES:]
    return len(last) == TRIES and len(set(last)) == 1


def share_measurement(run: Run) -> None:
    """With the runs that have the same full phase."""
    if run.trunk is not None and run.state.history:
        with run.stopwatch.paused():
            run.trunk.publish(run)


def leave_trunk(run: Run) -> None:
    """From here on this run is its own."""
    if run.trunk is not None:
        with run.stopwatch.paused():
            run.trunk.leave(run)


def report_measurement(run: Run, measurement: Measurement, verdict: Verdict) -> None:
    """A 'measure' event and a line on the terminal."""
    run.log.event(
        "measure",
        measurement.num_updates,
        measurement.epoch,
        **measurement_metrics(measurement, verdict),
    )
    run.log.line(measurement_line(measurement, verdict))


def try_switch(run: Run, verdict: Verdict, chosen: list[str]) -> bool:
    """Put adapters on the ``chosen`` targets; whether it worked."""
    state, whole = run.state, len(chosen) == len(run.monitor.targets)
    figures = run.phase_summary()
    expected = None if run.policy.joint_epochs else predicted_update(run)
    phase = Phase.JOINT if run.policy.joint_epochs else Phase.ADAPTER if whole else Phase.STAGED
    known, probe = run.monitor.known, run.probe
    try:
        policy = with_frozen_front(run.model, run.policy, known, verdict.margins, chosen, probe)
        run.learner, report = switch(
            run.learner,
            policy,
            run.monitor,
            state.fresh_history,
            probe,
            lambda model: run.build_learner(model, phase),
            chosen,
            run.sample if policy.least_gain is not None else None,
        )
    except SwitchFailed as failure:
        not_changed(run, "switch", failure)
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
    """Lines and a 'switch' event: why, what changed, how much faster updates should be."""
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
    """Lines on how much faster updates should be than those ``expected`` before, by its parts."""
    if expected is None or (now := predicted_update(run)) is None:
        return {}
    speedup = speedup_parts(expected, now)
    run.state.transitions[-1]["predicted_speedup"] = speedup
    for line in speedup_lines(speedup, warning(expected, now)):
        run.log.line(line)
    return speedup


def watch_the_rest(run: Run, waiting: Collection[str]) -> None:
    """The monitor goes on with what is still to be measured, and lets go of the rest.

    Targets of later stages; or, where adapters are restarted, these, from one merge to the next.
    """
    monitor, how = run.monitor, run.policy.restart
    adapted = run.adapted_targets if how is not None and run.state.phase is Phase.ADAPTER else ()
    cycle = 0.0 if how is None else how.every_epochs * len(run.data.train)
    monitor.window = max(1, round(cycle)) if adapted else run.window
    monitor.watch(adapted or waiting, run.state.num_updates)


def watch_as_configured(run: Run) -> None:
    """A run that branches off may measure other windows, or restart where the other did not."""
    if run.state.phase is not Phase.ADAPTER or run.policy.restart is None:
        run.monitor.window = run.window
    if run.state.phase is Phase.ADAPTER and bool(run.policy.restart) != bool(run.monitor.targets):
        watch_the_rest(run, ())


def end_joint_phase(run: Run) -> None:
    """Freeze the targets' weights: from here on their factors train alone."""
    state = run.state
    assert state.switch_report is not None
    set_mix(run.model, 0.0, state.num_updates)
    with run.stopwatch.paused():
        figures, expected = run.phase_summary(), predicted_update(run)
        try:
            run.learner, outcome = settle(
                run.learner,
                run.policy,
                run.monitor.known,
                state.switch_report.ranks,
                run.probe,
                lambda model: run.build_learner(model, Phase.ADAPTER),
            )
        except SwitchFailed as failure:
            state.joint_until = None
            not_changed(run, "end of the joint phase", failure)
            return
        state.joint_until = None
        reason = f"the joint phase of {run.policy.joint_epochs:g} epochs is over"
        enter(run, Phase.ADAPTER, "settle", outcome, reason, figures)
        watch_the_rest(run, ())
        tell(run, "settle", outcome, reason)
        tell_speed(run, expected)
    if run.policy.skip_rest_of_epoch:
        state.position = len(run.data.train)
    begin_segment(run)


def restart_adapter(run: Run) -> None:
    """Merge the adapters and go on with new ones (ReLoRA)."""
    state = run.state
    try:
        run.learner, outcome = restart(
            run.learner,
            run.policy,
            run.monitor,
            state.fresh_history,
            run.probe,
            lambda model: run.build_learner(model, Phase.ADAPTER),
            state.num_updates,
        )
    except SwitchFailed as failure:
        not_changed(run, "restart", failure)
        return
    release_memory(run.device)
    note_transition(run, "restart", outcome, "a cycle of updates is over")
    tell(run, "restart", outcome, "the adapters are merged, new ones begin")


def look_after(run: Run) -> None:
    """Let the guard compare the losses since the switch with full training's, and act."""
    guard, state = run.policy.guard, run.state
    if guard is None or state.phase in (Phase.FULL, Phase.JOINT) or run.over:
        return
    standing = distributed.from_primary(lambda: guard(state.losses, state.guarded_since))
    if not standing.behind:
        return
    state.guarded_since = state.num_updates
    run.log.line(f"GUARD at update {state.num_updates}: {standing.reason}")
    metrics = {"guard/excess": standing.excess, "guard/reason": standing.reason}
    run.log.event("guard", state.num_updates, run.epoch, **metrics)
    if guard.act == "warn" or state.taken_back >= guard.most:
        return
    with run.stopwatch.paused():
        grown = guard.act == "ranks" and try_growing(run, standing)
        changed = grown or try_taking_back(run, standing)
    if changed:
        begin_segment(run)


def try_growing(run: Run, standing: Standing) -> bool:
    """Give the adapters more directions; whether there was room for any."""
    state, guard = run.state, run.policy.guard
    assert guard is not None and state.switch_report is not None
    figures = run.phase_summary()
    try:
        run.learner, outcome, ranks = grow(
            run.learner,
            run.policy,
            run.monitor.known,
            lambda: weight_gradients(run, run.adapted_targets),
            guard.growth,
            run.probe,
            lambda model: run.build_learner(model, state.phase),
        )
    except SwitchFailed as failure:
        not_changed(run, "growth of the ranks", failure)
        return False
    enter(run, state.phase, "grow", outcome, standing.reason, figures)
    state.transitions[-1]["ranks"] = ranks
    merged = {**state.switch_report.ranks, **ranks}
    state.switch_report = replace(state.switch_report, ranks=merged)
    tell(run, "grow", outcome, f"ranks are {guard.growth} times what they were")
    return True


def try_taking_back(run: Run, standing: Standing) -> bool:
    """Merge the adapters and train all parameters again; the criterion starts afresh."""
    state = run.state
    figures = run.phase_summary()
    state.taken_back += 1
    try:
        run.learner, outcome = take_back(
            run.learner,
            run.policy,
            state.full_parameters,
            run.probe,
            lambda model: run.build_learner(model, Phase.FULL),
        )
    except SwitchFailed as failure:
        state.taken_back -= 1
        not_changed(run, "return to full training", failure)
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
    """The trained tensors have changed: ``figures`` are those of the segment that ends."""
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
    """Give back the memory of what was replaced, time anew, save."""
    release_memory(run.device)
    run.stopwatch.start_phase()
    save(run)


def tell(run: Run, kind: str, outcome: Outcome, what: str) -> None:
    """A line and an event of a change that is no switch."""
    where = f"update {run.state.num_updates} (epoch {run.epoch:.2f})"
    run.log.line(change_line(kind, where, what, outcome))
    tell_agreement(run, outcome)
    here = ("kind", "num_updates", "epoch")
    noted = run.state.transitions[-1]
    metrics = {f"{kind}/{key}": value for key, value in noted.items() if key not in here}
    run.log.event(kind, run.state.num_updates, run.epoch, **metrics)


def tell_agreement(run: Run, outcome: Outcome) -> None:
    """With several processes, a line that they train the same tensors."""
    if distributed.world_size() > 1:
        run.log.line(f"  {distributed.agreement_line(outcome.checksum)}")


def not_changed(run: Run, what: str, failure: SwitchFailed) -> None:
    """A line, an event and a note: the run goes on as it was."""
    state = run.state
    run.log.line(f"the {what} failed and was undone, {state.phase} training goes on: {failure}")
    run.log.event("switch_failed", state.num_updates, run.epoch, what=what, reason=str(failure))
    state.failed_switches.append(f"{what}: {failure}")
    if given_up(state):
        run.log.line(f"it failed {TRIES} times in the same way and is not tried again")


def release_memory(device: torch.device) -> None:
    """Return what was replaced: optimizer state, gradients, weights."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
