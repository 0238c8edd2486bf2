"""The cost of training in seconds and bytes, predicted before training or measured."""

from switchlora.cost.fusion import fuse as fuse
from switchlora.cost.hardware import (
    Hardware as Hardware,
    all_hardware as all_hardware,
    hardware_like as hardware_like,
    hardware_named as hardware_named,
)
from switchlora.cost.machine import (
    Machine as Machine,
    measure_machine as measure_machine,
)
from switchlora.cost.predict import (
    ADAMW_BYTES as ADAMW_BYTES,
    Prediction as Prediction,
    break_even_rank as break_even_rank,
    predict as predict,
    price as price,
    speedup_parts as speedup_parts,
    warning as warning,
)
from switchlora.cost.timing import (
    by_name as by_name,
    clock_of as clock_of,
    forward_and_backward as forward_and_backward,
    interleaved_seconds as interleaved_seconds,
    linear_and_factors as linear_and_factors,
    measured_gains as measured_gains,
    seconds_of as seconds_of,
    take_turns as take_turns,
    work_clock_of as work_clock_of,
)
from switchlora.cost.trace import (
    Trace as Trace,
    stepped as stepped,
    trace_batch as trace_batch,
    trace_update as trace_update,
    without_content as without_content,
)
