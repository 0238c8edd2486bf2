"""The changes of a run's trained tensors, which its ``control`` makes.

- ``switch_targets`` puts adapters on targets.
- ``freeze_weights`` ends the joint phase.
- ``restart_adapter``, ``grow_ranks`` and ``grow_by_rule`` replace the adapters.
- ``return_to_full`` merges them and trains all parameters again.

Each keeps the run's record, and returns what happened, for ``tell``. ChangeFailed when the run
goes on as it was.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from switchlora.adapters import Target, set_mix
from switchlora.cost import Prediction, speedup_parts, warning
from switchlora.learner import Learner, Recipe, module_gradients, release_memory
from switchlora.policy import Decision, Refresh, Standing
from switchlora.run.before import keep_before, weights_before
from switchlora.run.forecast import predicted_update
from switchlora.run.run import Run, Segment
from switchlora.run.saving import save
from switchlora.run.state import Phase
from switchlora.switching import Outcome, Scene

RECORDED = (
    *("trainable_before", "trainable_after", "drift", "rounding_drift", "moments_carried"),
    *("seconds", "ranks", "left_full"),
)
"""facts of a change that its entry in ``ledger.transitions`` tells"""


@dataclass
class Changed:
    """A change that was made."""

    what: str
    """the change in words; of a switch, the reason"""
    outcome: Outcome
    record: dict[str, Any]
    """its entry in ``ledger.transitions``"""
    slow: str | None = None
    """why updates are predicted to become slower, if they are"""


def switch_targets(run: Run, decision: Decision) -> Changed:
    """Put adapters on the targets that were chosen."""
    policy, control, ended = run.policy, run.control, run.segment()
    expected = None if policy.joint_epochs else predicted_update(run)
    recipe = run.recipe_of(control.phase_after(decision.chosen))
    inputs = run.read_inputs() if policy.least_gain is not None else None
    before = weights_before(run)
    change = partial(control.switch, decision=decision, inputs=inputs)
    kind = "stage" if policy.stages else "switch"
    changed = make(run, ended, kind, decision.reason, change, recipe)
    keep_before(run, before)
    if run.ledger.switch_epoch is None:
        run.ledger.switch_epoch = run.epoch
    return with_speedup(run, changed, expected)


def freeze_weights(run: Run) -> Changed:
    """End the joint phase: freeze the targets' weights, so that only their factors train."""
    set_mix(run.model, 0.0)
    ended, recipe = run.segment(), run.recipe_of(Phase.ADAPTER)
    expected = predicted_update(run)
    reason = f"the joint phase of {run.policy.joint_epochs:g} epochs is over"
    changed = make(run, ended, "settle", reason, run.control.end_joint_phase, recipe)
    return with_speedup(run, changed, expected)


def restart_adapter(run: Run) -> Changed:
    """Merge the adapters and go on with new ones (ReLoRA, arXiv 2307.05695).

    Those that train a core are turned and cut instead (OIALR, arXiv 2401.08505).
    """
    restart, recipe = run.control.restart, run.recipe_of(Phase.ADAPTER)
    if isinstance(run.policy.restart, Refresh):
        reason, what = "an interval of the cores is over", "the cores are turned and cut"
        changed = make(run, run.segment(), "restart", reason, restart, recipe, what)
        changed.record["ranks"] = run.state.ranks
        run.stopwatch.start_phase()
    else:
        reason, what = "a cycle of updates is over", "the adapters are merged, new ones begin"
        changed = make(run, None, "restart", reason, restart, recipe, what)
    release_memory(run.device)
    return changed


def grow_ranks(run: Run, standing: Standing) -> Changed:
    """Multiply the ranks by the guard's ``growth``."""
    guard = run.policy.guard
    assert guard is not None
    what = f"ranks are {guard.growth} times what they were"
    return _grow(run, standing.reason, what, run.control.ranks_of_guard())


def grow_by_rule(run: Run, larger: Mapping[str, int]) -> Changed:
    """Raise the ranks that ``policy.growth`` finds too small to the ``larger`` ones."""
    reason = f"{len(larger)} target(s) use their leading modes"
    return _grow(run, reason, f"the ranks of {len(larger)} target(s) are larger", larger)


def _grow(run: Run, reason: str, what: str, ranks: Mapping[str, int]) -> Changed:
    """Raise the ranks of some targets to ``ranks``."""
    gradients = partial(weight_gradients, run, run.control.adapted_targets)
    change = partial(run.control.grow, gradients=gradients, ranks=ranks)
    recipe = run.recipe_of(run.state.phase)
    return make(run, run.segment(), "grow", reason, change, recipe, what)


def return_to_full(run: Run, standing: Standing) -> Changed:
    """Merge the adapters and train all parameters again."""
    change = partial(run.control.take_back, trained=run.state.full_parameters)
    recipe = run.recipe_of(Phase.FULL, taken_back=run.state.taken_back + 1)
    what = "all parameters train again"
    changed = make(run, run.segment(), "take_back", standing.reason, change, recipe, what)
    run.ledger.switch_epoch = None
    return changed


def make(
    run: Run,
    ended: Segment | None,
    kind: str,
    reason: str,
    change: Callable[[Scene[Learner]], tuple[Learner, Outcome]],
    recipe: Recipe,
    what: str = "",
) -> Changed:
    """Make a ``change`` of the trained tensors, record it, and go on with ``recipe``.

    ``ended`` is the segment of training that ends there. ``what`` says in words what it did.
    """
    run.learner, outcome = change(run.scene(recipe))
    if ended is not None:
        run.ledger.end_segment(*ended)
        run.ledger.recorded = False
    facts = {name: getattr(outcome, name) for name in RECORDED if hasattr(outcome, name)}
    record = {"kind": kind, "num_updates": run.state.num_updates, "epoch": run.epoch}
    run.ledger.transitions.append({**record, "reason": reason, **facts})
    return Changed(what or reason, outcome, run.ledger.transitions[-1])


def with_speedup(run: Run, changed: Changed, before: Prediction | None) -> Changed:
    """Record the predicted speed-up of an update by a change, and what the cost model warns of.

    ``before`` is the prediction for the phase before it. Nothing is recorded when either
    prediction is missing.
    """
    now = None if before is None else predicted_update(run)
    if before is not None and now is not None:
        changed.record["predicted_speedup"] = speedup_parts(before, now)
        changed.slow = warning(before, now)
    return changed


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
    inputs, labels = run.data.first_batch(run.state.epoch)
    recipe = run.learner.recipe
    inputs = inputs.chunk(recipe.accumulation)[0]
    labels = labels.chunk(recipe.accumulation)[0]
    names = sorted({target.module for target in targets.values()})
    found = module_gradients(run.model, names, run.data.loss, recipe.precision, inputs, labels)
    return {name: found[target.module][target.rows] for name, target in targets.items()}
