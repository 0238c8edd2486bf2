"""Compile the blocks of a model for its training passes; equal blocks share one graph."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton

from switchlora.learner.sharding import sequence_blocks
from switchlora.process import world_size

Asked = Mapping[str, Any] | bool | str | None
"""arguments of torch.compile, True for its defaults, None or False for eager code, 'auto' or
'graphs'"""
AUTO, CUDA_GRAPHS = "auto", "graphs"
LAUNCHED_WHOLE = "reduce-overhead"
"""torch's mode in which a GPU is given a compiled graph as one launch, a CUDA graph"""
GRAPHS = 256
"""graphs of a block's code after which torch gives up: one for each pattern of shapes and ranks"""
C_COMPILERS = ("cc", "gcc", "clang")
KEY = "full.compile"


def compile_of(
    asked: Asked,
    device: torch.device,
    recomputed: str | None = None,
    accumulation: int = 1,
    key: str = KEY,
) -> Asked:
    """Return what torch.compile is asked for on ``device``; 'auto': see ``chosen_compiler``.

    'graphs' is the mode of torch that launches CUDA graphs. Anything else is itself. ValueError
    for 'graphs' without CUDA, or in one of several processes, where nobody has tried them; it
    names ``key``.
    """
    chosen = chosen_compiler(asked, device, recomputed, accumulation)
    if chosen != CUDA_GRAPHS:
        return chosen
    check_takes_graphs(device, key)
    return {"mode": LAUNCHED_WHOLE}


def chosen_compiler(
    asked: Asked, device: torch.device, recomputed: str | None = None, accumulation: int = 1
) -> Asked:
    """Return ``asked``; where it is 'auto', what suits ``device``.

    - None: there is no GPU, or no compiler for it, or the inputs of gelus are ``recomputed``,
      which compiled code cannot do.
    - 'graphs': one process trains on a GPU of NVIDIA, in updates of one micro-batch, and computes
      nothing twice.
    - True: all else. Graphs of a micro-batch would overwrite the gradients of the one before, and
      those of a block the activations that its second pass still needs.
    """
    if asked != AUTO:
        return asked
    if device.type != "cuda" or recomputed == "gelu" or missing_compiler() is not None:
        return None
    of_nvidia = torch.version.hip is None
    return CUDA_GRAPHS if of_nvidia and graphs_go(world_size(), recomputed, accumulation) else True


def graphs_go(processes: int, recomputed: str | None, accumulation: int) -> bool:
    """Return whether a run of so many processes and micro-batches can launch CUDA graphs."""
    return processes == accumulation == 1 and recomputed is None


def missing_compiler() -> str | None:
    """Return what torch.compile lacks on this machine's GPU, or None."""
    if not has_triton():
        return "a Triton that knows this GPU"
    if not any(map(shutil.which, C_COMPILERS)):
        return f"a C compiler ({', '.join(C_COMPILERS)})"
    return None


def check_takes_graphs(device: torch.device, key: str) -> None:
    """Raise ValueError that names ``key`` where CUDA graphs cannot be had, or were never tried."""
    if device.type != "cuda":
        raise ValueError(
            f"{key}=graphs is for NVIDIA's GPUs, and this run trains on a {device.type}: "
            f"take {key}=auto"
        )
    if world_size() > 1:
        raise ValueError(
            f"{key}=graphs is for one process, and this run has {world_size()}: take {key}=auto"
        )


def check_compiles(key: str, asked: Asked, device: torch.device) -> None:
    """Raise ValueError that names ``key`` where torch.compile would refuse what is asked."""
    made_compiled(nn.Identity(), compile_of(asked, device, key=key), key)


def launches_graphs(asked: Asked) -> bool:
    """Return whether a GPU is given a whole compiled graph at once."""
    mode = asked.get("mode") if isinstance(asked, Mapping) else None
    return asked == CUDA_GRAPHS or mode == LAUNCHED_WHOLE


class CompiledBlocks:
    """The compiled forward passes of a model's blocks, which stand in their place while in use.

    Outside of ``in_use`` the model is as it was: it is copied, saved, measured and evaluated
    without the compiler. Graphs stay when a model is rebuilt, so a block of known shapes and ranks
    is not compiled again.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        self._forwards = {
            block: torch.compile(block.forward, **options) for block in compiled_blocks(model)
        }

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the blocks run their compiled passes inside."""
        patch = torch._dynamo.config.patch  # type: ignore[attr-defined]
        limits: dict[str, Any] = {
            "recompile_limit": GRAPHS,
            "accumulated_recompile_limit": 4 * GRAPHS,
        }
        with patch(optimize_ddp=False, **limits):  # a block is less than a bucket of DDP
            for block, forward in self._forwards.items():
                block.forward = forward
            try:
                yield
            finally:
                for block in self._forwards:
                    del block.forward


def compiled_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the innermost blocks of the sequences of ``model``, or the model if it has none."""
    found = [block for block in sequence_blocks(model) if not sequence_blocks(block)]
    return found or [model]


def made_compiled(model: nn.Module, asked: Asked, key: str = KEY) -> CompiledBlocks | None:
    """Return the blocks of ``model`` compiled as ``asked``; ValueError for unknown arguments."""
    if asked is None or asked is False:
        return None
    options = asked if isinstance(asked, Mapping) else {}
    try:
        return CompiledBlocks(model, options)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{key} is {dict(options)}: torch says {error}") from error
