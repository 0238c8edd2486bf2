"""Models by their timm name."""

import timm
from torch import nn

from switchlora.errors import near


def create_model(name: str, **options: object) -> nn.Module:
    """``timm.create_model`` with one clear ValueError for an unknown name or option."""
    if not timm.is_model(name):
        raise ValueError(f"unknown model '{name}'; {near(name, timm.list_models())}")
    try:
        return timm.create_model(name, **options)  # type: ignore[arg-type]
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model '{name}' refuses its options: {error}") from error
