"""How torch computes on this machine: TF32, kernels that repeat their bits, the fastest ones."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def set_backends(device: torch.device, tf32: bool, deterministic: bool) -> None:
    """Set what a run on ``device`` asks of torch.

    - ``tf32``: products in float32 round their operands to 10 bits, on CUDA.
    - ``deterministic``: every operation gives the same bits each time, or raises an error.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault(WORKSPACE, ":4096:8")  # cuBLAS reads it at its first product
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True)


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute products in float32 without TF32, and put the setting back.

    TF32 moves a number by about 1e-3, as much as a drift at which a switch is undone.
    """
    name, exact, before = _tf32_setting()
    try:
        for part in before:
            setattr(part, name, exact)
        yield
    finally:
        for part, precision in before.items():
            setattr(part, name, precision)


def _tf32_setting() -> tuple[str, Any, dict[Any, Any]]:
    """Return the attribute that sets TF32, the value that turns it off, and the values it has.

    Torch has an old attribute and a new one. Once the new one was set, reading the old one raises.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        return "allow_tf32", False, {each: each.allow_tf32 for each in (products, convolutions)}
    except RuntimeError:
        parts = products, convolutions.conv  # type: ignore[attr-defined]
        return "fp32_precision", "ieee", {each: each.fp32_precision for each in parts}
