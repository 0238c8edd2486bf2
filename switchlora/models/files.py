"""Read files of weights without running any code that they hold."""

import argparse
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

RESIDUAL = "residual.safetensors"
HALF = {"half": "residual"}
"""metadata of a file that holds only the weights beside an adapter"""
MERGED = ("model.safetensors", "pytorch_model.bin")
STARTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: git lfs pull",
    b"<": "is a web page, not the file itself: download it again",
    b"\x93NUMPY": "is an array of NumPy, not weights by name",
}


def read_file(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file by name; names of nested mappings are joined by dots.

    The content says whether it is a file of safetensors or of ``torch.save``, not the name. What
    lies beside the tensors is left out. ValueError, without the path, says why it cannot be read.
    """
    _check_kind(path)
    with path.open("rb") as file:
        start = file.read(64)
    for known, what in STARTS.items():
        if start.lstrip().startswith(known):
            raise ValueError(what)
    if start[8:9] == b"{":
        found: object = _read_safetensors(path)
    else:
        found = _read_torch(path)
    return dict(_tensors(found))


def read_half(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of safetensors, be it the half of a model beside an adapter."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"is a damaged file of safetensors ({error})") from error


def _check_kind(path: Path) -> None:
    """Raise ValueError for a folder, and for half a model."""
    if path.is_dir():
        raise ValueError(f"is a folder: {_advice_in(path)}")
    if not path.is_file():
        raise ValueError(
            "there is no such file; give a file of timm weights, hf-hub:owner/name, or pretrained"
        )
    if path.stat().st_size == 0:
        raise ValueError("is empty")
    if path.name == RESIDUAL and (path.parent / "adapter_config.json").is_file():
        raise ValueError(_half_of(path))


def _advice_in(folder: Path) -> str:
    """Return what to give instead of a folder."""
    if (folder / "adapter_config.json").is_file():
        return f"an adapter, which is half a model: {_merged_near(folder)}"
    for name in MERGED:
        if (folder / name).is_file():
            return f"give {folder / name}"
    if (folder / "state.pt").is_file():
        return f"a checkpoint: go on from it with resume={folder}"
    return "give the file of weights in it"


def _half_of(path: Path) -> str:
    return f"is half a model, the weights beside an adapter: {_merged_near(path.parent)}"


def _merged_near(folder: Path) -> str:
    merged = folder.parent / "model.safetensors"
    if merged.is_file():
        return f"give {merged}"
    return f"give the merged model, model.safetensors of its run, or init_adapter={folder}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"is a damaged file of safetensors ({error})") from error
    if HALF.items() <= metadata.items():
        raise ValueError(_half_of(path))
    return read_half(path)


def _read_torch(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_harmless()), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = _code_in(path)
        if not names:
            raise ValueError("is not a file of weights: neither safetensors nor torch.save") from (
                error
            )
        raise ValueError(
            f"would run code: it holds {', '.join(names[:3])}, not only tensors; save "
            "model.state_dict() where it comes from"
        ) from error
    except Exception as error:  # torch has no class of errors for files
        if "TorchScript" in str(error):
            raise ValueError("is a TorchScript archive: save its state_dict()") from error
        raise ValueError("is damaged, or no file of weights") from error


def _harmless() -> list[Any]:
    """Return what checkpoints hold beside tensors: timm's options, and numbers of NumPy."""
    numbers = ("float64", "float32", "float16", "int64", "int32", "bool")
    dtypes = [type(np.dtype(name)) for name in numbers]
    scalar = np.float64(0).__reduce__()[0]
    old_name = (scalar, "numpy.core.multiarray.scalar")
    return [argparse.Namespace, np.dtype, scalar, old_name, *dtypes]


def _code_in(path: Path) -> list[str]:
    """Return the names of what a file would call besides what is harmless."""
    try:
        with torch.serialization.safe_globals(_harmless()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it knows the present format alone
        with path.open("rb") as file:
            return ["objects of other kinds"] if file.read(1) == b"\x80" else []


def _tensors(found: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(found, Tensor) and prefix:
        yield prefix, found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
