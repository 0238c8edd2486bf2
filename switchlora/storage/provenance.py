"""Record where the numbers of a run come from: hardware, versions, git state."""

import hashlib
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object

from switchlora.process import distributed

PACKAGES = ("switchlora", "torch", "torchvision", "timm", "hydra-core", "wandb", "scipy", "numpy")
KERNEL_LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""environment variables that choose among the kernels of torch, oneDNN and MKL"""


def environment(device: torch.device, seed: int) -> dict[str, object]:
    """Return hardware, versions, git state, command and seed of this process, as plain values."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "world_size": distributed.world_size(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": git_state(),
        "command": command(),
        "seed": seed,
    }


def machine_line(device: torch.device) -> str:
    """Return one line on processor, kernels, threads and versions.

    It helps to understand a failure on a machine that one cannot see.
    """
    where = environment(device, seed=0)
    versions: Any = where["versions"]
    shown = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    kernels = torch.backends.cpu.get_cpu_capability()
    limits = "".join(f", {key}={os.environ[key]}" for key in KERNEL_LIMITS if key in os.environ)
    return (
        f"{where['device']}, {kernels} kernels{limits}, {where['threads']} thread(s) | "
        f"Python {where['python']}, {shown}"
    )


def command() -> str:
    """Return the command line of this process."""
    program, *words = sys.argv
    if Path(program).name == "__main__.py":
        program = f"python -m {Path(program).parent.name}"
    return " ".join([program, *words])


def machine(device: torch.device) -> dict[str, object]:
    """Return what can change the last bits of a run: hardware, kernels, threads, versions."""
    where = environment(device, seed=0)
    versions = {f"versions.{name}": found for name, found in where["versions"].items()}  # type: ignore[attr-defined]
    return {
        **{key: where[key] for key in ("device", "threads", "python")},
        "kernels": torch.backends.cpu.get_cpu_capability(),
        **versions,
    }


def code_digest(keys: Mapping[str, Any]) -> str:
    """Return a digest of the files that a configuration runs or reads.

    ``keys`` are dotted keys of the configuration with their values. The files are:

    - the code of this package,
    - the source files of the ``_target_`` values,
    - files that are values themselves, such as ``model.checkpoint_path``.
    """
    named = {Path(value) for value in keys.values() if isinstance(value, str)}
    targets = {str(value) for key, value in keys.items() if key.split(".")[-1] == "_target_"}
    files = {*Path(__file__).parents[1].rglob("*.py"), *filter(None, map(_source_of, targets))}
    files |= {path for path in named if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _source_of(target: str) -> Path | None:
    try:
        return Path(inspect.getfile(get_object(target)))
    except TypeError:  # it is built in
        return None


def git_state() -> str | None:
    """Return the commit of the source tree, or None outside git; '-dirty' marks changed files."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return number and model of the processors, as '2 x <model name>'."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
