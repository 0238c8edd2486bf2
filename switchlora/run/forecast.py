"""Predict the time of an update of a run with the cost model."""

from switchlora.cost import Prediction, measure_machine, predict, trace_batch
from switchlora.learner import is_sharded
from switchlora.process import any_rank, one_line, world_size
from switchlora.run.run import Run


def predicted_update(run: Run) -> Prediction | None:
    """Predict the seconds of an update in the present phase.

    All ranks must call it, because they measure their machine together. Return None in these
    cases:
    - ``log.cost_model`` is off.
    - The model is sharded.
    - The prediction fails: a model from outside reads tensor values, or memory runs out. Then a
      line is logged and the run goes on.
    """
    if not run.config["log"]["cost_model"] or is_sharded(run.model):
        return None
    trace, why = None, "another rank could not"
    try:
        trace = trace_batch(run.model, run.recipe, *run.data.example(run.share), run.data.loss)
    except Exception as error:
        why = one_line(error)
    (failed,) = any_rank(trace is None)
    if trace is not None and not failed:
        try:
            return predict(trace, measure_machine(run.device, run.recipe.precision), world_size())
        except Exception as error:
            why = one_line(error)
    run.log.line(f"  the time of an update cannot be predicted: {why}")
    return None
