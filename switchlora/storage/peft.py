"""Read a LoRA adapter in PEFT's format, and put it on a plain model."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchlora.adapters import Factors, Target, adapted_modules, inject
from switchlora.models import RESIDUAL, read_file, read_half
from switchlora.storage.export import ADAPTER, ADAPTER_CONFIG, PEFT_PREFIX
from switchlora.storage.reading import content_of, parse_json
from switchlora.storage.tensors import check_weights

FACTOR = re.compile(r"(?P<name>.+)\.lora_(?P<side>[AB])\.weight")
PICKLED = "adapter_model.bin"
UNDERSTOOD = {
    *("peft_type", "peft_version", "auto_mapping", "task_type", "revision", "inference_mode"),
    *("base_model_name_or_path", "runtime_config", "megatron_config", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "ensure_weight_tying", "fan_in_fan_out", "qalora_group_size"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""settings that change nothing, or what is done here; any other one that is set is refused"""
KEEP_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""starts of PEFT that leave the base as it is; with others PEFT changes it again when it loads"""


class LoRA(NamedTuple):
    """What is added to the weight of a linear: scaling * B A, with A (r, in) and B (out, r)."""

    A: Tensor
    B: Tensor
    scaling: float


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Put the LoRA adapter of a folder in PEFT's format on a plain ``model``, in place.

    The model computes what PEFT's does. Its factors train, and what trained beside them.
    ``switchlora.adapters.merge`` then makes it plain again. Ranks, alphas and rsLoRA's scaling are
    those of the folder. Weights that it holds whole (``modules_to_save``, biases) replace the
    model's. So does the base model in ``residual.safetensors``, which ``save_adapter`` writes
    beside.

    ValueError, with the folder, for anything else that PEFT would do, such as DoRA, and for an
    adapter of another model. The model is then as before.
    """
    folder = Path(folder)
    settings = parse_json(content_of(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG)
    check_settings(settings, folder)
    path = folder / ADAPTER if (folder / ADAPTER).is_file() else folder / PICKLED
    factors, whole = _sorted_out(_tensors(path), path)
    loras = {}
    for name, (A, B) in factors.items():
        _check_fits(model, name, A, B, path)
        loras[name] = LoRA(A, B, scaling_of(name, len(A), settings, folder))
    dropout = settings.get("lora_dropout") or 0.0
    _check_whole(model, whole, path)
    base = base_beside(model, folder)
    model.load_state_dict({**base, **whole}, strict=False)
    for name, lora in loras.items():
        _put_on(model, name, lora, dropout)
    return model


def check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError for an adapter that is no plain LoRA."""
    where = f"{folder / ADAPTER_CONFIG}: "
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}peft_type is {kind}: only LORA is read; merge it with PEFT")
    dropout = settings.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{where}lora_dropout is {dropout}: give a share below 1")
    for key, value in settings.items():
        if value and key not in UNDERSTOOD:
            raise ValueError(
                f"{where}{key} is {value}, which is more than LoRA: merge it with PEFT, and start "
                "from the merged model"
            )
    start = settings.get("init_lora_weights", True)
    if start not in KEEP_BASE:
        raise ValueError(
            f"{where}init_lora_weights is {start}, so its base is no plain model: convert it with "
            "PEFT's path_initial_model_for_weight_conversion, or merge it there"
        )


def scaling_of(name: str, rank: int, settings: Mapping[str, Any], folder: Path) -> float:
    """Return the scaling of a linear's adapter, as PEFT computes it."""
    divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
    try:
        scaling = float(_alpha_of(name, settings)) / divisor
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} has wrong content: {error}") from error
    if not math.isfinite(scaling):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: the alpha of {name} is not finite")
    return scaling


def _alpha_of(name: str, settings: Mapping[str, Any]) -> Any:
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return settings.get("lora_alpha", 8)


def base_beside(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return the base model that lies beside an adapter; nothing if there is none."""
    path = folder / RESIDUAL
    if not path.is_file():
        return {}
    weights = _tensors(path)
    try:
        check_weights(model, weights)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is another model's: {error.args[0]}") from error
    return weights


def _put_on(model: nn.Module, name: str, lora: LoRA, dropout: float) -> None:
    weight = model.get_parameter(f"{name}.weight").detach()
    target = Target(name, name, slice(0, len(weight)))
    factors = Factors(lora.A.to(weight), lora.B.to(weight))
    inject(model, {name: target}, {name: factors}, lambda _: lora.scaling, dropout=dropout)
    # inject took the product out of the weight, since a switch keeps the function
    model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: an adapter of PEFT needs it beside {ADAPTER_CONFIG}")
    try:
        found = read_half(path) if path.name == RESIDUAL else read_file(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    return found


def _sorted_out(
    tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Return the factors by the name of their linear, and by name the tensors that are whole."""
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    whole = {}
    for key, tensor in tensors.items():
        plain = key.removeprefix(PEFT_PREFIX)
        found = FACTOR.fullmatch(plain)
        if found is not None:
            sides[found["side"]][found["name"]] = tensor
        else:
            whole[plain.replace(".base_layer.", ".")] = tensor
    if not sides["A"] or sides["A"].keys() != sides["B"].keys():
        alone = min(sides["A"].keys() ^ sides["B"].keys(), default="")
        raise ValueError(f"{path} has no pair of factors{f' for {alone}' if alone else ''}")
    factors = {name: Factors(A, sides["B"][name]) for name, A in sides["A"].items()}
    return factors, whole


def _check_fits(model: nn.Module, name: str, A: Tensor, B: Tensor, path: Path) -> None:
    """Raise ValueError unless the model has a plain linear of this name and shape."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{path} is another model's: there is no {name} here") from error
    if not isinstance(module, nn.Linear) or name in adapted_modules(model):
        kind = type(module).__name__
        raise ValueError(f"{path}: {name} is a {kind}: an adapter goes on a plain nn.Linear alone")
    expected = (module.out_features, module.in_features)
    matrices = A.ndim == 2 and B.ndim == 2 and len(A) == B.shape[1]
    if not matrices or not len(A) or (len(B), A.shape[1]) != expected:
        raise ValueError(
            f"{path} is another model's: {name} has factors {tuple(A.shape)} and {tuple(B.shape)} "
            f"there, and a weight {expected} here"
        )


def _check_whole(model: nn.Module, whole: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the model has tensors of these names and shapes."""
    own = model.state_dict()
    for name, tensor in whole.items():
        if name not in own:
            raise ValueError(f"{path}: {name} is no factor of LoRA, and no weight of this model")
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{path} is another model's: {name} is {tuple(tensor.shape)} there and "
                f"{tuple(own[name].shape)} here"
            )
