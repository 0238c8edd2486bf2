"""Choose target modules, put adapters on them, and choose the parameters that train."""

from switchlora.adapters.cola import CoLALinear as CoLALinear, cola_linear as cola_linear
from switchlora.adapters.core import (
    CoreLinear as CoreLinear,
    core_linear as core_linear,
    core_modules as core_modules,
    kept_values as kept_values,
)
from switchlora.adapters.effect import check_adapters_work as check_adapters_work
from switchlora.adapters.factorized import (
    GuidedLinear as GuidedLinear,
    LowRankLinear as LowRankLinear,
    SlicedLowRankLinear as SlicedLowRankLinear,
    cosine_mix as cosine_mix,
    draw_dense as draw_dense,
    drop_skipped_gradients as drop_skipped_gradients,
    factorized_linear as factorized_linear,
    guided_layers as guided_layers,
    guided_linear as guided_linear,
    set_mix as set_mix,
    settled as settled,
    skipped_flops as skipped_flops,
)
from switchlora.adapters.forms import (
    Rates as Rates,
    Shape as Shape,
    Work as Work,
    cheaper_form as cheaper_form,
    faster_form as faster_form,
    own_work as own_work,
    rates_of as rates_of,
    set_rates as set_rates,
)
from switchlora.adapters.kinds import (
    KINDS as KINDS,
    made_class as made_class,
    rebuilt as rebuilt,
)
from switchlora.adapters.linear import (
    FACTORS as FACTORS,
    AdaptedLinear as AdaptedLinear,
    Factors as Factors,
    Norms as Norms,
    SlicedLoRALinear as SlicedLoRALinear,
    adapted_linear as adapted_linear,
    adapted_modules as adapted_modules,
    add_frobenius_decay as add_frobenius_decay,
    alpha_over_rank as alpha_over_rank,
    is_factor as is_factor,
    operands_kept as operands_kept,
    rank_stabilised as rank_stabilised,
    scaling_one as scaling_one,
    trained_adapters as trained_adapters,
    without_weight as without_weight,
)
from switchlora.adapters.product import (
    AdaptedProduct as AdaptedProduct,
    Adapter as Adapter,
    Product as Product,
    as_on_a_gpu as as_on_a_gpu,
)
from switchlora.adapters.quantised import (
    CODES as CODES,
    Quantised as Quantised,
    dequantised as dequantised,
    is_quantised as is_quantised,
    quantised as quantised,
)
from switchlora.adapters.sltrain import (
    SparseLowRankLinear as SparseLowRankLinear,
    sltrain_linear as sltrain_linear,
)
from switchlora.adapters.surgery import (
    adapted_state_dict as adapted_state_dict,
    adapter_layout as adapter_layout,
    applied_ranks as applied_ranks,
    inject as inject,
    inject_empty as inject_empty,
    merge as merge,
    merged_state_dict as merged_state_dict,
    plain_shapes as plain_shapes,
    restore as restore,
    round_residual as round_residual,
    without_adapters as without_adapters,
)
from switchlora.adapters.switched import (
    SwitchedLoRALinear as SwitchedLoRALinear,
    switched_linear as switched_linear,
    switchlora_bounds as switchlora_bounds,
)
from switchlora.adapters.targets import (
    DEFAULT_TARGETS as DEFAULT_TARGETS,
    Target as Target,
    call_order as call_order,
    coverage_line as coverage_line,
    find_targets as find_targets,
)
from switchlora.adapters.trainable import (
    count_parameters as count_parameters,
    freeze_unused as freeze_unused,
    frozen_outright as frozen_outright,
    hold_frozen_statistics as hold_frozen_statistics,
    kept_parameters as kept_parameters,
    parameter_sizes as parameter_sizes,
    plain_parameters as plain_parameters,
    train_only as train_only,
    training_flags as training_flags,
)
