"""Create models by their timm name, and know how their layers are called."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import timm
import torch
from timm.layers import to_2tuple
from torch import nn

from switchlora.models.weights import load_weights
from switchlora.names import near


def create_model(name: str, **options: object) -> nn.Module:
    """Return ``timm.create_model`` of these; one clear ValueError for an unknown name or option.

    ``img_size`` is left out for a family that refuses it, since it takes images of any size.
    EVA's and BEiT's attention is set to call its qkv linear and to add the bias apart. By default
    it reads the weight directly and would bypass an adapter. ValueError also if patches do not
    divide the image. A file ``checkpoint_path`` is read by ``load_weights``. The options that timm
    took stay with the model, as ``timm_options``.
    """
    if not timm.is_model(name):
        raise ValueError(f"unknown model '{name}'; {near(name, timm.list_models())}")
    start = options.pop("checkpoint_path", None)
    model = _built(name, options)
    if start:
        load_weights(model, str(start))
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
    _check_patches(name, model)
    return model


def _built(name: str, options: Mapping[str, object]) -> nn.Module:
    try:
        model = timm.create_model(name, **options)  # type: ignore[arg-type]
    except (TypeError, AssertionError) as error:
        if "img_size" in options and re.search("unexpected keyword.*img_size", str(error)):
            others = dict(options)
            del others["img_size"]
            return _built(name, others)
        raise ValueError(f"model '{name}' refuses its options: {error}") from error
    model.timm_options = dict(options)  # type: ignore[assignment]
    return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` into evaluation mode inside, and each module into its former mode afterwards.

    The former modes come back after an exception too.
    """
    modes = modes_of(model)
    model.eval()
    try:
        yield model
    finally:
        set_modes(modes)


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Return of each module of ``model`` whether it is in training mode."""
    return {module: module.training for module in model.modules()}


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Put modules back into the modes that ``modes_of`` returned."""
    for module, training in modes.items():
        module.training = training


def draws_undone(model: nn.Module) -> AbstractContextManager[None]:
    """Put back what is drawn inside: the random numbers of the CPU and of the model's device."""
    device = next(model.parameters()).device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Let the model draw the same numbers inside each time, and put back what is drawn."""
    with draws_undone(model):
        torch.manual_seed(0)
        yield


def read_directly(model: nn.Module) -> list[str]:
    """Return the linears whose weights other programs read past an adapter, by name.

    Here they are called: ``create_model`` sets ``qkv_bias_separate``, and torch's fast path is off
    beside adapters. Elsewhere, as with PEFT, an adapter on them does nothing.
    """
    names = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if getattr(module, "q_bias", None) is not None and hasattr(module, "qkv_bias_separate"):
            names.append(f"{prefix}qkv")
        if isinstance(module, nn.TransformerEncoderLayer):
            names += [f"{prefix}linear1", f"{prefix}linear2"]
    return names


def _check_patches(name: str, model: nn.Module) -> None:
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    image = getattr(embed, "img_size", None)
    if not patch or not image:
        return
    for size, pixels in zip(to_2tuple(patch), to_2tuple(image), strict=True):
        if pixels % size:
            raise ValueError(
                f"model '{name}' would not see the edges of its images: patches of {size} do not "
                f"divide {pixels} pixels; change ++model.patch_size or data.image_size"
            )
