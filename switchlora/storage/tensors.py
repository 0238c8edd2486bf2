"""Save and restore the tensors of a learner and the states of the random generators."""

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from switchlora.adapters import plain_shapes
from switchlora.learner import Learner, load_moments
from switchlora.process import distributed

TENSORS = "tensors"


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
    before, now = state["optimizer"], _kind(learner.optimizer)
    if before != now:
        return [f"moments start anew: the optimizer was {before}, it is {now}"]
    load_moments(learner.model, learner.optimizer, moments)
    if not branches:
        for group, saved in zip(learner.optimizer.param_groups, state["groups"], strict=True):
            group.update(saved)
    return []


def learner_state(learner: Learner) -> dict[str, Any]:
    """Return the small state of a learner as plain values.

    - ``optimizer``: name of the optimizer's class, with its options that have moments.
    - ``scaler``: state of the loss scaler, or None.
    - ``groups``: values of the optimizer's parameter groups.
    - ``shapes``: shapes of the plain model's tensors.
    - ``trained``: names of the parameters that train.
    """
    return {
        "optimizer": _kind(learner.optimizer),
        "scaler": learner.scaler.state_dict() if learner.scaler else None,
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in learner.optimizer.param_groups
        ],
        "shapes": plain_shapes(learner.model),
        "trained": [name for name, p in learner.model.named_parameters() if p.requires_grad],
    }


def _kind(optimizer: Optimizer) -> str:
    options = [key for key in ("amsgrad", "momentum") if optimizer.defaults.get(key)]
    return " with ".join([type(optimizer).__name__, *options])


def random_states() -> dict[str, Any]:
    """Return the states of random, numpy and torch, as plain types and tensors."""
    numpy_state: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [numpy_state[0], [int(key) for key in numpy_state[1]], *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
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
    """Write all tensors with torch.distributed.checkpoint; return the other values."""
    flat = {f"weights/{name}": tensor for name, tensor in tensors["weights"].items()}
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
    reader = dcp.FileSystemReader(folder)
    parameters = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        if not key.startswith(only):
            continue
        assert isinstance(saved, TensorStorageMetadata)
        parameter = parameters[key.split("/")[1]]
        whole = tuple(saved.size) == tuple(parameter.shape)
        tensors[key] = (
            torch.zeros_like(parameter)
            if whole
            else torch.zeros(saved.size, dtype=saved.properties.dtype)
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader)
    weights: dict[str, Tensor] = {}
    moments = {name: dict(values) for name, values in plain.items()}
    for key, tensor in tensors.items():
        kind, name, *what = key.split("/")
        if kind == "weights":
            weights[name] = tensor
        else:
            moments.setdefault(name, {})[what[0]] = tensor
    return weights, moments
