"""Record where the numbers of a run come from: hardware, versions, git state."""

import hashlib
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object

from switchlora.process import distributed
from switchlora.storage.export import ADAPTER_CONFIG

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
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "world_size": distributed.world_size(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": dict(versions()),
        "git": git_state(),
        "command": command(),
        "seed": seed,
    }


def machine_line(device: torch.device) -> str:
    """Return one line on processor, kernels, threads and versions.

    It helps to understand a failure on a machine that one cannot see.
    """
    kernels = f"{torch.backends.cpu.get_cpu_capability()} kernels"
    hardware = [device_name(device), kernels]
    for key in KERNEL_LIMITS:
        if key in os.environ:
            hardware.append(f"{key}={os.environ[key]}")
    hardware.append(f"{torch.get_num_threads()} thread(s)")
    software = [f"Python {platform.python_version()}"]
    for name, found in versions().items():
        if found:
            software.append(f"{name} {found}")
    return f"{', '.join(hardware)} | {', '.join(software)}"


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or number and model of the processors."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@cache
def versions() -> Mapping[str, str | None]:
    """Return the version of each of ``PACKAGES``; None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def command() -> str:
    """Return the command line of this process."""
    program, *words = sys.argv
    if Path(program).name == "__main__.py":
        program = f"python -m {Path(program).parent.name}"
    return " ".join([program, *words])


def machine(device: torch.device) -> dict[str, object]:
    """Return what can change the last bits of a run: hardware, kernels, threads, versions."""
    found: dict[str, object] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }
    for name, installed in versions().items():
        found[f"versions.{name}"] = installed
    return found


def code_digest(keys: Mapping[str, Any]) -> str:
    """Return a digest of the files that a configuration runs or reads.

    ``keys`` are dotted keys of the configuration with their values. The files are:

    - the code of this package,
    - the source files of the ``_target_`` values,
    - files that are values themselves, such as ``model.checkpoint_path``, and those of a folder
      that is one and holds an adapter.
    """
    files = set(Path(__file__).parents[1].rglob("*.py"))
    for key, value in keys.items():
        is_target = key.split(".")[-1] == "_target_"
        files.update(_source_of(value) if is_target else _files_of(value))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _source_of(target: Any) -> list[Path]:
    try:
        return [Path(inspect.getfile(get_object(str(target))))]
    except TypeError:  # it is built in
        return []


def _files_of(value: Any) -> list[Path]:
    if not isinstance(value, str):
        return []
    if (Path(value) / ADAPTER_CONFIG).is_file():
        return [path for path in Path(value).iterdir() if path.is_file()]
    return [Path(value)] if Path(value).is_file() else []


def git_state() -> str | None:
    """Return the commit of the source tree, or None outside git; '-dirty' marks changed files.

    A wheel knows the commit that it was built from, whatever git says where it is installed.
    """
    built = Path(__file__).parents[1] / "COMMIT"
    if built.is_file():
        return built.read_text().strip() or None
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def cpu_name() -> str:
    """Return number and model of the processors, as '2 x <model name>'."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    if not models:
        return platform.processor()
    return f"{len(models)} x {models[0]}"
