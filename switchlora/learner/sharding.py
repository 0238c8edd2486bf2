"""Shard models that outgrow one device with torch's fully_shard, and gather them again."""

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from switchlora.process import full, world_size


def shard(
    model: nn.Module, device: torch.device | None = None, precision: str = "fp32"
) -> nn.Module:
    """Shard the parameters of ``model`` over all ranks, block by block, in place; return it.

    Shards lie on ``device``, by default where the model is. In bf16 ranks gather half the bytes;
    gradients are summed, and weights and moments kept, in fp32.

    Adapters cannot be added to a sharded model. Change its ``gathered`` copy instead, then shard
    that. ValueError if modules share parameters.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if len(list(model.parameters())) < len(named):
        raise ValueError("system.parallel=fsdp does not go with parameters that modules share")
    device = device or next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = _mixed_precision(precision)
    for block in sequence_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _mixed_precision(precision: str) -> MixedPrecisionPolicy:
    if precision != "bf16":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def skeleton(model: nn.Module, keep_buffers: bool = True) -> nn.Module:
    """Return a copy of a plain model whose parameters have shapes and dtypes, and no values.

    Its buffers have values if ``keep_buffers``.
    """
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        copies[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    if not keep_buffers:
        for buffer in model.buffers():
            copies[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, copies)


def gathered(model: nn.Module, bones: nn.Module) -> nn.Module:
    """Return a plain copy of a sharded model on the CPU, on every rank.

    It is made from the model's ``skeleton``. Only one parameter at a time is whole on the device.
    """
    plain = copy.deepcopy(bones)
    whole = {}
    for name, tensor in model.state_dict().items():
        whole[name] = full(tensor.detach()).cpu()
    plain.load_state_dict(whole, assign=True)
    return plain.train(model.training)


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``shard`` was applied to ``model``."""
    return isinstance(model, FSDPModule)


def sequence_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of sequences that hold linears, the innermost sequences first."""
    found: list[nn.Module] = []
    for parent in reversed(list(model.modules())):
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            found += filter(_holds_linears, parent)
    return found


def _holds_linears(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return False
    return any(isinstance(part, nn.Linear) for part in module.modules())
