"""Take an adapter off: the model of just before the switch, bit for bit.

W - s B A and s B A, each rounded, do not add up to the bits of W. So a file beside the run keeps
what the switch changed, and what goes on training after it. What the switch froze with its bits
as they were lies in ``residual.safetensors`` beside the adapter already. With factors that start
at B = 0 that is every weight with an adapter, and the file is small.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from switchlora.adapters import CoreLinear, GuidedLinear, adapted_modules, without_adapters
from switchlora.models import RESIDUAL, read_half
from switchlora.process import distributed
from switchlora.storage.export import merged_for_peft, save_tensors
from switchlora.storage.reading import FileDamaged

BEFORE = "before_switch.safetensors"


@dataclass(frozen=True)
class Before:
    """The model of just before the switch."""

    weights: dict[str, Tensor]
    num_updates: int
    """updates after which it switched"""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state of a plain model on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def save_before(
    folder: Path | str,
    before: Mapping[str, Tensor],
    model: nn.Module,
    stays: bool,
    num_updates: int,
) -> Path:
    """Keep in a run folder the weights ``before`` that the switched ``model`` does not keep.

    ``stays`` says whether what the switch froze stays as it is to the end of the run.
    """
    folder = Path(folder)
    again = kept_by(model, before) if stays else set()
    rest = {name: tensor for name, tensor in before.items() if name not in again}
    about = {"num_updates": str(num_updates), "checksum": checksum_of(before)}
    part = folder / f".{BEFORE}"
    save_tensors(rest, part, about)
    part.replace(folder / BEFORE)
    return folder / BEFORE


def kept_by(model: nn.Module, before: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the weights that are frozen in ``model`` with the bits of ``before``.

    Those are left out that ``save_adapter`` writes merged with what trains.
    """
    merged = set(merged_for_peft(model))
    for name, module in adapted_modules(model).items():
        if module.kind in (GuidedLinear.kind, CoreLinear.kind) or module.dense_rows():
            merged.add(name)
    now = without_adapters(model)
    kept = set()
    for name, parameter in model.named_parameters():
        known = name in before and name in now and name.rpartition(".")[0] not in merged
        if known and not parameter.requires_grad and same_bits(now[name], before[name]):
            kept.add(name)
    return kept


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same type, shape and bits."""
    one, other = one.detach().cpu(), other.detach().cpu()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(bits_of(one), bits_of(other))


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_before(folder: Path | str) -> Before:
    """Return the model of just before the switch of the run, or of the version, in ``folder``.

    ValueError when it has no such file, or when anything of it is damaged.
    """
    folder = Path(folder)
    path, beside = folder / BEFORE, folder / "adapter" / RESIDUAL
    if not path.is_file():
        raise ValueError(f"{folder} has no {BEFORE}: it never switched, or began after its switch")
    about, weights = read_kept(path)
    try:
        frozen = read_half(beside) if beside.is_file() else {}
        whole = {**frozen, **weights}
        same = checksum_of(whole) == about.get("checksum")
        num_updates = int(about["num_updates"])
    except (KeyError, ValueError) as error:
        raise FileDamaged(f"{path} and {beside} are damaged: {error}") from error
    if not same:
        raise FileDamaged(f"{path} and {beside} do not give the model of before the switch")
    return Before(whole, num_updates)


def read_kept(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return what a file says of itself, and its tensors; FileDamaged if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileDamaged(f"{path} is damaged: {error}") from error


def checksum_of(weights: Mapping[str, Tensor]) -> str:
    """Return a checksum of weights that the order of their names does not change."""
    return distributed.checksum({name: weights[name] for name in sorted(weights)})
