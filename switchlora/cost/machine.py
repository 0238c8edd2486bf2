"""Measure the speed of a device with short products and element-wise operations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from switchlora.cost.timing import Step, by_name, clock_of, seconds_of, take_turns
from switchlora.cost.trace import Operation, Recorder
from switchlora.learner import PRECISIONS
from switchlora.process import world_size

ROUNDS = 5
MEASURED_SECONDS = 0.8
EAGER_BANDWIDTH, COMPILED_BANDWIDTH = 0.60, 0.80
"""shares of a GPU's bandwidth that element-wise operations reach; eager: fitted to ViT-Ti on an
RTX 3090"""
EAGER_HOST, COMPILED_HOST, COMPILED_TENSOR = 40e-6, 36e-6, 75e-6
"""seconds of the host for an operation, for a kernel of a compiled graph, for a parameter of one;
fitted to full and frozen updates of ViT-S, 64 images, on an H100 (experiments/gpu)"""
LAUNCHED = 0.4
"""share of the host's time for compiled code that is left where it launches CUDA graphs; fitted to
the adapter phase of ViT-B, 128 images, on an H200 (experiments/gpu/third)"""
SHORTEST_KERNEL = 4e-6
"""seconds of a kernel on a GPU that has nothing to do; a smaller one cannot be told from it"""
INNER, NARROW = 768, 64
"""shortest sides of the wide and of the narrow products that are timed"""


@dataclass(frozen=True)
class Machine:
    """The speed of a device in one precision."""

    product_rate: float
    """flop/s of a large product"""
    attention_rate: float
    """flop/s of scaled dot-product attention, forward and backward together"""
    bandwidth: float
    """bytes/s of element-wise operations on activations"""
    all_reduce: float | None = None
    """bytes/s at which a gradient is averaged over the ranks; None for one process"""
    update_bandwidth: float | None = None
    """bytes/s of the optimizer, which finds parameters in the caches; None: ``bandwidth``"""
    latency: float = 0.0
    """seconds of the shortest operation in forward and backward passes"""
    half_width: float = 0.0
    """shortest side (of M, N and K) at which a product has half of ``product_rate``"""
    host: float = 0.0
    """seconds that the host needs to start an operation while the device works; 0 on a CPU"""
    host_tensor: float = 0.0
    """seconds that the host needs for each parameter of a compiled model"""

    def seconds(self, operation: Operation) -> float:
        """Return max(flops / rate, bytes / bandwidth, latency); views take no time.

        An optimizer step takes bytes / update_bandwidth. This bandwidth was measured on whole
        optimizer steps, so it includes all that they cost.
        """
        if operation.part == "optimizer":
            return operation.bytes / (self.update_bandwidth or self.bandwidth)
        shortest = self.latency if operation.bytes else 0.0
        return max(
            operation.flops / self._rate(operation),
            operation.bytes / self.bandwidth,
            shortest,
        )

    def compiled(self, graphs: bool = False) -> "Machine":
        """Return the rates of what torch.compile makes, from those of single operations.

        Fused element-wise operations use more of the bandwidth; kernels start a little faster, and
        the host looks at each parameter once. With CUDA ``graphs`` it starts all kernels of a
        block together.
        """
        host = self.host * (LAUNCHED if graphs else 1) / EAGER_HOST
        return replace(
            self,
            bandwidth=self.bandwidth * COMPILED_BANDWIDTH / EAGER_BANDWIDTH,
            host=host * COMPILED_HOST,
            host_tensor=host * COMPILED_TENSOR,
        )

    def _rate(self, operation: Operation) -> float:
        if "attention" in operation.name:
            return self.attention_rate
        if not operation.width:
            return self.product_rate
        return self.product_rate * operation.width / (operation.width + self.half_width)


@cache
def measure_machine(device: torch.device, precision: str) -> Machine:
    """Time products, attention, element-wise operations and the averaging of gradients.

    It takes about a second. All ranks must call it together. The trials take turns, so other work
    on the machine slows all of them alike. Their medians count. ``bandwidth`` is measured on the
    element-wise operations of a transformer block, forward and backward: layer norm, GELU,
    additions and column sums. On a CPU most of these are slower than a copy. Products are of
    random numbers: a GPU draws less power on ones, and clocks higher. On a GPU the smallest
    operations take the host's time, and narrow products tell how the rate falls.
    """
    dtype = PRECISIONS[precision] or torch.float32
    scale = 1 if device.type == "cpu" else 8  # a large device needs more work to be busy
    trials = {
        "product": _product_trial(device, dtype, scale),
        "narrow": _product_trial(device, dtype, scale, NARROW),
        "attention": _attention_trial(device, dtype, scale),
        "mixed": _mixed_trial(device, dtype, 2048 * scale, 512),
        "update": _update_trial(device),
        "tiny": _mixed_trial(device, dtype, 1, 8),
    }
    counts = {name: _counts(trial, device) for name, trial in trials.items()}
    if device.type == "cpu":  # it does its own work: nothing is started, narrow ones are not slow
        del trials["narrow"]
    seconds = _median_seconds(trials, device)
    shortest = seconds["tiny"] / counts["tiny"].operations
    started = {"latency": shortest}
    if device.type != "cpu":
        started = {"latency": min(shortest, SHORTEST_KERNEL), "host": shortest}
        started["half_width"] = _half_width(counts, seconds)
    return Machine(
        product_rate=counts["product"].flops / seconds["product"],
        attention_rate=counts["attention"].flops / seconds["attention"],
        bandwidth=counts["mixed"].bytes / seconds["mixed"],
        all_reduce=_all_reduce_speed(device),
        update_bandwidth=counts["update"].bytes / seconds["update"],
        **started,
    )


def _half_width(counts: "Mapping[str, _Counts]", seconds: Mapping[str, float]) -> float:
    """Return h of rate = r w / (w + h), from the rates of narrow and of wide products."""
    narrow, wide = (counts[name].flops / seconds[name] for name in ("narrow", "product"))
    lost = wide / narrow - 1
    gained = 1 / NARROW - wide / narrow / INNER
    return max(0.0, lost / gained) if gained > 0 else 0.0


class _Counts(NamedTuple):
    flops: int
    bytes: int
    operations: int


def _counts(trial: Step, device: torch.device) -> _Counts:
    """Count the operations of ``trial`` that move bytes; this call also warms it up."""
    with Recorder(nn.Module(), device) as recorder:
        trial()
    done = [operation for operation in recorder.operations if operation.bytes]
    flops = sum(operation.flops for operation in done)
    moved = sum(operation.bytes for operation in done)
    return _Counts(flops, moved, len(done))


def _median_seconds(trials: Mapping[str, Step], device: torch.device) -> dict[str, float]:
    """Time at least ``ROUNDS`` rounds, and rounds for at least ``MEASURED_SECONDS``."""
    clock = clock_of(device)
    laps = {name: partial(seconds_of, trial, clock) for name, trial in trials.items()}
    rounds = []
    spent = 0.0
    for found in take_turns(laps, warmup=0):
        rounds.append(found)
        spent += sum(found.values())
        if len(rounds) >= ROUNDS and spent >= MEASURED_SECONDS:
            break
    return {name: median(seconds) for name, seconds in by_name(rounds).items()}


def _all_reduce_speed(device: torch.device) -> float | None:
    """Return the bytes/s of averaging one DDP bucket of 25 MiB, or None for one process.

    All ranks make the same number of trials.
    """
    if world_size() == 1:
        return None
    bucket = torch.zeros(25 * 2**18, device=device)
    average = partial(seconds_of, partial(dist.all_reduce, bucket), clock_of(device))
    rounds = islice(take_turns({"average": average}, warmup=1), ROUNDS)
    return bucket.nbytes / median(by_name(rounds)["average"])


def _product_trial(
    device: torch.device, dtype: torch.dtype, scale: int, inner: int = INNER
) -> Step:
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    rows = 1024 * scale
    if device.type == "cpu" and dtype != torch.float32:
        rows = 64  # many processors have no products of halves: the usual size takes them seconds
    left = random(rows, inner).to(dtype)
    right = random(inner, 1536 * scale).to(dtype)
    return lambda: left @ right


def _attention_trial(device: torch.device, dtype: torch.dtype, scale: int) -> Step:
    shape = (8 * scale, 6, 197, 64)
    ones = partial(torch.ones, shape, device=device, dtype=dtype, requires_grad=True)
    q, k, v = ones(), ones(), ones()
    gradient = q.detach()

    def trial() -> object:
        output = F.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(output, [q, k, v], gradient)

    return trial


def _mixed_trial(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> Step:
    x = torch.ones(tokens, width, device=device, requires_grad=True)
    hidden = torch.ones(tokens, 4 * width, device=device, dtype=dtype, requires_grad=True)
    bias = torch.ones(4 * width, device=device, dtype=dtype, requires_grad=True)
    gradients = [x.detach(), hidden.detach()]

    def trial() -> object:
        normed = x + F.layer_norm(x, (width,))
        activated = F.gelu(hidden + bias)
        return torch.autograd.grad([normed, activated], [x, hidden, bias], gradients)

    return trial


def _update_trial(device: torch.device) -> Step:
    weights = [torch.ones(1024, 1024, device=device, requires_grad=True) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return torch.optim.AdamW(weights).step
