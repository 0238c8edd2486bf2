"""The models that train: timm's transformers, and a small one over bytes."""

from switchlora.models.files import (
    HALF as HALF,
    RESIDUAL as RESIDUAL,
    read_file as read_file,
    read_half as read_half,
)
from switchlora.models.text import CausalTransformer as CausalTransformer
from switchlora.models.vision import (
    create_model as create_model,
    draws_undone as draws_undone,
    eval_mode as eval_mode,
    modes_of as modes_of,
    read_directly as read_directly,
    same_draws as same_draws,
    set_modes as set_modes,
)
from switchlora.models.weights import converted as converted, load_weights as load_weights
