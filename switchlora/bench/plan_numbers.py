"""What a plan foretells: seconds and bytes of both phases, hours, energy, when a switch pays."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import hypot
from typing import Any

import torch
from torch import nn

from switchlora.adapters import (
    DEFAULT_TARGETS,
    Rates,
    adapted_modules,
    as_on_a_gpu,
    count_parameters,
    find_targets,
    round_residual,
)
from switchlora.bench.arms import Cell, become
from switchlora.bench.plan_models import Planned, planned
from switchlora.cost import Hardware, Machine, Prediction, Trace, price, trace_batch
from switchlora.errors import check_range
from switchlora.learner import Recipe
from switchlora.policy import RESIDUAL_DTYPES

FEW_BLOCKS = (1, 2)
"""depths that are traced: what the second adds, each further block adds too"""
LARGE_ERROR, SMALL_ERROR, RATIO_ERROR, HOST_RATIO_ERROR = 0.15, 0.30, 0.10, 0.25
"""half of the intervals: of seconds where products are wide, and where not; of the ratio of both
phases where the device sets the pace, and where the host does"""
WIDE = 700
"""mean shortest side of the products of a model with small errors; weighted by their flops"""
CONTEXT_BYTES, COMMUNICATION_BYTES = 1.0 * 2**30, 0.5 * 2**30
"""what CUDA and its libraries hold, and NCCL beside them"""
FRAGMENTS = 1.05
"""how much more an allocator holds than live tensors"""
BUCKET = 25 * 2**20
MESSAGE = 2e-5
"""bytes of a bucket of DDP; seconds until the first of its bytes arrives"""
HIDDEN = 0.9
"""share of the passes behind which an exchange can hide"""
SWITCH, COMPILING = 60.0, 60.0
"""seconds of the switch, of a compilation; the switch of ViT-L took 27 s on a CPU"""
IMAGES_PER_CORE = 150
"""JPEG images of ImageNet that a core decodes and augments in a second"""


@dataclass(frozen=True)
class Request:
    """What a plan is for."""

    model: str
    hardware: str
    options: dict[str, Any]
    gpus: int = 1
    batch: int = 128
    accumulation: int = 1
    epochs: int = 300
    switch_epoch: int = 120
    rank: int = 16
    precision: str = "bf16"
    compiled: bool = True
    graphs: bool = False
    """whether compiled code is launched as CUDA graphs"""
    parallel: str = "ddp"
    train_factors: tuple[str, ...] = ("B",)
    residual_dtype: str | None = None
    checkpointing: str | None = None
    size: int = 1_281_167
    validation: int = 50_000
    context: int | None = None
    network: float | None = None
    host: float | None = None
    fused_attention: bool = True

    @property
    def share(self) -> int:
        """Examples of an update on one device."""
        return self.batch // self.gpus


@dataclass(frozen=True)
class Phase:
    """An update of one phase on one device."""

    name: str
    trained: int
    device: float
    """seconds of the device, without the exchange that nothing hides"""
    host: float
    """seconds of the host"""
    exchange: float
    """seconds in which devices only exchange"""
    memory: float
    """bytes on a device at the peak"""
    states: float
    """bytes of weights, gradients and moments on a device"""
    all_states: float
    """bytes of weights, gradients and moments of the whole model"""
    largest: int
    """largest number of examples of a micro-batch that fits a device"""
    error: float
    """half of the interval of ``seconds``, as a share"""

    @property
    def seconds(self) -> float:
        """Seconds of an update."""
        return hypot(self.device, self.host) + self.exchange

    @property
    def waits_for_host(self) -> bool:
        """Whether the host takes longer than the device."""
        return self.host > self.device


@dataclass(frozen=True)
class Plan:
    """Both phases of a run, and what follows from them."""

    request: Request
    hardware: Hardware
    machine: Machine
    measured: bool
    """whether ``machine`` was measured, not taken from ``hardware``"""
    parameters: int
    unit: str
    example_bytes: int
    full: Phase
    adapter: Phase

    @property
    def speedup(self) -> float:
        """Speed of the adapter phase, full training = 1."""
        return self.full.seconds / self.adapter.seconds

    @property
    def speedup_error(self) -> float:
        """Half of the interval of ``speedup``, as a share."""
        waits = self.full.waits_for_host or self.adapter.waits_for_host
        return HOST_RATIO_ERROR if waits else RATIO_ERROR

    @property
    def updates(self) -> int:
        """Updates of an epoch."""
        return max(1, self.request.size // self.request.batch)

    def epoch(self, phase: Phase) -> float:
        """Return the seconds of an epoch with its evaluation, a third of as many updates."""
        evaluation = self.request.validation / self.request.batch / 3
        return (self.updates + evaluation) * phase.seconds

    @property
    def full_hours(self) -> float:
        """Hours of a run without a switch."""
        return self.request.epochs * self.epoch(self.full) / 3600

    @property
    def switched_hours(self) -> float:
        """Hours of the run with its switch."""
        before = self.request.switch_epoch * self.epoch(self.full)
        after = (self.request.epochs - self.request.switch_epoch) * self.epoch(self.adapter)
        return (before + after + self.switch_seconds) / 3600

    @property
    def switch_seconds(self) -> float:
        """Seconds of the switch itself."""
        return SWITCH + (COMPILING if self.request.compiled else 0.0)

    @property
    def break_even(self) -> int | None:
        """Last epoch at which a switch still saves time; None: at none."""
        saved = self.epoch(self.full) - self.epoch(self.adapter)
        if saved <= 0:
            return None
        needed = self.switch_seconds / saved
        last = int(self.request.epochs - needed)
        return last if last > 0 else None

    def kilowatt_hours(self, hours: float) -> float:
        """Return the energy of all devices at the power of their boards."""
        return hours * self.request.gpus * self.hardware.watts / 1000

    def rate(self, phase: Phase) -> float:
        """Return the examples a second of all devices together."""
        return self.request.batch / phase.seconds

    @property
    def capacity(self) -> float:
        """Bytes of a device that tensors can have."""
        return capacity_of(self.hardware, self.request)


def make_plan(request: Request, hardware: Hardware, machine: Machine | None = None) -> Plan:
    """Trace both phases and price them; ``machine`` has measured rates instead of the device's."""
    found = planned(request.model, request.options, request.context)
    check_rank(found.model, request.rank)
    measured = machine is not None
    machine = machine or machine_of(request, hardware)
    if request.network is not None:
        hardware = replace(hardware, network=request.network)
    arm = "adapter" if "A" in request.train_factors else "adapter-B"
    phase = partial(phase_of, found, request, hardware, machine)
    with products_of(machine, request.compiled):
        full, adapter = phase("full"), phase(arm)
    return Plan(
        request=request,
        hardware=hardware,
        machine=machine,
        measured=measured,
        parameters=count_parameters(found.model),
        unit=found.example.unit,
        example_bytes=found.example.bytes,
        full=full,
        adapter=adapter,
    )


def machine_of(request: Request, hardware: Hardware) -> Machine:
    """Return the rates of ``hardware`` for what is asked of it."""
    return hardware.machine(request.precision, request.compiled, request.host, request.graphs)


def products_of(machine: Machine, compiled: bool) -> AbstractContextManager:
    """Return the context in which products with adapters are made as on ``machine``."""
    if not machine.host:  # a CPU
        return nullcontext()
    rates = Rates(machine.product_rate, machine.bandwidth, machine.latency)
    return as_on_a_gpu(rates, compiled)


def check_rank(model: nn.Module, rank: int) -> None:
    """Raise ValueError for a rank above the shortest side of a target's weight."""
    targets = find_targets(model, DEFAULT_TARGETS)
    sides = [min(target.weight(model).shape) for target in targets.values()]
    check_range("rank", rank, 1, min(sides))


def phase_of(
    found: Planned, request: Request, hardware: Hardware, machine: Machine, arm: str
) -> Phase:
    """Return what an update of the arm ``arm`` takes and holds."""
    few = traces_of(found, request, arm)
    priced = whole_of(found.depth, [price(trace, machine, request.compiled) for trace in few])
    sizes = sizes_of(found.depth, few)
    states = held_states(sizes, found.depth, request)
    kept = held_beside(found.depth, few)
    passes = priced["forward"] + priced["backward"]
    return Phase(
        name=arm,
        trained=round(sizes["gradients"] / 4),
        device=passes + priced["optimizer"],
        host=priced["host"],
        exchange=exposed(sizes, passes, request, hardware),
        memory=FRAGMENTS * (states + kept),
        states=states,
        all_states=sizes["parameters"] + sizes["gradients"] + sizes["optimizer_state"],
        largest=largest_batch(found, request, arm, kept, free_bytes(hardware, request, states)),
        error=LARGE_ERROR if mean_width(few[-1]) >= WIDE else SMALL_ERROR,
    )


def traces_of(found: Planned, request: Request, arm: str) -> list[Trace]:
    """Trace the model with one and with two of its equal blocks, or the whole one twice."""
    if found.stack is None:
        return [traced(found, request, arm, 1)] * 2
    return [traced(found, request, arm, blocks) for blocks in FEW_BLOCKS]


def whole_of(depth: int, priced: list[Prediction]) -> dict[str, float]:
    """Return the seconds of the whole model by part, the host's among them."""
    found = {}
    for part in ("forward", "backward", "optimizer", "host"):
        one, two = (getattr(each, part) for each in priced)
        found[part] = extrapolated(depth, one, two)
    return found


def sizes_of(depth: int, few: list[Trace]) -> dict[str, float]:
    """Return the bytes of the whole model by part of the memory."""
    one, two = (trace.memory for trace in few)
    return {part: extrapolated(depth, one[part], two[part]) for part in one}


def traced(found: Planned, request: Request, arm: str, blocks: int) -> Trace:
    """Trace an update of one device, on a model of ``blocks`` blocks."""
    model = found.with_blocks(blocks)
    if not request.fused_attention:
        unfuse_attention(model)
    if arm != "full":
        become(arm, model, Cell(request.model, "bf16", request.rank, request.batch))
        cast_residual(model, request.residual_dtype)
    recipe = Recipe(
        optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True),
        scheduler=lambda *_, **__: None,  # type: ignore[arg-type,return-value]
        precision=request.precision,
        accumulation=request.accumulation,
        activation_checkpointing=request.checkpointing,
    )
    if request.checkpointing == "blocks":
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    example = found.example
    inputs, labels = example.inputs(request.share), example.labels(request.share)
    return trace_batch(model, recipe, inputs, labels, example.loss)


def unfuse_attention(model: nn.Module) -> None:
    """Let timm's attention make its whole matrix, as all did before torch 2."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


def cast_residual(model: nn.Module, dtype: str | None) -> None:
    """Give frozen weights of targets the ``dtype`` of ``switch.residual_dtype``."""
    if dtype is None:
        return
    for linear in adapted_modules(model).values():
        round_residual(linear, RESIDUAL_DTYPES[dtype])


def extrapolated(depth: int, one: float, two: float) -> float:
    """Return the value at ``depth`` equal blocks from those of one and of two.

    >>> extrapolated(12, 10.0, 13.0)
    43.0
    """
    return one + (depth - 1) * (two - one)


def held_beside(depth: int, few: list[Trace]) -> float:
    """Return the bytes that live at the peak beside weights and moments."""
    beside = []
    for trace in few:
        stays = trace.memory["parameters"] + trace.memory["optimizer_state"]
        beside.append(trace.peak_bytes - stays)
    return extrapolated(depth, *beside)


def held_states(sizes: Mapping[str, float], depth: int, request: Request) -> float:
    """Return the bytes of weights, moments and buckets of gradients that a device always holds.

    One device has its gradients only when activations are gone. FSDP keeps a share of all, and two
    gathered blocks in half precision.
    """
    states = sizes["parameters"] + sizes["optimizer_state"]
    if request.gpus == 1:
        return states
    states += sizes["gradients"]
    if request.parallel == "fsdp":
        return states / request.gpus + sizes["parameters"] / depth
    return states


def free_bytes(hardware: Hardware, request: Request, states: float) -> float:
    """Return the bytes of a device that activations can have."""
    return capacity_of(hardware, request) / FRAGMENTS - states


def capacity_of(hardware: Hardware, request: Request) -> float:
    """Return the bytes of a device that tensors can have."""
    beside = CONTEXT_BYTES + (COMMUNICATION_BYTES if request.gpus > 1 else 0.0)
    return hardware.memory - beside


def largest_batch(found: Planned, request: Request, arm: str, kept: float, free: float) -> int:
    """Return the most examples of a micro-batch whose activations fit; 0 if not one does.

    ``kept`` are the bytes of the request's own batch. The line through it and a batch that would
    fit if bytes were in proportion to examples gives the answer.
    """
    if free <= 0:
        return 0
    micro = request.share // request.accumulation
    guess = max(1, int(micro * free / kept))
    if guess == micro:
        guess += 1
    other = replace(request, batch=guess * request.accumulation * request.gpus)
    held = held_beside(found.depth, traces_of(found, other, arm))
    slope = (held - kept) / (guess - micro)
    return max(0, int(micro + (free - kept) / slope))


def exposed(
    sizes: Mapping[str, float], passes: float, request: Request, hardware: Hardware
) -> float:
    """Return the seconds of exchange that the passes do not hide.

    DDP averages the gradients in a ring, 2 (n - 1) / n of their bytes, behind the backward pass,
    which is two thirds of the passes; its last bucket follows it. FSDP gathers all weights twice
    in half precision and scatters the gradients, behind both passes.
    """
    n = request.gpus
    if n == 1:
        return 0.0
    around = (n - 1) / n / hardware.ring(n)
    trained = sizes["gradients"]
    if request.parallel == "fsdp":
        moved = (sizes["parameters"] + trained / 2) * around
        return max(MESSAGE, moved - HIDDEN * passes)
    moved = 2 * trained * around
    last = 2 * min(trained, BUCKET) * around + MESSAGE
    return max(last, moved - HIDDEN * passes * 2 / 3)


def mean_width(trace: Trace) -> float:
    """Return the mean of the shortest sides of products, weighted by their flops."""
    products = [operation for operation in trace.operations if operation.width]
    flops = sum(operation.flops for operation in products)
    return sum(operation.flops * operation.width for operation in products) / max(1, flops)
