"""What an update of a run costs, from its trace: its time, and what compiled code hides."""

from switchlora.cost import Prediction, Trace, measure_machine, price, trace_batch
from switchlora.learner import is_sharded, launches_graphs
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
        trace = trace_of(run)
    except Exception as error:
        why = one_line(error)
    (failed,) = any_rank(trace is None)
    if trace is not None and not failed:
        try:
            compiled = run.learner.compiled is not None
            machine = measure_machine(run.device, run.recipe.precision)
            if compiled:
                machine = machine.compiled(launches_graphs(run.learner.recipe.compile))
            return price(trace, machine, compiled, world_size())
        except Exception as error:
            why = one_line(error)
    run.log.line(f"  the time of an update cannot be predicted: {why}")
    return None


def count_compiled(run: Run) -> None:
    """Give a learner of compiled blocks the FLOPs and activation bytes of the same update, eager.

    A failure is a line in the log, as in ``predicted_update``.
    """
    learner = run.learner
    if learner.compiled is None:
        return
    try:
        with run.stopwatch.paused():
            trace = trace_of(run)
    except Exception as error:
        run.log.line(f"the FLOPs of an update are not known: {one_line(error)}")
        return
    learner.flops = sum(operation.flops for operation in trace.operations)
    learner.activation_bytes = trace.memory["activations"]


def trace_of(run: Run) -> Trace:
    """Trace an update of this rank in the present phase, without content and uncompiled."""
    model = run.learner.bones or run.model
    return trace_batch(model, run.recipe, *run.data.example(run.share), run.data.loss)
