"""Save and restore the tensors of a learner and the states of the random generators."""

import pickle
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.optim import Optimizer

from switchlora.adapters import plain_shapes
from switchlora.learner import POWERS, Learner, load_moments
from switchlora.process import distributed

TENSORS = "tensors"
FORMS = ("fused", "foreach")
"""values of an optimizer's group that say how it computes, which is the present device's matter"""
METADATA_NAMES = {
    "torch": ("Size", *(name for name in dir(torch) if type(getattr(torch, name)) is torch.dtype)),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}
"""by module, the names that ``.metadata`` of torch.distributed.checkpoint holds"""


class PlainReader(dcp.FileSystemReader):
    """Reads a sharded checkpoint without running what a pickle in it names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata; UnpicklingError for any name that does not belong there."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which is not run")
        return super().find_class(module, name)


def load_tensors(
    path: Path, state: Mapping[str, Any], learner: Learner, branches: bool
) -> list[str]:
    """Load a checkpoint into model, optimizer and scaler of ``learner``, in place.

    The model must have its adapters already. The checkpoint may come from another number of
    processes, sharded or not. A run that ``branches`` off keeps its own values of the optimizer's
    groups, such as the learning rate. Return one line if the moments cannot be taken over, since
    the optimizer is another one; else an empty list.
    """
    weights, moments = state["weights"], state["moments"]
    if weights is None:
        weights, moments = load_sharded(path / TENSORS, moments, learner.model)
    with torch.no_grad():
        for name, tensor in learner.model.state_dict().items():
            tensor.copy_(distributed.like(weights[name], tensor))
    if learner.scaler is not None and state["scaler"]:
        learner.scaler.load_state_dict(state["scaler"])
    before = state["optimizer"]
    now = _kind(learner.optimizer)
    if before != now:
        return [f"moments start anew: the optimizer was {before}, it is {now}"]
    load_moments(learner.model, learner.optimizer, moments)
    if not branches:
        for group, saved in zip(learner.optimizer.param_groups, state["groups"], strict=True):
            values = {name: value for name, value in saved.items() if name not in FORMS}
            _check_group(group, values)
            group.update(values)
    return []


def _check_group(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise an error unless the values of an optimizer's group have the names and kinds of now."""
    for name, value in saved.items():
        is_number = isinstance(value, int | float) and isinstance(now[name], int | float)
        if not is_number and type(value) is not type(now[name]):
            raise TypeError(f"'{name}' of the optimizer is {value!r}")


def learner_state(learner: Learner) -> dict[str, Any]:
    """Return the small state of a learner as plain values.

    - ``optimizer``: name of the optimizer's class, with its options that have moments.
    - ``scaler``: state of the loss scaler, or None.
    - ``groups``: values of the optimizer's parameter groups.
    - ``shapes``: shapes of the plain model's tensors.
    - ``trained``: names of the parameters that train.
    """
    groups = []
    for group in learner.optimizer.param_groups:
        values = dict(group)
        del values["params"]
        groups.append(values)
    return {
        "optimizer": _kind(learner.optimizer),
        "scaler": learner.scaler.state_dict() if learner.scaler else None,
        "groups": groups,
        "shapes": plain_shapes(learner.model),
        "trained": [name for name, p in learner.model.named_parameters() if p.requires_grad],
    }


def _kind(optimizer: Optimizer) -> str:
    """Return the name of the optimizer's class, with its options that have moments."""
    kind = type(optimizer).__name__
    for option in ("amsgrad", "momentum"):
        if optimizer.defaults.get(option):
            kind += f" with {option}"
    return kind


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise an error unless ``weights`` have the names and the shapes of the model's tensors."""
    own = model.state_dict()
    for name in own.keys() ^ weights.keys():
        raise KeyError(f"weights {name}")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(f"weights {name} have the shape {tuple(weights[name].shape)}")


def check_moments(model: nn.Module, moments: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise an error unless the moments that have a parameter's shape belong to one."""
    parameters = dict(model.named_parameters())
    for name, state in moments.items():
        for key, value in state.items():
            if value is not None and not isinstance(value, Tensor | int | float):
                raise TypeError(f"moment {key} of {name} is no number")
            shape = getattr(value, "shape", ())
            if value is not None and key in POWERS and shape != parameters[name].shape:
                raise ValueError(f"moment {key} of {name} has the shape {tuple(shape)}")


def random_states() -> dict[str, Any]:
    """Return the states of random, numpy and torch, as plain types and tensors."""
    numpy_state: Any = np.random.get_state()
    generator, keys, *rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": [generator, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the random generators to ``states``, as ``random_states`` returned them."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_sharded(folder: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Write weights and moments with torch.distributed.checkpoint.

    Return what takes their place in the state: no weights, and the values of the moments that are
    no tensors.
    """
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors["weights"].items():
        flat[f"weights/{name}"] = tensor
    plain: dict[str, dict[str, Any]] = {}
    for name, state in tensors["moments"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                flat[f"moments/{name}/{key}"] = value
            else:
                plain.setdefault(name, {})[key] = value
    dcp.save(flat, checkpoint_id=folder)
    return {"weights": None, "moments": plain}


def load_sharded(
    folder: Path, plain: Mapping[str, Mapping[str, Any]], model: nn.Module, only: str = ""
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return weights and moments; of a sharded ``model`` each rank reads its part.

    ``plain`` holds the values of the moments that are no tensors. ``only`` is 'weights' or
    'moments' to read just these.
    """
    reader = PlainReader(folder)
    parameters = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        if key.startswith(only):
            if not isinstance(saved, TensorStorageMetadata):
                raise TypeError(f"{key} is no tensor")
            _, name, *_ = key.split("/")
            tensors[key] = _place_for(saved, parameters[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader)
    weights: dict[str, Tensor] = {}
    moments = {name: dict(values) for name, values in plain.items()}
    for key, tensor in tensors.items():
        if key.startswith("weights/"):
            weights[key.removeprefix("weights/")] = tensor
        else:
            _, name, moment = key.split("/")
            moments.setdefault(name, {})[moment] = tensor
    return weights, moments


def _place_for(saved: TensorStorageMetadata, parameter: Tensor) -> Tensor:
    """Return zeros to read a saved tensor into, sharded as the ``parameter`` if it has its shape.

    Other tensors, such as a step counter, are whole on every rank.
    """
    if tuple(saved.size) == tuple(parameter.shape):
        return torch.zeros_like(parameter)
    return torch.zeros(saved.size, dtype=saved.properties.dtype)
