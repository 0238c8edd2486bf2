"""Shard models that outgrow one device with torch's fully_shard, and gather them again."""

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from switchlora.process import full, world_size


def shard(model: nn.Module) -> nn.Module:
    """Shard the parameters of ``model`` over all ranks, block by block, in place; return it.

    Adapters cannot be added to a sharded model. Change its ``gathered`` copy instead, then shard
    that. ValueError if modules share parameters.
    """
    if len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False))):
        raise ValueError("system.parallel=fsdp does not go with parameters that modules share")
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a plain model with its buffers, whose parameters take no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def gathered(model: nn.Module, bones: nn.Module) -> nn.Module:
    """Return a plain copy of a sharded model on the CPU, on every rank.

    It is made from the model's ``skeleton``. Only one parameter at a time is whole on the device.
    """
    plain = copy.deepcopy(bones)
    whole = {name: full(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}
    plain.load_state_dict(whole, assign=True)
    return plain.train(model.training)


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``shard`` was applied to ``model``."""
    return isinstance(model, FSDPModule)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [
        child
        for parent in reversed(list(model.modules()))
        if isinstance(parent, nn.Sequential | nn.ModuleList)
        for child in parent
        if not isinstance(child, nn.Linear)
        and any(isinstance(module, nn.Linear) for module in child.modules())
    ]
