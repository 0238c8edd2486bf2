"""Models by their timm name."""

from collections.abc import Iterator
from contextlib import contextmanager

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
    _check_patches(name, model)
    return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in evaluation mode inside, in the mode it was in afterwards, whatever happens."""
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def _check_patches(name: str, model: nn.Module) -> None:
    embed = getattr(model, "patch_embed", None)
    patch, image = getattr(embed, "patch_size", None), getattr(embed, "img_size", None)
    if patch and image and any(i % p for i, p in zip(image, patch, strict=True)):
        raise ValueError(
            f"model '{name}' would not see the edges of its images: patches of {patch[0]} do not "
            f"divide {image[0]} pixels; change +model.patch_size or data.image_size"
        )
