"""Optimize the tensors that train now; a switch throws the learner away and builds a new one."""

from switchlora.learner.awaited import (
    READ_LATE as READ_LATE,
    Awaited as Awaited,
    reads_late as reads_late,
)
from switchlora.learner.compiling import (
    AUTO as AUTO,
    CUDA_GRAPHS as CUDA_GRAPHS,
    check_compiles as check_compiles,
    chosen_compiler as chosen_compiler,
    compile_of as compile_of,
    graphs_go as graphs_go,
    launches_graphs as launches_graphs,
    missing_compiler as missing_compiler,
)
from switchlora.learner.counters import (
    FlopCounter as FlopCounter,
    SavedTensors as SavedTensors,
    flops_of as flops_of,
    held_bytes as held_bytes,
    local as local,
)
from switchlora.learner.ema import WeightEMA as WeightEMA
from switchlora.learner.learner import (
    PARALLEL as PARALLEL,
    Learner as Learner,
    Pending as Pending,
    StepOutcome as StepOutcome,
    build_learner as build_learner,
    operands_within_update as operands_within_update,
    set_checkpointing as set_checkpointing,
)
from switchlora.learner.lora_rite import LoRARite as LoRARite
from switchlora.learner.moments import (
    POWERS as POWERS,
    Moments as Moments,
    dense_moments as dense_moments,
    factor_moments as factor_moments,
    load_moments as load_moments,
    moments_of as moments_of,
    prune_moments as prune_moments,
)
from switchlora.learner.muon import Muon as Muon
from switchlora.learner.parts import (
    InParts as InParts,
    as_part_of_factors as as_part_of_factors,
    in_parts as in_parts,
)
from switchlora.learner.passes import (
    evaluate as evaluate,
    module_gradients as module_gradients,
    predict as predict,
)
from switchlora.learner.projected import (
    Apollo as Apollo,
    Fira as Fira,
    GaLore as GaLore,
)
from switchlora.learner.published import Unreduced as Unreduced
from switchlora.learner.recipe import (
    LONGEST_RAMP as LONGEST_RAMP,
    PRECISIONS as PRECISIONS,
    FactorRates as FactorRates,
    Recipe as Recipe,
    autocast as autocast,
    build_optimizer as build_optimizer,
    check_goes_with_fsdp as check_goes_with_fsdp,
    loss_of as loss_of,
    parameter_groups as parameter_groups,
    precision_of as precision_of,
)
from switchlora.learner.reflora import (
    FactorBalance as FactorBalance,
    Refactoring as Refactoring,
    RefLoRA as RefLoRA,
    RefLoRAS as RefLoRAS,
    balance as balance,
    factor_balance as factor_balance,
    norm_ratios as norm_ratios,
    precondition as precondition,
    refactored_from as refactored_from,
    refactoring_matrices as refactoring_matrices,
    trained_pairs as trained_pairs,
)
from switchlora.learner.riemannian import Riemannian as Riemannian
from switchlora.learner.sharding import (
    is_sharded as is_sharded,
    skeleton as skeleton,
)
from switchlora.learner.stopwatch import (
    STATUS as STATUS,
    WARMUP_UPDATES as WARMUP_UPDATES,
    Stopwatch as Stopwatch,
    peak_memory as peak_memory,
    release_memory as release_memory,
    reset_peak_memory as reset_peak_memory,
)
from switchlora.learner.switched import SwitchLoRA as SwitchLoRA
