"""What the cost model expects of a run's phases."""

from functools import cache

import torch

from switchlora.cost import Machine, Prediction, measure_machine, predict, trace_update
from switchlora.distributed import world_size
from switchlora.exits import one_line
from switchlora.run import Run
from switchlora.sharding import is_sharded


def predicted_update(run: Run) -> Prediction | None:
    """Seconds of an update in the present phase; None where ``log.cost_model`` is off.

    All ranks call it: they measure their machine together. A sharded model is not predicted.
    """
    if not run.config["log"]["cost_model"] or is_sharded(run.model):
        return None
    machine = machine_of(run.device, run.recipe.precision)
    try:
        trace = trace_update(run.model, run.recipe, run.images_shape, run.data.num_classes)
    except Exception as error:  # code that is not ours may need numbers: no reason to end a run
        run.log.line(f"  the time of an update cannot be predicted: {one_line(error)}")
        return None
    return predict(trace, machine, world_size())


@cache
def machine_of(device: torch.device, precision: str) -> Machine:
    """What this machine does in a precision, measured once a process."""
    return measure_machine(device, precision)
