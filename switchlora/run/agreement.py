"""Let all ranks of a run agree: on settings and code before it starts, on weights while it trains.

Ranks that train different things would wait for each other in vain, or end with weights that no
single run would have. One disagreement ends the run.
"""

import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from switchlora.config import Config, leaves
from switchlora.data import Data
from switchlora.errors import RanksDisagree
from switchlora.learner import is_sharded
from switchlora.names import some
from switchlora.process import distributed
from switchlora.storage import code_digest, versions

BY_RANK = ("system.device", "system.workers", "system.threads", "system.pin_memory")
"""keys that may differ between ranks, beside the place of the data: they describe a machine"""
SHOWN = 3
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""by the bytes of an element, the type that reads them as an integer"""


def agree_on_settings(config: Config) -> None:
    """Raise RanksDisagree, on all ranks, unless all have the same settings, versions and code."""
    if distributed.world_size() == 1:
        return
    with distributed.together():
        own = {key: value for key, value in leaves(config) if not _describes_a_machine(key)}
        own["the code"] = code_digest(own)
        own["the version of python"] = platform.python_version()
        for package, installed in versions().items():
            own[f"the version of {package}"] = installed
    _agree(own, "start all of them with the same command, code and versions")


def agree_on_data(data: Data) -> None:
    """Raise RanksDisagree, on all ranks, unless all read the same data."""
    if distributed.world_size() == 1:
        return
    with distributed.together():
        own = {"the data (its digest)": data.digest()}
    _agree(own, "give all of them the same files, see data.root")


def agree_on_weights(model: nn.Module, num_updates: int) -> None:
    """Raise RanksDisagree, on all ranks, unless all hold the same parameters.

    The parameters of a sharded model are held by one rank each, so there is nothing to compare.
    """
    if distributed.world_size() == 1 or is_sharded(model):
        return
    sums = bit_sums(dict(model.named_parameters()))
    everyone = distributed.gather(sums)
    differ = [name for name in sums if len({found[name] for found in everyone}) > 1]
    if differ:
        raise RanksDisagree(
            f"ranks hold different weights at update {num_updates}: "
            f"{some(differ, SHOWN)} (a fault of memory or network, or code that does "
            "not do the same on all ranks)"
        )


def bit_sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return, by name, the sum of a tensor's elements read as integers: any one change shows.

    The sums are made where the tensors are, and reach the host in one transfer.
    """
    sums = []
    for tensor in tensors.values():
        integers = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])
        sums.append(integers.sum(dtype=torch.int64))
    on_host = torch.stack(sums).tolist() if sums else []
    return dict(zip(tensors, on_host, strict=True))


def _describes_a_machine(key: str) -> bool:
    return key in BY_RANK or key.endswith("root")


def _agree(own: Mapping[str, Any], advice: str) -> None:
    """Raise RanksDisagree, with the keys, unless ``own`` is the same on all ranks."""
    everyone = distributed.gather(dict(own))
    for number, found in enumerate(everyone):
        differ = _differences(everyone[0], found, number)
        if differ:
            raise RanksDisagree(f"ranks disagree on {some(differ, SHOWN, '; ')}: {advice}")


def _differences(first: Mapping[str, Any], other: Mapping[str, Any], number: int) -> list[str]:
    found = []
    for key in {**first, **other}:
        if key not in first or key not in other:
            holder = 0 if key in first else number
            found.append(f"{key}, which only rank {holder} has")
        elif repr(first[key]) != repr(other[key]):
            found.append(f"{key}, {first[key]} on rank 0 and {other[key]} on rank {number}")
    return found
