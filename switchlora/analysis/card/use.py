"""What a model costs in use: latency, a compiled and an exported form, sizes on the disk."""

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as in_safetensors
from torch import Tensor, nn

from switchlora.adapters import adapted_modules, merge
from switchlora.analysis.card.sources import Say, Source
from switchlora.models import eval_mode, read_file
from switchlora.storage import ADAPTER, cpu_name, load_adapter

SIZES = (1, 32)
"""batches that are timed"""
WARM_UP, REPEATS, SECONDS = 3, 50, 3.0
"""calls before, calls at most, and seconds that they may take, of each model and batch"""
FEWEST = 5
TOLERANCE = 1e-3
"""largest difference of logits, as a share of the largest logit, that counts as the same"""
NO_ONNX = "not measured: pip install 'switchlora[onnx]'"
Found = dict[str, Any]
Call = Callable[[Tensor], Tensor]


@torch.no_grad()
def measure_use(source: Source, timed: bool, say: Say) -> Found:
    """Return sizes on the disk and, unless not ``timed``, latencies and other forms."""
    merged, unmerged = both_forms(source)
    found: Found = {
        "bytes": sizes(source),
        "parameters": sum(p.numel() for p in merged.parameters()),
    }
    if not timed:
        return {**found, "latency": {"left_out": "left out: --no-cost"}}
    inputs = example(source)
    with eval_mode(merged):
        say("cost: latency, torch.compile, ONNX")
        compiled, compile_line = compiled_form(merged, inputs)
        forms = {"merged": merged, "unmerged adapter": unmerged, "compiled": compiled}
        found["latency"] = latencies({k: v for k, v in forms.items() if v is not None}, inputs)
        found["device"] = device_name(source.device)
        found["threads"] = torch.get_num_threads()
        found["compile"] = compile_line
        if unmerged is not None:
            found["unmerged"] = compared(unmerged(inputs), merged(inputs))
        found["onnx"] = onnx_form(merged, inputs)
    return found


@torch.no_grad()
def both_forms(source: Source) -> tuple[nn.Module, nn.Module | None]:
    """Return the model with its adapter merged, and not merged; None where it has none."""
    model = source.model
    if adapted_modules(model):
        merged = copy.deepcopy(model)
        merge(merged)
        return merged, model.eval()
    folder = adapter_folder(source)
    if folder is None:
        return model, None
    unmerged = load_adapter(copy.deepcopy(model).cpu(), folder)
    return model, unmerged.to(source.device).eval()


def adapter_folder(source: Source) -> Path | None:
    """Return the folder of the adapter of the same run, if there is one."""
    place = source.opened.saved.source
    for folder in (place, place.parent / "adapter"):
        if (folder / ADAPTER).is_file():
            return folder
    return None


def sizes(source: Source) -> Found:
    """Return the bytes of the weights on the disk; of the adapter also those in bf16."""
    place = source.opened.saved.source
    found: Found = {"weights": size_of(place)}
    folder = adapter_folder(source)
    if folder is not None:
        found["adapter"] = size_of(folder / ADAPTER)
        tensors = read_file(folder / ADAPTER)
        halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        found["adapter_bf16"] = len(in_safetensors(halves))
    return found


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def example(source: Source) -> Tensor:
    """Return as many inputs as the largest batch that is timed, on the device."""
    view: Any = source.opened.loader.dataset
    rows = torch.arange(max(SIZES)) % len(view)
    inputs, _ = view[rows, None][:2]
    return inputs.to(source.device)


@torch.no_grad()
def latencies(forms: Mapping[str, Call], inputs: Tensor) -> list[Found]:
    """Return the p50 and p95 of the milliseconds that each form takes, for each batch.

    The forms take turns, so that a slower minute of the machine hits all of them.
    """
    found = []
    for size in SIZES:
        batch = inputs[:size]
        times: dict[str, list[float]] = {name: [] for name in forms}
        for call in forms.values():
            for _ in range(WARM_UP):
                milliseconds(call, batch)
        end = time.monotonic() + SECONDS * len(forms)
        for number in range(REPEATS):
            if number >= FEWEST and time.monotonic() > end:
                break
            for name, call in forms.items():
                times[name].append(milliseconds(call, batch))
        for name, taken in times.items():
            p50, p95 = np.percentile(taken, [50, 95]).tolist()
            found.append(
                {"form": name, "batch": size, "p50_ms": p50, "p95_ms": p95, "calls": len(taken)}
            )
    return found


def milliseconds(call: Call, batch: Tensor) -> float:
    """Return how long one call takes, until its result is there."""
    wait(batch)
    start = time.perf_counter()
    call(batch)
    wait(batch)
    return 1000 * (time.perf_counter() - start)


def wait(batch: Tensor) -> None:
    """Wait until a GPU has done what it was given."""
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)


@torch.no_grad()
def compiled_form(model: nn.Module, inputs: Tensor) -> tuple[Call | None, str]:
    """Return the model compiled by ``torch.compile``, and a line on it; None where it fails."""
    start = time.monotonic()
    try:
        with quiet():
            compiled = torch.compile(copy.deepcopy(model))
            for size in SIZES:
                found = compiled(inputs[:size])
    except Exception as error:  # no compiler, or whatever it does not know
        return None, f"not measured: torch.compile failed ({first_line(error)})"
    result = compared(found, model(inputs))
    told = f"compiled in {time.monotonic() - start:.0f} s, {result['sentence']}"
    return compiled, told


@torch.no_grad()
def onnx_form(model: nn.Module, inputs: Tensor) -> Found:
    """Return whether ONNX Runtime computes the model's logits from its export, and its size."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        return {"left_out": NO_ONNX}
    on_cpu = copy.deepcopy(model).cpu().eval()
    batch = inputs[:2].cpu()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            with quiet():
                torch.onnx.export(on_cpu, (batch,), path, dynamo=True, external_data=False)
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                (name,) = (each.name for each in session.get_inputs())
                (logits,) = session.run(None, {name: batch.numpy()})
        except Exception as error:  # whatever the exporter does not know
            return {"left_out": f"not measured: the export failed ({first_line(error)})"}
        size = path.stat().st_size
    return {**compared(torch.from_numpy(logits), on_cpu(batch)), "bytes": size}


def compared(found: Tensor, expected: Tensor) -> Found:
    """Return how far logits are from those of the merged model, and whether they are the same."""
    distance = float((found.float() - expected.float()).abs().max())
    largest = float(expected.float().abs().max())
    same = distance <= TOLERANCE * max(largest, 1e-6) and math.isfinite(distance)
    words = "the same logits" if same else "other logits"
    return {
        "same": same,
        "largest_difference": distance,
        "sentence": f"{words} as the model (largest difference {distance:.1e})",
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters and compilers print, log and warn of."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def first_line(error: Exception) -> str:
    """Return the first line that an error says, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
