"""Create models by their timm name, and load pretrained weights to start from."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import timm
from timm.layers import to_2tuple
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

from switchlora.names import near

PRETRAINED = "pretrained"
HUB = "hf-hub:"


def create_model(name: str, **options: object) -> nn.Module:
    """Return ``timm.create_model`` of these; one clear ValueError for an unknown name or option.

    ``img_size`` is left out for a family that refuses it, since it takes images of any size.
    EVA's and BEiT's attention is set to call its qkv linear and to add the bias apart. By default
    it reads the weight directly and would bypass an adapter. ValueError also if patches do not
    divide the image.
    """
    if not timm.is_model(name):
        raise ValueError(f"unknown model '{name}'; {near(name, timm.list_models())}")
    model = _built(name, options)
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
    _check_patches(name, model)
    return model


def _built(name: str, options: Mapping[str, object]) -> nn.Module:
    try:
        return timm.create_model(name, **options)  # type: ignore[arg-type]
    except (TypeError, AssertionError) as error:
        if "img_size" in options and re.search("unexpected keyword.*img_size", str(error)):
            others = dict(options)
            del others["img_size"]
            return _built(name, others)
        raise ValueError(f"model '{name}' refuses its options: {error}") from error


def load_weights(model: nn.Module, source: str) -> str:
    """Give ``model`` the weights of ``source``, in place; return one line on what was done.

    ``source`` is one of:

    - a file of timm weights (``.safetensors``, ``.pth``),
    - ``hf-hub:owner/name``,
    - ``pretrained``: timm's own weights of the model.

    Weights are adapted to the model: position and patch embeddings to its image and patch size by
    timm's filter for the architecture, the first convolution to its input channels. A head with
    another number of classes stays new. ValueError if ``source`` cannot be read. ValueError also
    if anything but the head is missing, left over or of another shape.
    """
    found = _read(model, source)
    weights = _fitted(found, model, source)
    _check_fit(source, weights, model)
    new = [key for key in model.state_dict() if key not in weights]
    model.load_state_dict(weights, strict=False)
    parts = [f"{source}: {len(weights)} of {len(weights) + len(new)} tensors"]
    adapted = []
    for key in _reshaped(weights, found):
        adapted.append(f"{key} {tuple(found[key].shape)} -> {tuple(weights[key].shape)}")
    if adapted:
        parts.append(f"adapted: {', '.join(adapted)}")
    if new:
        parts.append(f"new: {', '.join(new)}")
    return "; ".join(parts)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` into evaluation mode inside, and back into its former mode afterwards.

    The former mode comes back after an exception too.
    """
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def _own_name(model: nn.Module) -> str:
    """Return the name, with its tag, by which timm knows the model's pretrained weights."""
    config = _config(model)
    parts = [config.get("architecture"), config.get("tag")]
    return ".".join(map(str, filter(None, parts)))


def _read(model: nn.Module, source: str) -> dict[str, Tensor]:
    """Return the tensors of ``source`` by name.

    They are in float32, so that they are not resampled in float16.
    """
    remote = source == PRETRAINED or source.startswith(HUB)
    if not remote and not Path(source).is_file():
        raise ValueError(
            f"init_checkpoint={source}: there is no such file; give a file of timm weights, "
            "hf-hub:owner/name, or pretrained"
        )
    try:
        if remote:
            name = _own_name(model) if source == PRETRAINED else source
            found = timm.create_model(name, pretrained=True).state_dict()
        else:
            found = load_state_dict(source)
    except Exception as error:  # of torch, safetensors, the hub's client: no common class
        why = _first_sentence(error) if remote else "holds no weights that timm can read"
        raise ValueError(f"init_checkpoint={source}: {why}") from error
    if not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"init_checkpoint={source}: holds no weights, tensors by name")
    return {key: _in_float32(tensor) for key, tensor in found.items()}


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _fitted(found: Mapping[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Return ``found`` converted and resampled to ``model``, without a head of other shapes."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = model.state_dict()
    weights = dict(found)
    try:
        if convert is not None:
            weights = dict(convert(weights, model))
        for name in _names(model, "first_conv"):
            key = f"{name}.weight"
            if key in weights and key in own:
                weights[key] = _for_channels(own[key].shape[1], weights[key])
    except Exception as error:  # whatever a filter raises on the weights of another model
        raise ValueError(
            f"init_checkpoint={source} cannot be made to fit {_config(model)['architecture']} "
            f"({_first_sentence(error)}); choose the model.name that it was made with"
        ) from error
    for key in list(weights):
        fits = key in own and own[key].shape == weights[key].shape
        if _in_head(key, model) and not fits:
            del weights[key]
    return weights


def _for_channels(channels: int, weight: Tensor) -> Tensor:
    """Return the weight (out, in, ...) of a convolution for inputs of so many channels."""
    return weight if weight.shape[1] == channels else adapt_input_conv(channels, weight)


def _check_fit(source: str, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise ValueError unless ``weights`` are exactly those of ``model``.

    Its head may be missing.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in weights and not _in_head(key, model)]
    besides = [key for key in weights if key not in own]
    other = []
    for key in _reshaped(weights, own):
        other.append(f"{key} {tuple(weights[key].shape)}, here {tuple(own[key].shape)}")
    problems = {"lacks": missing, "has besides": besides, "differs in": other}
    told = [f"{what} {_some(keys)}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(
            f"init_checkpoint={source} is another model's: it {', '.join(told)}; choose the "
            "model.name, and options, that it was made with"
        )


def _reshaped(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Return the keys that both have, with tensors of different shapes."""
    return [key for key in one if key in other and one[key].shape != other[key].shape]


def _first_sentence(error: Exception) -> str:
    message = str(error).strip() or type(error).__name__
    return re.split(r"\n|\. ", message)[0].rstrip(".")


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _config(model: nn.Module) -> Mapping[str, object]:
    return getattr(model, "pretrained_cfg", None) or {"architecture": type(model).__name__}


def _names(model: nn.Module, kind: str) -> tuple[str, ...]:
    """Return the modules that timm names as the model's ``first_conv`` or ``classifier``."""
    names = _config(model).get(kind) or ()
    if isinstance(names, str):
        return (names,)
    return tuple(names)  # type: ignore[arg-type]


def _in_head(key: str, model: nn.Module) -> bool:
    return any(key.startswith(f"{name}.") for name in _names(model, "classifier"))


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
