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
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
