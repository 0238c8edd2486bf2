"""What the cost model expects of a run's phases."""

from functools import cache

import torch

from switchlora.cost import Machine, Prediction, measure_machine, predict, trace_batch
from switchlora.learner import is_sharded
from switchlora.process import any_rank, one_line, world_size
from switchlora.run.run import Run


def predicted_update(run: Run) -> Prediction | None:
    """Seconds of an update in the present phase; None where ``log.cost_model`` is off.

    All ranks call it: they measure their machine together. A sharded model is not predicted, and
    code that is not ours may need numbers, or memory run out: no reason to end a run.
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
            return predict(trace, machine_of(run.device, run.recipe.precision), world_size())
        except torch.OutOfMemoryError as error:
            why = one_line(error)
    run.log.line(f"  the time of an update cannot be predicted: {why}")
    return None


@cache
def machine_of(device: torch.device, precision: str) -> Machine:
    """What this machine does in a precision, measured once a process."""
    return measure_machine(device, precision)
