"""The changes of a run's trained tensors.

- ``switch_targets`` puts adapters on targets.
- ``freeze_weights`` ends the joint phase.
- ``restart_adapter`` and ``grow_ranks`` replace the adapters.
- ``return_to_full`` merges them and trains all parameters again.

Each returns what happened, for ``tell``: Changed, or Failed when the run goes on as it was.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from switchlora.adapters import Target, applied_ranks, set_mix
from switchlora.cost import Prediction, speedup_parts, warning
from switchlora.criteria import Verdict
from switchlora.errors import SwitchFailed
from switchlora.learner import Learner, module_gradients, release_memory
from switchlora.policy import Refresh, Standing
from switchlora.process import distributed
from switchlora.run.before import keep_before, weights_before
from switchlora.run.forecast import predicted_update
from switchlora.run.run import Run
from switchlora.run.saving import save
from switchlora.run.state import Phase, TrainState
from switchlora.switching import (
    Outcome,
    Scene,
    SwitchReport,
    grow,
    larger_ranks,
    refresh,
    restart,
    settle,
    switch,
    take_back,
    with_frozen_front,
)

T = TypeVar("T", bound=Outcome)
TRIES = 3
"""after this many failures in a row for the same reason, no further change is tried"""


@dataclass(frozen=True)
class Changed:
    """A change that was made."""

    what: str
    """the change in words; of a switch, the reason"""
    outcome: Outcome
    record: Mapping[str, Any]
    """its entry in ``ledger.transitions``"""
    verdict: Verdict | None = None
    """the criterion's verdict that led to a switch"""
    slow: str | None = None
    """why updates are predicted to become slower, if they are"""


@dataclass(frozen=True)
class Failed:
    """A change that failed and was undone; ``for_good`` when it is not tried again."""

    what: str
    reason: str
    for_good: bool


Change = Changed | Failed


def given_up(state: TrainState) -> bool:
    """Return whether the last ``TRIES`` failed changes all failed for the same reason."""
    last = state.failed_switches[-TRIES:]
    return len(last) == TRIES and len(set(last)) == 1


def switch_targets(run: Run, verdict: Verdict, chosen: list[str]) -> Change:
    """Put adapters on the ``chosen`` targets."""
    state, policy, monitor = run.state, run.policy, run.monitor
    figures = run.phase_summary()
    expected = None if policy.joint_epochs else predicted_update(run)
    phase = next_phase(run, chosen)
    front = with_frozen_front(run.model, policy, monitor.known, verdict.margins, chosen, run.probe)
    scene = replace(run.scene(run.recipe_of(phase)), policy=front)
    inputs = run.read_inputs() if policy.least_gain is not None else None
    before = weights_before(run)
    report = attempt(run, "switch", lambda: switch(scene, state.fresh_history, chosen, inputs))
    if isinstance(report, Failed):
        return report
    kind = "stage" if policy.stages else "switch"
    reason = verdict.reason if verdict.fires else f"{len(chosen)} targets have converged alone"
    enter(run, phase, kind, report, reason, figures)
    keep_before(run, before)
    record_switch(run, report)
    if phase is Phase.JOINT:
        length = max(1, round(policy.joint_epochs * len(run.data.train)))
        state.joint_until = state.num_updates + length
    watch_the_rest(run, report.waiting)
    slow = record_speedup(run, expected)
    return Changed(reason, report, run.ledger.transitions[-1], verdict, slow)


def next_phase(run: Run, chosen: Collection[str]) -> Phase:
    """Return the phase that follows when the ``chosen`` targets switch."""
    if run.policy.joint_epochs:
        return Phase.JOINT
    if len(chosen) == len(run.monitor.targets):
        return Phase.ADAPTER
    return Phase.STAGED


def record_switch(run: Run, report: SwitchReport) -> None:
    """Keep the ranks and the place of a switch, or of one stage of it."""
    state = run.state
    run.ledger.transitions[-1]["ranks"] = dict(report.ranks)
    run.ledger.transitions[-1]["left_full"] = list(report.left_full)
    if state.switch_report is None:
        state.switch_report = report
        state.switch_update = state.num_updates
        run.ledger.switch_epoch = run.epoch
    else:
        state.switch_report = report.after(state.switch_report)
    state.last_stage = state.num_updates
    state.guarded_since = state.num_updates


def record_speedup(run: Run, before: Prediction | None) -> str | None:
    """Record the predicted speed-up of an update, and return the cost model's warning, if any.

    ``before`` is the prediction for the phase before the change. Nothing is recorded when either
    prediction is missing.
    """
    if before is None:
        return None
    now = predicted_update(run)
    if now is None:
        return None
    run.ledger.transitions[-1]["predicted_speedup"] = speedup_parts(before, now)
    return warning(before, now)


def freeze_weights(run: Run) -> Change:
    """End the joint phase: freeze the targets' weights, so that only their factors train."""
    state = run.state
    assert state.switch_report is not None
    ranks = state.switch_report.ranks
    set_mix(run.model, 0.0)
    figures = run.phase_summary()
    expected = predicted_update(run)
    scene = run.scene(run.recipe_of(Phase.ADAPTER))
    outcome = attempt(run, "end of the joint phase", lambda: settle(scene, ranks))
    state.joint_until = None
    if isinstance(outcome, Failed):
        return outcome
    reason = f"the joint phase of {run.policy.joint_epochs:g} epochs is over"
    enter(run, Phase.ADAPTER, "settle", outcome, reason, figures)
    watch_the_rest(run, ())
    slow = record_speedup(run, expected)
    return Changed(reason, outcome, run.ledger.transitions[-1], slow=slow)


def restart_adapter(run: Run) -> Change:
    """Merge the adapters and go on with new ones (ReLoRA, arXiv 2307.05695)."""
    state = run.state
    scene = run.scene(run.recipe_of(Phase.ADAPTER))
    if isinstance(run.policy.restart, Refresh):
        return refresh_cores(run, scene)
    outcome = attempt(run, "restart", lambda: restart(scene, state.num_updates))
    if isinstance(outcome, Failed):
        return outcome
    release_memory(run.device)
    note_transition(run, "restart", outcome, "a cycle of updates is over")
    what = "the adapters are merged, new ones begin"
    return Changed(what, outcome, run.ledger.transitions[-1])


def refresh_cores(run: Run, scene: Scene) -> Change:
    """Turn and cut the bases of the last layers (OIALR, arXiv 2401.08505)."""
    state = run.state
    assert state.switch_report is not None and state.last_stage is not None
    figures = run.phase_summary()
    number = max(1, round((state.num_updates - state.last_stage) / run.monitor.window))
    outcome = attempt(run, "refresh", lambda: refresh(scene, number))
    if isinstance(outcome, Failed):
        return outcome
    enter(run, Phase.ADAPTER, "restart", outcome, "an interval of the cores is over", figures)
    ranks = applied_ranks(run.model, run.monitor.known, state.switch_report.ranks)
    run.ledger.transitions[-1]["ranks"] = ranks
    state.switch_report = replace(state.switch_report, ranks=ranks)
    release_memory(run.device)
    return Changed("the cores are turned and cut", outcome, run.ledger.transitions[-1])


def grow_ranks(run: Run, standing: Standing) -> Change:
    """Multiply the ranks by the guard's ``growth``."""
    guard = run.policy.guard
    assert guard is not None
    what = f"ranks are {guard.growth} times what they were"
    return _grow(run, standing.reason, what, growth=guard.growth)


def grow_by_rule(run: Run) -> Change | None:
    """Raise the ranks that ``policy.growth`` finds too small (arXiv 2306.11250), or do nothing."""
    rule = run.policy.growth
    assert rule is not None
    larger = distributed.from_primary(lambda: larger_ranks(run.model, run.adapted_targets, rule))
    if not larger:
        return None
    reason = f"{len(larger)} target(s) use their leading modes"
    return _grow(run, reason, f"the ranks of {len(larger)} target(s) are larger", ranks=larger)


def _grow(run: Run, reason: str, what: str, **how: Any) -> Change:
    """Raise ranks as ``grow`` does with the options ``how``."""
    state = run.state
    assert state.switch_report is not None
    figures = run.phase_summary()
    scene = run.scene(run.recipe_of(state.phase))

    def gradients() -> dict[str, Tensor]:
        return weight_gradients(run, run.adapted_targets)

    outcome = attempt(run, "growth of the ranks", lambda: grow(scene, gradients, **how))
    if isinstance(outcome, Failed):
        return outcome
    enter(run, state.phase, "grow", outcome, reason, figures)
    run.ledger.transitions[-1]["ranks"] = dict(outcome.ranks)
    merged = {**state.switch_report.ranks, **outcome.ranks}
    state.switch_report = replace(state.switch_report, ranks=merged)
    return Changed(what, outcome, run.ledger.transitions[-1])


def return_to_full(run: Run, standing: Standing) -> Change:
    """Merge the adapters and train all parameters again.

    The criterion then sees only measurements made from now on.
    """
    state = run.state
    figures = run.phase_summary()
    scene = run.scene(run.recipe_of(Phase.FULL, taken_back=state.taken_back + 1))
    trained = state.full_parameters
    outcome = attempt(run, "return to full training", lambda: take_back(scene, trained))
    if isinstance(outcome, Failed):
        return outcome
    enter(run, Phase.FULL, "take_back", outcome, standing.reason, figures)
    state.taken_back += 1
    state.switch_report = state.switch_update = run.ledger.switch_epoch = None
    state.joint_until = state.last_stage = None
    state.forgotten = len(state.history)
    watch_the_rest(run, run.monitor.known)
    return Changed("all parameters train again", outcome, run.ledger.transitions[-1])


def attempt(run: Run, what: str, change: Callable[[], tuple[Learner, T]]) -> T | Failed:
    """Make a ``change`` and return its outcome. When it fails, the run goes on as it was."""
    state = run.state
    try:
        run.learner, outcome = change()
    except SwitchFailed as failure:
        state.failed_switches.append(f"{what}: {failure}")
        return Failed(what, str(failure), given_up(state))
    return outcome


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
    run.ledger.end_segment(run.state.phase, run.state.num_updates, figures)
    note_transition(run, kind, outcome, reason)
    run.state.phase = phase
    run.ledger.recorded = False
    run.monitor.model = run.model


def note_transition(run: Run, kind: str, outcome: Outcome, reason: str) -> None:
    """Add a change of the trained tensors to the run's record."""
    run.ledger.transitions.append(
        {
            "kind": kind,
            "num_updates": run.state.num_updates,
            "epoch": run.epoch,
            "reason": reason,
            "trainable_before": outcome.trainable_before,
            "trainable_after": outcome.trainable_after,
            "drift": outcome.drift,
            "rounding_drift": outcome.rounding_drift,
            "moments_carried": outcome.moments_carried,
            "seconds": outcome.seconds,
        }
    )


def begin_segment(run: Run) -> None:
    """Start a new segment: free the replaced tensors, restart the stopwatch, save a checkpoint."""
    release_memory(run.device)
    run.stopwatch.start_phase()
    save(run)


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
    if run.policy.growth is not None and run.state.phase is Phase.ADAPTER:
        monitor.window = run.policy.growth.every_updates
    monitor.watch(adapted or waiting, run.state.num_updates)


def watch_as_configured(run: Run) -> None:
    """Set the monitor's window and targets as this run's configuration says.

    A run that goes on from another run's checkpoint may have another window, or restarts where
    the other run had none.
    """
    cycles = run.policy.restart or run.policy.growth
    if run.state.phase is not Phase.ADAPTER or cycles is None:
        run.monitor.window = run.window
    if run.state.phase is Phase.ADAPTER and bool(run.policy.restart) != bool(run.monitor.targets):
        watch_the_rest(run, ())


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
    recipe = run.learner.recipe
    inputs = inputs.chunk(recipe.accumulation)[0]
    labels = labels.chunk(recipe.accumulation)[0]
    names = sorted({target.module for target in targets.values()})
    found = module_gradients(run.model, names, run.data.loss, recipe.precision, inputs, labels)
    return {name: found[target.module][target.rows] for name, target in targets.items()}
