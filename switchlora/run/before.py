"""Keep what takes the adapter off again: the model of just before the first switch."""

from torch import Tensor

from switchlora.process import is_primary, together
from switchlora.run.run import Run
from switchlora.storage import save_before, weights_of


def weights_before(run: Run) -> dict[str, Tensor] | None:
    """Return a copy of the weights; None where the run has switched already.

    All ranks must call it. The primary alone gets weights.
    """
    if run.state.switch_report is not None:
        return None
    model = run.learner.plain()
    return weights_of(model) if is_primary() else {}


def keep_before(run: Run, before: dict[str, Tensor] | None) -> None:
    """Write what a switch that was made would lose of the weights ``before`` it.

    All ranks must call it.
    """
    if before is None:
        return
    model = run.learner.plain()
    with together():
        if is_primary():
            save_before(run.log.folder, before, model, residuals_stay(run), run.state.num_updates)


def residuals_stay(run: Run) -> bool:
    """Return whether nothing in the policy changes frozen weights after the switch."""
    policy = run.policy
    acts = policy.guard is not None and policy.guard.acts
    return policy.restart is None and policy.growth is None and not acts
