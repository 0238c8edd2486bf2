"""What training costs, predicted before it is paid."""

from switchlora.cost.machine import Machine, measure_machine
from switchlora.cost.predict import (
    ADAMW_BYTES,
    Prediction,
    break_even_rank,
    predict,
    speedup_parts,
    warning,
)
from switchlora.cost.timing import (
    forward_and_backward,
    interleaved_seconds,
    linear_and_factors,
    measured_gains,
)
from switchlora.cost.trace import Trace, stepped, trace_batch, trace_update, without_content

__all__ = [
    "ADAMW_BYTES",
    "Machine",
    "Prediction",
    "Trace",
    "break_even_rank",
    "forward_and_backward",
    "interleaved_seconds",
    "linear_and_factors",
    "measure_machine",
    "measured_gains",
    "predict",
    "speedup_parts",
    "stepped",
    "trace_batch",
    "trace_update",
    "warning",
    "without_content",
]
