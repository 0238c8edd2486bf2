"""Write files for other libraries: the merged model for timm, the adapter alone for PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from switchlora.adapters import (
    Adapter,
    CoreLinear,
    GuidedLinear,
    adapted_modules,
    merged_state_dict,
    without_adapters,
)
from switchlora.models import HALF, RESIDUAL, read_directly
from switchlora.storage.files import follow_umask

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def save_merged(model: nn.Module, path: Path | str) -> Path:
    """Write the plain model, adapters merged, for timm's ``checkpoint_path=``; return ``path``.

    ValueError for a model with layers that no weight can stand for.
    """
    path = Path(path)
    save_tensors(merged_state_dict(model), path)
    return path


def save_adapter(model: nn.Module, folder: Path | str) -> Path:
    """Write the adapter in PEFT's format, and its base model as ``residual.safetensors``.

    Load the residual with timm, then ``peft.PeftModel.from_pretrained(model, folder)``.

    - Row slices of a fused linear become one adapter. It has their summed rank and a
      block-diagonal B.
    - A linear whose slices are all frozen or dense gets no adapter. Neither does a guided one, or
      one that trains a core.
    - A linear whose weight timm or torch reads past an adapter gets none: ``merged_for_peft``.
    - The residual of a factorised linear is zero; SLTrain's are its sparse entries.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    merged = merged_for_peft(model)
    for name, module in adapted_modules(model).items():
        if module.kind in (GuidedLinear.kind, CoreLinear.kind) or name in merged:
            dense[f"{name}.weight"] = module.merged()
            continue
        A, B = _stacked(module.adapters(), module.out_features)
        if not len(A):
            dense[f"{name}.weight"] = module.merged()
            continue
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = B
        ranks[name] = len(A)
        if module.weight is None:
            dense[f"{name}.weight"] = module.residual().detach()
    residual = without_adapters(model) | dense
    save_tensors(residual, folder / RESIDUAL, HALF)
    save_tensors(tensors, folder / ADAPTER)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(_peft_config(ranks), indent=2))
    return folder


def merged_for_peft(model: nn.Module) -> list[str]:
    """Return the adapted linears that are merged into the residual, since PEFT cannot reach them.

    timm and torch read their weights directly. In this program they do not, see ``read_directly``.
    """
    adapted = adapted_modules(model)
    return [name for name in read_directly(model) if name in adapted]


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path | str, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors into a file of safetensors; OSError if it cannot be written."""
    path = Path(path)
    on_cpu: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous().cpu()
        place = whole.untyped_storage().data_ptr()
        on_cpu[name] = whole.clone() if place in places else whole  # modules may share tensors
        places.add(place)
    try:
        save_file(on_cpu, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    follow_umask(path)


def _stacked(adapters: dict[str, Adapter], out_features: int) -> tuple[Tensor, Tensor]:
    """Return the factors A (rank, in) and B (out, rank) of one adapter for all row slices."""
    factors_A = [adapter.A.detach() for adapter in adapters.values()]
    A = torch.cat(factors_A).cpu()
    B = torch.zeros(out_features, len(A), dtype=factors_A[0].dtype)
    start = 0
    for adapter in adapters.values():
        stop = start + len(adapter.A)
        B[adapter.rows, start:stop] = adapter.scaling * adapter.B.detach().cpu()
        start = stop
    return A, B


def _peft_config(ranks: dict[str, int]) -> dict[str, object]:
    """Return PEFT's settings; alpha is the rank, since B holds the scaling."""
    largest = max(ranks.values(), default=0)
    pattern = {f"^{name}$".replace(".", r"\."): rank for name, rank in ranks.items()}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": RESIDUAL,
        "r": largest,
        "lora_alpha": largest,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
