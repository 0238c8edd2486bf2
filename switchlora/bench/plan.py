"""Foretell time and memory of both phases for a model and a device by name, without owning either.

Example: ``switchlora-bench plan model=vit_large_patch16_224 hardware=a100-80gb gpus=8
data.batch_size=1024 epochs=300 switch.epoch=120 rank=64``.

An update is traced on tensors without content, with one and with two blocks, and priced with the
rates of the device. ``hardware=here`` measures the machine at hand. Options:

- ``--json`` prints numbers instead of a table.
- ``--calibrate`` measures the rates of the machine at hand, and takes all else from ``hardware``.
- ``--cases`` predicts updates that were measured elsewhere, and shows how far off it is.
"""

import json
import sys
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import Any

import torch

from switchlora.bench.memory import proc_bytes
from switchlora.bench.plan_models import planned
from switchlora.bench.plan_numbers import (
    Request,
    exposed,
    machine_of,
    make_plan,
    products_of,
    sizes_of,
    traces_of,
    whole_of,
)
from switchlora.bench.plan_page import cases_table, page, plain
from switchlora.config import read_yaml
from switchlora.cost import (
    Hardware,
    Machine,
    all_hardware,
    hardware_named,
    measure_machine,
    price,
)
from switchlora.errors import check_range
from switchlora.learner import AUTO, CUDA_GRAPHS, graphs_go
from switchlora.names import near
from switchlora.policy import RESIDUAL_DTYPES
from switchlora.process import USER_ERRORS, one_line

CASES = Path(__file__).with_name("plan_cases.yaml")
FLAGS = ("--json", "--calibrate", "--cases", "--help")
HERE = "here"
WITHOUT_GRAPHS = ("mi300x",)
"""devices on which nobody tried CUDA graphs"""
SIZES = {
    "imagenet": (1_281_167, 50_000),
    "cifar10": (45_000, 5_000),
    "fashion_mnist": (54_000, 6_000),
}
"""images of the training and of the validation split"""
Parser = Callable[[str], Any]


def main() -> None:
    """Print the plan that the command line asks for. Exit with one line on a mistake in it."""
    words = sys.argv[1:]
    if "--help" in words or not words:
        print(usage())
        return
    try:
        print(answer(words))
    except USER_ERRORS as error:
        sys.exit(f"switchlora-bench plan: {one_line(error)}")


def answer(words: Sequence[str]) -> str:
    """Return what the words ask for: a table, JSON, or the published cases."""
    flags = {word for word in words if word.startswith("-")}
    for flag in flags:
        if flag not in FLAGS:
            raise ValueError(f"no option '{flag}'; {near(flag, FLAGS)}")
    if "--cases" in flags:
        return cases_table(priced_cases(read_cases()))
    request = request_of([word for word in words if word not in flags])
    hardware, machine = hardware_of(request, "--calibrate" in flags)
    plan = make_plan(request, hardware, machine)
    return json.dumps(plain(plan), indent=1) if "--json" in flags else page(plan)


def hardware_of(request: Request, calibrate: bool) -> tuple[Hardware, Machine | None]:
    """Return the device of a request, and its measured rates if they are to be measured."""
    if request.hardware != HERE:
        known = [*all_hardware(), HERE]
        if request.hardware not in known:
            raise ValueError(
                f"hardware '{request.hardware}' is not known; {near(request.hardware, known)}"
            )
        named = hardware_named(request.hardware)
        return named, measured(request) if calibrate else None
    if request.gpus > 1:
        raise ValueError("hardware=here measures one device: gpus=1, or name a device")
    machine = measured(request)
    return device_here(machine, request.precision), machine


def measured(request: Request) -> Machine:
    """Measure the machine at hand, which takes about a second."""
    machine = measure_machine(_device(), request.precision)
    if request.host is not None:
        machine = replace(machine, host=request.host)
    return machine.compiled(request.graphs) if request.compiled else machine


def device_here(machine: Machine, precision: str) -> Hardware:
    """Describe the device at hand; how devices are connected and what they draw is not known."""
    device = _device()
    return Hardware(
        name=HERE,
        peak={precision: machine.product_rate},
        reached=1.0,
        bandwidth=machine.bandwidth,
        memory=free_memory(device),
        watts=0.0,
        link=1.0,
        node=1,
        network=1.0,
        source="measured",
    )


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free: of the GPU, or of the main memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(proc_bytes("/proc/meminfo", "MemAvailable"))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def request_of(words: Sequence[str]) -> Request:
    """Return the request of words KEY=VALUE; ValueError for an unknown key or a wrong value."""
    fields: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"'{word}' is no KEY=VALUE, such as model=vit_base_patch16_224")
        if key.startswith("model."):
            options[key.removeprefix("model.")] = _plain_value(value)
        elif key in KEYS:
            field, parse, _ = KEYS[key]
            fields[field] = parse_value(key, value, parse)
        else:
            raise ValueError(f"no key '{key}'; {near(key, KEYS)}")
    for key in ("model", "hardware"):
        if key not in fields:
            raise ValueError(f"{key} has no value: give {KEYS[key][2]}")
    return checked(Request(options=options, **settled(fields, options)))


def settled(fields: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request with what follows from others."""
    if "data" in fields:
        sizes = SIZES[fields.pop("data")]
        fields.setdefault("size", sizes[0])
        fields["validation"] = sizes[1]
    if "image_size" in fields:
        options["img_size"] = fields.pop("image_size")
    compiling = fields.pop("compile", AUTO)
    if compiling == AUTO:
        compiling = compiled_by_default(fields)
    fields["compiled"], fields["graphs"] = compiling != "false", compiling == CUDA_GRAPHS
    epochs = fields.get("epochs", Request.epochs)
    fields.setdefault("switch_epoch", max(1, int(0.4 * epochs)))
    return fields


def compiled_by_default(fields: Mapping[str, Any]) -> str:
    """Return what a run with ``full.compile=auto`` does: see ``chosen_compiler``."""
    if fields["hardware"] == HERE and _device().type == "cpu":
        return "false"
    asked = fields.get("gpus", 1), fields.get("checkpointing"), fields.get("accumulation", 1)
    tried = fields["hardware"] not in WITHOUT_GRAPHS
    return CUDA_GRAPHS if tried and graphs_go(*asked) else "true"


def checked(request: Request) -> Request:
    """Return ``request``; ValueError for numbers that make no run."""
    for key, value in {
        "gpus": request.gpus,
        "data.batch_size": request.batch,
        "full.accumulation": request.accumulation,
        "epochs": request.epochs,
        "rank": request.rank,
        "data.size": request.size,
    }.items():
        check_range(key, value, 1)
    check_range("switch.epoch", request.switch_epoch, 0, request.epochs)
    parts = request.gpus * request.accumulation
    if request.batch % parts:
        raise ValueError(
            f"data.batch_size={request.batch} does not split into {request.accumulation} "
            f"micro-batches on each of {request.gpus} devices: give a multiple of {parts}"
        )
    return request


def parse_value(key: str, value: str, parse: Parser) -> Any:
    """Return a value of ``key``; ValueError that names the key."""
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{key}={value}: {error}") from error


def _number(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError("give a whole number") from None


def _positive(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError("give a number") from None
    if not 0 < number < float("inf"):
        raise ValueError("give a number above 0")
    return number


def _gigabytes(value: str) -> float:
    return 1e9 * _positive(value)


def _microseconds(value: str) -> float:
    return 1e-6 * _positive(value)


def _choice(*choices: str) -> Parser:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return value

    return parse


def _factors(value: str) -> tuple[str, ...]:
    found = _choice("[B]", "[A,B]")(value)
    return tuple(found.strip("[]").split(","))


def _plain_value(value: str) -> Any:
    try:
        return literal_eval(value)
    except (ValueError, SyntaxError):
        return value


KEYS: Mapping[str, tuple[str, Parser, str]] = {
    "model": ("model", str, "a timm name, gpt3-6.7b and its like, small, digits or bytes"),
    "hardware": ("hardware", str, f"{', '.join(all_hardware())}, or here"),
    "gpus": ("gpus", _number, "devices together"),
    "data.batch_size": ("batch", _number, "examples of an update, over all devices"),
    "full.accumulation": ("accumulation", _number, "micro-batches of an update"),
    "epochs": ("epochs", _number, "of the whole run"),
    "switch.epoch": ("switch_epoch", _number, "epochs before the switch; 0.4 of them"),
    "rank": ("rank", _number, "of all adapters"),
    "full.precision": ("precision", _choice("bf16", "fp32"), "bf16 or fp32 (TF32 on a GPU)"),
    "full.compile": (
        *("compile", _choice(AUTO, "true", "false", CUDA_GRAPHS)),
        "auto, true, false or graphs: torch.compile, launched as CUDA graphs",
    ),
    "full.activation_checkpointing": ("checkpointing", _choice("blocks"), "blocks"),
    "system.parallel": ("parallel", _choice("ddp", "fsdp"), "ddp or fsdp"),
    "switch.train_factors": ("train_factors", _factors, "[A,B] or [B]"),
    "switch.residual_dtype": (
        *("residual_dtype", _choice(*RESIDUAL_DTYPES)),
        f"{', '.join(RESIDUAL_DTYPES)}: of frozen weights",
    ),
    "data": ("data", _choice(*SIZES), f"{', '.join(SIZES)}: examples of an epoch"),
    "data.size": ("size", _number, "examples of an epoch, instead of data"),
    "data.image_size": ("image_size", _number, "pixels; the model's by default"),
    "data.context": ("context", _number, "tokens of a sequence"),
    "network": ("network", _gigabytes, "GB/s from a machine to the next"),
    "host": ("host", _microseconds, "microseconds of the host for an operation; measure: here"),
}
"""keys of the command line: the field of a request, how its value is read, what it is"""


def usage() -> str:
    """Return how the command is called, with a line for each key."""
    head = [*str(__doc__).strip().splitlines(), "", "keys:"]
    lines = [f"  {key:<30}{what}" for key, (_, _, what) in KEYS.items()]
    return "\n".join([*head, *lines, f"  {'model.KEY':<30}an option of the model, such as depth"])


def read_cases() -> list[dict[str, Any]]:
    """Return the updates that others or this project measured."""
    found: list[dict[str, Any]] = read_yaml(CASES)
    return found


def priced_cases(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the cases with the 'measured' and the 'predicted' milliseconds of an update."""
    return [{**case, **milliseconds_of(case)} for case in cases]


def milliseconds_of(case: Mapping[str, Any]) -> dict[str, float]:
    """Return the 'measured' and the 'predicted' milliseconds of an update of a case."""
    gpus = case.get("gpus", 1)
    request = Request(
        model=case["model"],
        hardware=case["hardware"],
        options={},
        gpus=gpus,
        batch=case["batch"] * gpus,
        compiled=case.get("compiled", True),
        graphs=case.get("graphs", False),
        fused_attention=case.get("attention") != "unfused",
    )
    predicted = seconds_of_arm(request, case.get("arm", "full"))
    measured_here = case.get("milliseconds") or 1000 * case["batch"] / case["examples"]
    return {"measured": measured_here, "predicted": 1000 * predicted}


def seconds_of_arm(request: Request, arm: str) -> float:
    """Return the predicted seconds of an update of an arm, without its memory."""
    hardware = hardware_named(request.hardware)
    machine = machine_of(request, hardware)
    found = planned(request.model, request.options, request.context)
    with products_of(machine, request.compiled):
        few = traces_of(found, request, arm)
    prices = [price(trace, machine, request.compiled) for trace in few]
    seconds = whole_of(found.depth, prices)
    passes = seconds["forward"] + seconds["backward"]
    alone = hypot(passes + seconds["optimizer"], seconds["host"])
    return alone + exposed(sizes_of(found.depth, few), passes, request, hardware)


if __name__ == "__main__":
    main()
