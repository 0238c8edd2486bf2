"""What trains, and is thrown away when the set of trained tensors changes."""

from switchlora.learner.counters import FlopCounter, SavedTensors, flops_of, held_bytes, local
from switchlora.learner.ema import WeightEMA
from switchlora.learner.learner import (
    PARALLEL,
    Learner,
    Update,
    build_learner,
    operands_within_update,
    set_checkpointing,
)
from switchlora.learner.moments import (
    Moments,
    dense_moments,
    factor_moments,
    load_moments,
    moments_of,
    prune_moments,
)
from switchlora.learner.passes import evaluate, module_gradients
from switchlora.learner.recipe import (
    PRECISIONS,
    Recipe,
    autocast,
    check_goes_with_fsdp,
    parameter_groups,
)
from switchlora.learner.reflora import (
    RefLoRA,
    RefLoRAS,
    balance,
    precondition,
    refactoring_matrices,
)
from switchlora.learner.sharding import is_sharded, skeleton
from switchlora.learner.stopwatch import (
    STATUS,
    WARMUP_UPDATES,
    Stopwatch,
    peak_memory,
    reset_peak_memory,
)

__all__ = [
    "FlopCounter",
    "Learner",
    "Moments",
    "PARALLEL",
    "PRECISIONS",
    "Recipe",
    "RefLoRA",
    "RefLoRAS",
    "STATUS",
    "SavedTensors",
    "Stopwatch",
    "Update",
    "WARMUP_UPDATES",
    "WeightEMA",
    "autocast",
    "balance",
    "build_learner",
    "check_goes_with_fsdp",
    "dense_moments",
    "evaluate",
    "factor_moments",
    "flops_of",
    "held_bytes",
    "is_sharded",
    "load_moments",
    "local",
    "module_gradients",
    "moments_of",
    "operands_within_update",
    "parameter_groups",
    "peak_memory",
    "precondition",
    "prune_moments",
    "refactoring_matrices",
    "reset_peak_memory",
    "set_checkpointing",
    "skeleton",
]
