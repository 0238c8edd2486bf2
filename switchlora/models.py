"""Models by their timm name."""

import timm
from torch import nn

from switchlora.errors import near


def create_model(name: str, **options: object) -> nn.Module:
    """``timm.create_model`` with one clear ValueError for an unknown name or option.

    EVA's and BEiT's attention is told to call its qkv and add the bias apart: by default it reads
    the weight and would walk past an adapter.
    """
    if not timm.is_model(name):
        raise ValueError(f"unknown model '{name}'; {near(name, timm.list_models())}")
    try:
        model = timm.create_model(name, **options)  # type: ignore[arg-type]
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model '{name}' refuses its options: {error}") from error
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
    return model
