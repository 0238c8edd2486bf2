"""Frozen weights in fewer bytes: codes of 8 or 4 bits, and the scales that make numbers of them.

Plain tensors of integers and of float32 hold them. A dtype says how codes are read:

- int8: integers from -127 to 127, with one scale a row.
- float8_e4m3fn: the bytes of torch's floats of 8 bits, up to 448, with one scale a row.
- uint8: two codes of 4 bits a byte, which name levels of NF4, with one scale for each 64 columns
  of a row (QLoRA; Dettmers et al., arXiv 2305.14314).

A scale is the largest magnitude that it stands for, over the largest number of the codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INT8, FP8, NF4 = torch.int8, torch.float8_e4m3fn, torch.uint8
CODES = {"int8": INT8, "fp8": FP8, "nf4": NF4}
"""dtype by name"""
LARGEST = {INT8: 127.0, FP8: 448.0, NF4: 1.0}
"""by dtype, the largest number that a code stands for before scaling"""
BLOCK = 64
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""of NF4: quantiles of a normal distribution, and 0 (arXiv 2305.14314, appendix E)"""
_PAIRS: dict[torch.device, Tensor] = {}


class Quantised(NamedTuple):
    """A matrix (out, in) as codes, with the ``scale`` of each row (out, 1) or block."""

    codes: Tensor
    scale: Tensor


def is_quantised(dtype: torch.dtype) -> bool:
    """Return whether weights in this dtype are codes, which need scales."""
    return dtype in LARGEST


@torch.no_grad()
def quantised(weight: Tensor, dtype: torch.dtype) -> Quantised:
    """Return ``weight`` (out, in) rounded to the nearest codes of a ``dtype``.

    An entry of int8 is off by at most 1/254 of its row's largest magnitude. Codes of NF4 are
    (out, in / 2), rounded up, and scales (out, in / 64). Quantising what ``dequantised`` returns
    gives the same codes.
    """
    weight = weight.float()
    out_features, in_features = weight.shape
    width = BLOCK if dtype == NF4 else in_features
    blocks = F.pad(weight, (0, -in_features % width)).view(out_features, -1, width)
    scale = blocks.abs().amax(2) / LARGEST[dtype]
    ratio = (blocks / scale.where(scale > 0, 1.0)[:, :, None]).flatten(1)[:, :in_features]
    ratio = ratio.clamp(-LARGEST[dtype], LARGEST[dtype])
    if dtype == NF4:
        return Quantised(_packed(ratio), scale)
    if dtype == FP8:
        return Quantised(ratio.to(FP8).view(torch.uint8), scale)
    return Quantised(ratio.round().to(INT8), scale)


def dequantised(codes: Tensor, scale: Tensor, dtype: torch.dtype, in_features: int) -> Tensor:
    """Return the matrix (out, in) that codes of a ``dtype`` stand for, in float32."""
    if dtype == INT8:
        return codes.float() * scale.float()
    if dtype == FP8:
        return codes.view(FP8).float() * scale.float()
    values = _pairs(codes.device)[codes.int()].flatten(1)[:, :in_features]
    return values * scale.float().repeat_interleave(BLOCK, 1)[:, :in_features]


def _packed(ratio: Tensor) -> Tensor:
    """Return the nearest levels of numbers from -1 to 1, two a byte, the left one on top."""
    levels = torch.tensor(LEVELS, device=ratio.device)
    nearest = torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2).to(NF4)
    left, right = F.pad(nearest, (0, ratio.shape[1] % 2)).view(len(ratio), -1, 2).unbind(2)
    return left * 16 + right


def _pairs(device: torch.device) -> Tensor:
    """Return the two levels that each byte names (256, 2).

    They stay on the device: sending them there for each product would make the host wait.
    """
    if torch.compiler.is_compiling() or device not in _PAIRS:
        levels = torch.tensor(LEVELS, device=device)
        byte = torch.arange(256, device=device)
        pairs = torch.stack([levels[byte // 16], levels[byte % 16]], dim=1)
        if type(pairs) is not Tensor or torch.compiler.is_compiling():  # without content
            return pairs
        _PAIRS[device] = pairs
    return _PAIRS[device]
