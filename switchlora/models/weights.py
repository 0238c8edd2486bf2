"""Load weights to start from: of a file, of the hub, or timm's own."""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from switchlora.models.files import read_file
from switchlora.names import some

PRETRAINED = "pretrained"
HUB = "hf-hub:"
AVERAGE = re.compile(r"ema|teacher|averag")
"""found in the name of a set of weights that is taken before others"""
DEPTH = 4
"""most words of a prefix"""
Weights = Mapping[str, Tensor]


def load_weights(model: nn.Module, source: str) -> str:
    """Give ``model`` the weights of ``source``, in place; return one line on what was done.

    ``source`` is one of:

    - a file of timm weights (``.safetensors``, ``.pth``), which is read without running code,
    - ``hf-hub:owner/name``,
    - ``pretrained``: timm's own weights of the model.

    A file may hold more: the set of weights that fits is taken, under whatever name or prefix. Of
    several that fit, an average (EMA) comes first.

    Weights are adapted to the model: position and patch embeddings to its image and patch size by
    timm's filter for the architecture, the first convolution to its input channels. A head with
    another number of classes stays new. ValueError if ``source`` cannot be read. ValueError also
    if anything but the head is missing, left over or of another shape.
    """
    whole = _read(model, source)
    prefix, weights = _fitting(whole, model, source)
    own = model.state_dict()
    new = [key for key in own if key not in weights]
    model.load_state_dict(weights, strict=False)
    parts = [f"{source}: {len(weights)} of {len(own)} tensors"]
    if prefix:
        parts.append(f"taken from {prefix.removesuffix('.')}")
    aside = [key for key in whole if not key.startswith(prefix)]
    if aside:
        parts.append(f"left aside: {some(aside)}")
    found = _under(whole, prefix)
    adapted = []
    for key in _reshaped(weights, found):
        adapted.append(f"{key} {tuple(found[key].shape)} -> {tuple(weights[key].shape)}")
    if adapted:
        parts.append(f"adapted: {', '.join(adapted)}")
    if new:
        parts.append(f"new: {', '.join(new)}")
    return "; ".join(parts)


def _own_name(model: nn.Module) -> str:
    """Return the name, with its tag, by which timm knows the model's pretrained weights."""
    config = _config(model)
    parts = [config.get("architecture"), config.get("tag")]
    return ".".join(map(str, filter(None, parts)))


def _read(model: nn.Module, source: str) -> dict[str, Tensor]:
    """Return the tensors of ``source`` by name.

    They are in float32, so that they are not resampled in float16.
    """
    try:
        if source == PRETRAINED or source.startswith(HUB):
            found = _read_remote(_own_name(model) if source == PRETRAINED else source)
        else:
            found = read_file(Path(source))
    except ValueError as error:
        raise ValueError(f"init_checkpoint={source}: {error}") from error
    if not found:
        raise ValueError(f"init_checkpoint={source}: holds no weights, tensors by name")
    factors = [key for key in found if "lora_" in key]
    if factors:
        raise ValueError(
            f"init_checkpoint={source}: holds low-rank factors, such as {factors[0]}, which are "
            "half a model; give the merged model, such as model.safetensors of a run, or the "
            "folder of the adapter as init_adapter"
        )
    weights = {}
    for key, tensor in found.items():
        weights[key] = _in_float32(tensor)
        if tensor.is_floating_point() and not torch.isfinite(weights[key]).all():
            raise ValueError(f"init_checkpoint={source}: {key} holds numbers that are not finite")
    return weights


def _read_remote(name: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of torch, safetensors, the hub's client: no common class
        raise ValueError(_first_sentence(error)) from error


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.to_dense().float() if tensor.is_floating_point() else tensor


def _fitting(whole: Weights, model: nn.Module, source: str) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix of the names of the first set of weights that fits, and those weights.

    ValueError of the first set when none fits.
    """
    first: ValueError | None = None
    for prefix in _prefixes(list(whole), list(model.state_dict())):
        try:
            weights = _fitted(_under(whole, prefix), model, source)
            _check_fit(source, weights, model)
            return prefix, weights
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def _prefixes(names: Sequence[str], own: Sequence[str]) -> list[str]:
    """Return the prefixes under which ``names`` may hold a model, the likeliest first.

    Under the first ones lie the most names of ``own``, the model's. Under the others lie all
    names, for weights that timm's filter gives other names.

    >>> _prefixes(["model.head.weight", "model.head.bias", "epoch"], ["head.weight", "head.bias"])
    ['model.', '']
    """
    known = set(own)
    hits: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name in names:
        words = [f"{word}." for word in name.split(".")[:-1]]
        for prefix in ["", *accumulate(words[:DEPTH])]:
            sizes[prefix] += 1
            hits[prefix] += name.removeprefix(prefix) in known
    most = max(hits.values())
    likely = [prefix for prefix in sizes if most and hits[prefix] >= 0.9 * most]
    likely.sort(key=lambda prefix: not AVERAGE.search(prefix))
    shared = [prefix for prefix in sizes if sizes[prefix] == len(names)]
    return list(dict.fromkeys([*likely, *shared]))


def _under(whole: Weights, prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with ``prefix``, without it."""
    found = {}
    for name, tensor in whole.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = tensor
    return found


def converted(weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """Return weights with the names and shapes of ``model``, by timm's filter if it has one."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return dict(weights) if convert is None else dict(convert(dict(weights), model))


def _fitted(found: Weights, model: nn.Module, source: str) -> dict[str, Tensor]:
    """Return ``found`` converted and resampled to ``model``, without a head of other shapes."""
    own = model.state_dict()
    try:
        weights = converted(found, model)
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


def _check_fit(source: str, weights: Weights, model: nn.Module) -> None:
    """Raise ValueError unless ``weights`` are exactly those of ``model``.

    Its head may be missing.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in weights and not _in_head(key, model)]
    besides = [key for key in weights if key not in own]
    other = []
    for key in _reshaped(weights, own):
        other.append(f"{key} {tuple(weights[key].shape)}, here {tuple(own[key].shape)}")
    quantised = [key for key in own if key in weights and _is_quantised(weights[key], own[key])]
    problems = {"lacks": missing, "has besides": besides, "differs in": other}
    if quantised:
        raise ValueError(
            f"init_checkpoint={source} is quantised: {some(quantised)} holds no floating-point "
            "numbers; give the weights as they were before"
        )
    told = [f"{what} {some(keys)}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(
            f"init_checkpoint={source} is another model's: it {', '.join(told)}; choose the "
            "model.name, and options, that it was made with"
        )


def _is_quantised(weight: Tensor, own: Tensor) -> bool:
    return own.is_floating_point() and not weight.is_floating_point()


def _reshaped(one: Weights, other: Weights) -> list[str]:
    """Return the keys that both have, with tensors of different shapes."""
    return [key for key in one if key in other and one[key].shape != other[key].shape]


def _first_sentence(error: Exception) -> str:
    message = str(error).strip() or type(error).__name__
    return re.split(r"\n|\. ", message)[0].rstrip(".")


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
