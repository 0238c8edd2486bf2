"""When a run changes its trained tensors.

It may change at three moments:
- at the end of a window of updates, when the criterion fires or a restart is due,
- at the end of the joint phase,
- after an epoch, when the guard finds the adapter behind.

What each change does is in ``transitions``, and what is told of it in ``tell``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from switchlora.adapters import cosine_mix, set_mix
from switchlora.learner import factor_balance, is_sharded, trained_pairs
from switchlora.monitor import Measurement
from switchlora.names import some
from switchlora.process import distributed
from switchlora.run.messages import balance_metrics
from switchlora.run.run import Run
from switchlora.run.saving import save, save_elsewhere
from switchlora.run.tell import tell, tell_failure, tell_measurement
from switchlora.run.transitions import (
    Changed,
    begin_segment,
    freeze_weights,
    grow_by_rule,
    grow_ranks,
    restart_adapter,
    return_to_full,
    switch_targets,
)
from switchlora.storage import window_metrics
from switchlora.switching import ChangeFailed

GUARD_CHANGES = {
    "warn": (),
    "ranks": (grow_ranks, return_to_full),
    "full": (return_to_full,),
}
"""by ``switch.guard.act``, the changes that are tried in turn until one succeeds"""


def end_window(run: Run) -> None:
    """Measure the targets at the end of a window, and act on the measurement.

    - While any target still trains its whole weight (full or staged phase), ask the criterion.
    - In the adapter phase of a policy with restarts, restart the adapter.
    - In that of a policy with growth, let ranks grow that are too small.
    """
    state = run.state
    with run.stopwatch.paused(monitor=True):
        share = not is_sharded(run.model)  # a shared model is gathered by all ranks at once
        here = run.monitor.measure(state.num_updates, run.epoch, share)
        measured = distributed.from_primary(lambda: here)
        run.control.note_loss("train", measured.train_loss)
        note_unmeasured(run, measured)
    if run.control.measures:
        state.history.append(measured)
        state.undecided = True
        consider_switch(run)
        return
    with run.stopwatch.paused():
        metrics = window_metrics(measured) | refactoring_metrics(run)
        run.log.event("window", measured.num_updates, measured.epoch, **metrics)
        if run.control.restarts and goes_on(run):
            attempt(run, restart_adapter)
        larger = run.control.larger_ranks() if goes_on(run) else {}
        grown = bool(larger) and attempt(run, grow_by_rule, larger)
    if grown:
        begin_segment(run)
    with run.stopwatch.paused():
        run.monitor.start_window(state.num_updates)


def attempt(run: Run, change: Callable[..., Changed], *given: Any) -> bool:
    """Make a change and tell of it, or of its failure. Return whether it was made."""
    try:
        changed = change(run, *given)
    except ChangeFailed as failed:
        tell_failure(run, failed)
        return False
    tell(run, changed)
    return True


def refactoring_metrics(run: Run) -> dict[str, float]:
    """Return how balanced the factors are, if the present recipe refactors them."""
    pairs = trained_pairs(run.learner)
    if run.learner.recipe.refactoring is None or not pairs:
        return {}
    return balance_metrics(factor_balance(pairs))


def goes_on(run: Run) -> bool:
    """Return whether updates are left to make. A change after the last update would be useless."""
    return run.state.num_updates < run.last_update


def note_unmeasured(run: Run, measured: Measurement) -> None:
    """Count a measurement with a number that is not finite, and say of which targets."""
    lost = measured.not_finite
    if not lost:
        return
    run.ledger.unmeasured += 1
    run.log.line(
        f"measured at update {measured.num_updates}: {some(lost)} has a norm or a rank that is "
        "not finite; no criterion fires on it"
    )


def guide(run: Run) -> None:
    """Set the share of the dense weight in guided layers for the next update (arXiv 2406.16450).

    It falls from 1 to 0 along a cosine over the joint phase. Outside of that, nothing is set.
    """
    state = run.state
    if state.joint_until is not None and state.switch_update is not None:
        length = state.joint_until - state.switch_update
        done = (state.num_updates - state.switch_update) / length
        set_mix(run.model, cosine_mix(done))


def consider_switch(run: Run) -> None:
    """Ask the criterion, and switch the targets that it or the stages choose.

    When the switch fails, training goes on as before.
    """
    state = run.state
    share_measurement(run)
    decision = run.control.decide()
    switches = bool(decision.chosen) and goes_on(run)
    if switches:
        leave_trunk(run)
        save(run)
    changed = False
    with run.stopwatch.paused():
        if state.history:
            tell_measurement(run, state.history[-1], decision.verdict)
        if switches:
            changed = attempt(run, switch_targets, decision)
        state.undecided = False
    if changed:
        begin_segment(run)
    elif state.history:
        with run.stopwatch.paused(monitor=True):
            run.monitor.start_window(state.num_updates)


def end_joint_phase(run: Run) -> None:
    """End the joint phase. When that fails, weights and factors go on training together."""
    with run.stopwatch.paused():
        changed = attempt(run, freeze_weights)
    if changed:
        position = run.state.position
        run.state.position = run.policy.after_joint_phase(position, len(run.data.train))
        begin_segment(run)


def share_measurement(run: Run) -> None:
    """Add the last measurement to the trunk, for other runs with the same full phase."""
    if run.trunk is not None and run.state.history:
        with run.stopwatch.paused():
            measurement, folder = run.state.history[-1], run.log.folder
            run.trunk.publish(measurement, folder, partial(save_elsewhere, run), run.log.line)


def leave_trunk(run: Run) -> None:
    """Stop extending the shared trunk. Another run may extend it from here."""
    if run.trunk is not None:
        with run.stopwatch.paused():
            run.trunk.leave(run.state.num_updates, partial(save_elsewhere, run), run.log.line)


def look_after(run: Run) -> None:
    """Let the guard compare the losses since the switch with the full phase's curve, and act.

    When the adapter is behind, the guard's ``act`` decides:
    - 'warn': log it.
    - 'ranks': raise the ranks; if no rank can grow, do as 'full'.
    - 'full': merge the adapters and train all parameters again.

    After ``most`` returns to full training, the guard only logs.
    """
    guard, state = run.policy.guard, run.state
    standing = None if run.over else run.control.behind()
    if guard is None or standing is None:
        return
    run.log.line(f"GUARD at update {state.num_updates}: {standing.reason}")
    metrics = {"guard/excess": standing.excess, "guard/reason": standing.reason}
    run.log.event("guard", state.num_updates, run.epoch, **metrics)
    if not run.control.guard_acts:
        return
    for make_change in GUARD_CHANGES[guard.act]:
        with run.stopwatch.paused():
            changed = attempt(run, make_change, standing)
        if changed:
            begin_segment(run)
            return
