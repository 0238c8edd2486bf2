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
from collections.abc import Callable, Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from switchlora.cost import (
    forward_and_backward,
    interleaved_seconds,
    linear_and_factors,
    work_clock_of,
)
from switchlora.errors import check_range, check_share
from switchlora.learner import autocast
from switchlora.storage import environment, output_folder

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
    publish(record, page(record), options.out)


def parse() -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[384, 768, 1536], metavar="D")
    add("--ratios", type=float, nargs="+", default=[0.625, 0.3125], help="of the parameters")
    add("--tokens", type=int, default=788, help="default: 4 images of 197")
    add("--precision", default="fp32", choices=["fp32", "bf16"])
    add("--rounds", type=int, default=9)
    add("--out", type=output_folder, default=Path("runs/lowrank_speed"))
    return parser.parse_args()


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time all layers; return the seconds, the settings, the clock and the environment."""
    torch.manual_seed(0)
    clock_name, clock = work_clock_of(device)
    layers: list[dict[str, Any]] = []
    for width in options.widths:
        wide = 4 * width
        layers.append({"width": width, "layer": "fc1", "in": width, "out": wide})
        layers.append({"width": width, "layer": "fc2", "in": wide, "out": width})
    for layer in tqdm(layers):
        layer["arms"] = _timed(layer, options, device, clock)
    return {
        "tokens": options.tokens,
        "precision": options.precision,
        "rounds": options.rounds,
        "clock": clock_name,
        "layers": layers,
        "environment": environment(device, 0),
    }


def _timed(
    layer: Mapping[str, Any],
    options: argparse.Namespace,
    device: torch.device,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Time the arms of one layer; return each arm's parameter share, rank and seconds by pass."""
    inputs, outputs = layer["in"], layer["out"]
    x = torch.randn(options.tokens, inputs, device=device)
    steps: dict[str, Callable[[], object]] = {}
    ranks = _ranks(layer, options.ratios)
    for ratio, rank in ranks.items():
        dense, factors = linear_and_factors(inputs, outputs, rank or 1, device=device)
        module = dense if rank is None else factors
        steps[f"forward {ratio}"] = _forward(module, x, options.precision)
        steps[f"forward and backward {ratio}"] = forward_and_backward(module, x, options.precision)
    seconds = interleaved_seconds(steps, options.rounds, clock)
    arms = []
    for ratio, rank in ranks.items():
        by_pass = {part: seconds[f"{part} {ratio}"] for part in PASSES}
        arms.append({"ratio": ratio, "rank": rank, **by_pass})
    return arms


def _ranks(layer: Mapping[str, Any], ratios: Sequence[float]) -> dict[float, int | None]:
    """Return, by share of the parameters, the rank that keeps it; None for the dense layer."""
    inputs, outputs = layer["in"], layer["out"]
    full = inputs * outputs / (inputs + outputs)
    ranks: dict[float, int | None] = {DENSE: None}
    for ratio in ratios:
        if ratio < DENSE:
            ranks[ratio] = max(1, round(ratio * full))
    return ranks


def _forward(module: nn.Module, x: Tensor, precision: str) -> Callable[[], object]:
    def step() -> Tensor:
        with torch.no_grad(), autocast(x.device.type, precision):
            return module(x)

    return step


def publish(record: Mapping[str, Any], text: str, folder: Path) -> None:
    """Write the record and the text as ``speed.json`` and ``speed.md``, and print the text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "speed.md").write_text(text)
    print(text, end="")


def page(record: Mapping[str, Any]) -> str:
    """Return the table as Markdown, with command, commit and hardware below it."""
    where = record["environment"]
    lines = [
        "| width | layer | parameters | rank | forward, ms | times faster | forward and backward, "
        "ms | times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layer in record["layers"]:
        for arm in layer["arms"]:
            lines.append(_row(layer, arm))
    lines += [
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
    share = f"{100 * arm['ratio']:.4g} %"
    cells = [layer["width"], layer["layer"], share, arm["rank"] or "dense"]
    for part in PASSES:
        cells.append(milliseconds(arm[part]))
        cells.append("" if arm is dense else ratios(dense[part], arm[part]))
    return f"| {' | '.join(map(str, cells))} |"


def milliseconds(seconds: Sequence[float]) -> str:
    """Return median and quartiles of ``seconds`` in milliseconds."""
    return spread([1000 * each for each in seconds], digits=1)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """Return median and quartiles of the ratios of two lists with one entry per round."""
    return spread(list(map(truediv, numerators, denominators)), digits=2)


def spread(values: Sequence[float], digits: int) -> str:
    """Return median and quartiles as text, such as '1.52 (1.49-1.55)'."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
