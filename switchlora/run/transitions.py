"""The changes of a run's trained tensors, which the run's ``control`` makes.

- ``switch_targets`` puts adapters on targets.
- ``freeze_weights`` ends the joint phase.
- ``restart_adapter`` and ``grow_ranks`` replace the adapters.
- ``return_to_full`` merges them and trains all parameters again.

Each keeps the record, and returns what happened, for ``tell``: Changed, or Failed when the run
goes on as it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from switchlora.adapters import Target, set_mix
from switchlora.cost import Prediction, speedup_parts, warning
from switchlora.criteria import Verdict
from switchlora.learner import Learner, module_gradients, release_memory
from switchlora.policy import Decision, Refresh, Standing
from switchlora.run.before import keep_before, weights_before
from switchlora.run.forecast import predicted_update
from switchlora.run.run import Run
from switchlora.run.saving import save
from switchlora.run.state import Phase
from switchlora.switching import Failed, Outcome

T = TypeVar("T", bound=Outcome)


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


Change = Changed | Failed


def switch_targets(run: Run, decision: Decision) -> Change:
    """Put adapters on the targets that were chosen."""
    policy, ended = run.policy, Segment(run)
    expected = None if policy.joint_epochs else predicted_update(run)
    scene = run.scene(run.recipe_of(run.control.phase_after(decision.chosen)))
    inputs = run.read_inputs() if policy.least_gain is not None else None
    before = weights_before(run)
    report = made(run, run.control.switch(scene, decision, inputs))
    if isinstance(report, Failed):
        return report
    kind, reason = "stage" if policy.stages else "switch", decision.reason
    more = {"ranks": dict(report.ranks), "left_full": list(report.left_full)}
    record = enter(run, ended, kind, report, reason, **more)
    keep_before(run, before)
    if run.ledger.switch_epoch is None:
        run.ledger.switch_epoch = run.epoch
    run.state.guarded_since = run.state.num_updates
    slow = record_speedup(run, expected)
    return Changed(reason, report, record, decision.verdict, slow)


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
    set_mix(run.model, 0.0)
    ended = Segment(run)
    expected = predicted_update(run)
    scene = run.scene(run.recipe_of(Phase.ADAPTER))
    outcome = made(run, run.control.end_joint_phase(scene))
    if isinstance(outcome, Failed):
        return outcome
    reason = f"the joint phase of {run.policy.joint_epochs:g} epochs is over"
    record = enter(run, ended, "settle", outcome, reason)
    return Changed(reason, outcome, record, slow=record_speedup(run, expected))


def restart_adapter(run: Run) -> Change:
    """Merge the adapters and go on with new ones (ReLoRA, arXiv 2307.05695).

    Adapters that train a core are turned and cut instead (OIALR, arXiv 2401.08505).
    """
    ended = Segment(run)
    scene = run.scene(run.recipe_of(Phase.ADAPTER))
    outcome = made(run, run.control.restart(scene))
    if isinstance(outcome, Failed):
        return outcome
    release_memory(run.device)
    if isinstance(run.policy.restart, Refresh):
        reason = "an interval of the cores is over"
        record = enter(run, ended, "restart", outcome, reason, ranks=run.state.ranks)
        return Changed("the cores are turned and cut", outcome, record)
    record = note_transition(run, "restart", outcome, "a cycle of updates is over")
    return Changed("the adapters are merged, new ones begin", outcome, record)


def grow_ranks(run: Run, standing: Standing) -> Change:
    """Multiply the ranks by the guard's ``growth``."""
    guard = run.policy.guard
    assert guard is not None
    what = f"ranks are {guard.growth} times what they were"
    return _grow(run, standing.reason, what, growth=guard.growth)


def grow_by_rule(run: Run, larger: Mapping[str, int]) -> Change:
    """Raise the ranks that ``policy.growth`` finds too small to the ``larger`` ones."""
    reason = f"{len(larger)} target(s) use their leading modes"
    return _grow(run, reason, f"the ranks of {len(larger)} target(s) are larger", ranks=larger)


def _grow(run: Run, reason: str, what: str, **how: Any) -> Change:
    """Raise ranks as ``Controller.grow`` does with the options ``how``."""
    ended = Segment(run)
    scene = run.scene(run.recipe_of(run.state.phase))

    def gradients() -> dict[str, Tensor]:
        return weight_gradients(run, run.control.adapted_targets)

    outcome = made(run, run.control.grow(scene, gradients, **how))
    if isinstance(outcome, Failed):
        return outcome
    record = enter(run, ended, "grow", outcome, reason, ranks=dict(outcome.ranks))
    return Changed(what, outcome, record)


def return_to_full(run: Run, standing: Standing) -> Change:
    """Merge the adapters and train all parameters again."""
    state, ended = run.state, Segment(run)
    scene = run.scene(run.recipe_of(Phase.FULL, taken_back=state.taken_back + 1))
    outcome = made(run, run.control.take_back(scene, state.full_parameters))
    if isinstance(outcome, Failed):
        return outcome
    run.ledger.switch_epoch = None
    record = enter(run, ended, "take_back", outcome, standing.reason)
    return Changed("all parameters train again", outcome, record)


def made(run: Run, found: tuple[Learner, T] | Failed) -> T | Failed:
    """Let the new learner train, if the change was made, and return what happened."""
    if isinstance(found, Failed):
        return found
    run.learner, outcome = found
    return outcome


class Segment:
    """What is to be recorded of the stretch of training that a change ends."""

    def __init__(self, run: Run) -> None:
        self.phase = run.state.phase
        self.figures = run.phase_summary()


def enter(
    run: Run, ended: Segment, kind: str, outcome: Outcome, reason: str, **more: Any
) -> dict[str, Any]:
    """Record a change of the trained tensors and the segment that ``ended`` there."""
    run.ledger.end_segment(ended.phase, run.state.num_updates, ended.figures)
    run.ledger.recorded = False
    return note_transition(run, kind, outcome, reason, **more)


def note_transition(
    run: Run, kind: str, outcome: Outcome, reason: str, **more: Any
) -> dict[str, Any]:
    """Add a change of the trained tensors to the run's record, and return its entry."""
    record = {
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
        **more,
    }
    run.ledger.transitions.append(record)
    return record


def begin_segment(run: Run) -> None:
    """Start a new segment: free the replaced tensors, restart the stopwatch, save a checkpoint."""
    release_memory(run.device)
    run.stopwatch.start_phase()
    save(run)


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
