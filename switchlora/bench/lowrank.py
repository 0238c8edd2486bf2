"""Time factorised feed-forward layers against their share of the parameters.

Example: ``switchlora-bench lowrank --out experiments/lowrank_speed``.

It times fc1 (d to 4 d) and fc2 (4 d to d) at several widths d. Each layer is timed dense, and as
a product of two factors that keep a share of the parameters. These arms of a layer take turns in
one process. On a CPU the seconds are processor seconds, so that other processes do not count. The
results are written to ``speed.json`` and ``speed.md``.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer as synchronised_clock
from tqdm import tqdm

from switchlora.cost import forward_and_backward, interleaved_seconds, linear_and_factors
from switchlora.errors import check_range, check_share
from switchlora.learner import autocast
from switchlora.storage import environment

PASSES = ("forward", "forward and backward")
DENSE = 1.0


def main() -> None:
    """Measure, write both files and print the table. Exit with one line on a mistake."""
    options = parse()
    try:
        check_range("--rounds", options.rounds, 1)
        check_range("--tokens", options.tokens, 1)
        for ratio in options.ratios:
            check_share("--ratios", ratio)
    except ValueError as error:
        sys.exit(f"switchlora-bench lowrank: {error}")
    record = measure(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "speed.json").write_text(json.dumps(record, indent=1) + "\n")
    text = page(record)
    (options.out / "speed.md").write_text(text)
    print(text, end="")


def parse() -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[384, 768, 1536], metavar="D")
    add("--ratios", type=float, nargs="+", default=[0.625, 0.3125], help="of the parameters")
    add("--tokens", type=int, default=788, help="default: 4 images of 197")
    add("--precision", default="fp32", choices=["fp32", "bf16"])
    add("--rounds", type=int, default=9)
    add("--out", type=Path, default=Path("runs/lowrank_speed"))
    return parser.parse_args()


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time all layers; return the seconds, the settings, the clock and the environment."""
    torch.manual_seed(0)
    shapes = {"fc1": (1, 4), "fc2": (4, 1)}
    layers = [
        {"width": width, "layer": name, "in": width * i, "out": width * o}
        for width in options.widths
        for name, (i, o) in shapes.items()
    ]
    found = [{**layer, "arms": _timed(layer, options, device)} for layer in tqdm(layers)]
    settings = {key: getattr(options, key) for key in ("tokens", "precision", "rounds")}
    clock = "processor" if device.type == "cpu" else "wall"
    return {**settings, "clock": clock, "layers": found, "environment": environment(device, 0)}


def _timed(
    layer: Mapping[str, Any], options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Time the arms of one layer; return each arm's parameter share, rank and seconds by pass."""
    inputs, outputs = layer["in"], layer["out"]
    x = torch.randn(options.tokens, inputs, device=device)
    full = inputs * outputs / (inputs + outputs)
    factorised = [ratio for ratio in options.ratios if ratio < DENSE]
    ranks = {DENSE: None, **{ratio: max(1, round(ratio * full)) for ratio in factorised}}
    steps: dict[str, Callable[[], object]] = {}
    for ratio, rank in ranks.items():
        dense, factors = linear_and_factors(inputs, outputs, rank or 1, device=device)
        module = dense if rank is None else factors
        steps[f"forward {ratio}"] = _forward(module, x, options.precision)
        steps[f"forward and backward {ratio}"] = forward_and_backward(module, x, options.precision)
    clock = time.process_time if device.type == "cpu" else synchronised_clock
    seconds = interleaved_seconds(steps, options.rounds, clock)
    return [
        {"ratio": ratio, "rank": rank, **{part: seconds[f"{part} {ratio}"] for part in PASSES}}
        for ratio, rank in ranks.items()
    ]


def _forward(module: nn.Module, x: Tensor, precision: str) -> Callable[[], object]:
    def step() -> Tensor:
        with torch.no_grad(), autocast(x.device.type, precision):
            return module(x)

    return step


def page(record: Mapping[str, Any]) -> str:
    """Return the table as Markdown, with command, commit and hardware below it."""
    where = record["environment"]
    lines = [
        "| width | layer | parameters | rank | forward, ms | times faster | forward and backward, "
        "ms | times faster |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(layer, arm) for layer in record["layers"] for arm in layer["arms"]),
        "",
        f"Medians of {record['rounds']} rounds in which the arms take turns, quartiles in "
        f"brackets; {record['tokens']} tokens, {record['precision']}, {record['clock']} seconds, "
        f"{where['threads']} thread(s). {where['device']}; commit `{where['git']}`.",
        "",
        f"    {where['command']}",
    ]
    return "\n".join(lines) + "\n"


def _row(layer: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    dense = layer["arms"][0]
    cells = [layer["width"], layer["layer"], f"{100 * arm['ratio']:.4g} %", arm["rank"] or "dense"]
    for part in PASSES:
        cells.append(spread([1000 * s for s in arm[part]], digits=1))
        ratios = [d / s for d, s in zip(dense[part], arm[part], strict=True)]
        cells.append("" if arm is dense else spread(ratios, digits=2))
    return "| " + " | ".join(map(str, cells)) + " |"


def spread(values: Sequence[float], digits: int) -> str:
    """Return median and quartiles as text, such as '1.52 (1.49-1.55)'."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
