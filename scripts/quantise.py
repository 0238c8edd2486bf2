"""What quantising at the switch loses: ``python scripts/quantise.py SWEEP --out FOLDER``.

SWEEP is a folder of runs of ``experiments/quantise.yaml``, with the full phases that they share.

- ``runs.csv`` has a line a run: accuracy, drift at the switch, bytes of the weights.
- ``ways.csv`` compares ways to give the factors what rounding loses, just before the switch of
  each full phase, on 512 images: B alone for the A that there is, as the switch does, once or in
  turns with the rounding, and LoftQ's turns of rounding and SVD (arXiv 2310.08659).
"""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from study import compare, held_out, write_csv
from torch import Tensor, nn

from switchlora.adapters import CODES, Factors, Target, dequantised, quantised
from switchlora.initializers import UpdateSVD, update_directions, zero_b
from switchlora.monitor import truncated_svd
from switchlora.run import prepare
from switchlora.storage import Record, find_all, load
from switchlora.switching.plan import choose_ranks

STARTS = {
    "update_directions": update_directions,
    "update_svd": UpdateSVD(),
    "zero_b": zero_b,
}
WAYS = {"none": ("", 0), "B once": ("B", 1), "B 3 times": ("B", 3)}
WAYS |= {f"LoftQ {times}": ("SVD", times) for times in (1, 2, 3, 4, 5)}
"""what is fitted to the loss, and how often"""
IMAGES = 512


def main() -> None:
    """Write the tables that the command line asks for."""
    compare(__doc__, row_of, write)


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write both tables."""
    sweeps = dict.fromkeys(row.pop("sweep") for row in rows)
    trunks = sorted(path.parent for sweep in sweeps for path in sweep.glob("trunk/*/trunk.json"))
    if not trunks:
        raise ValueError(
            f"{' '.join(map(str, sweeps))} holds no trunk: give the folder of a sweep"
        )
    write_csv(folder / "runs.csv", rows)
    write_csv(folder / "ways.csv", [row for trunk in trunks for row in rows_of(trunk)])


def row_of(record: Record) -> dict[str, Any] | None:
    """Return the facts of a finished run."""
    if not record.finished:
        return None
    summary = record.result
    if not summary["switch"]["fired"]:
        raise ValueError(f"{record.folder} did not switch: give runs that did")
    switch, phases = summary["switch"], summary["phases"]
    held = {name: phase["memory"]["measured"] for name, phase in phases.items()}
    return {
        "sweep": record.folder.parent,
        "seed": record.config["seed"],
        "residual_dtype": record.config["switch"]["residual_dtype"] or "float32",
        "held_out": round(held_out(record), 3),
        "val": summary["val"]["top1"],
        "test": summary["test"]["top1"],
        "switched_at": switch["num_updates"],
        "rounding_drift": switch["rounding_drift"],
        "weights_full": held["full"]["parameters"],
        "weights_adapter": held["adapter"]["parameters"],
        "total_full": held["full"]["total"],
        "total_adapter": held["adapter"]["total"],
        "commit": summary["environment"]["git"],
    }


@torch.no_grad()
def rows_of(trunk: Path) -> Iterator[dict[str, Any]]:
    """Yield the drift of each start, dtype and way at the end of a full phase."""
    path = find_all(trunk)[0]
    config = OmegaConf.create({**load(path)["config"], "resume": str(path)})
    config.trunk.dir = None
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(config, Path(folder))
    model, policy, targets = run.model.eval(), run.policy, run.monitor.targets
    updates = run.monitor.updates(of=model)
    ranks, _ = choose_ranks(model, policy, run.monitor, run.state.history)
    images = torch.cat([inputs for inputs, _ in run.data.val])[:IMAGES]
    before = model(images)
    for start, init in STARTS.items():
        torch.manual_seed(0)
        factors = {n: init(t.weight(model), updates[n], ranks[n]) for n, t in targets.items()}
        for name in CODES:
            for way in WAYS:
                rounded, error = rounded_as(way, model, targets, factors, CODES[name])
                moved = (rounded(images) - before).abs()
                yield {
                    "seed": config.seed,
                    "update": run.state.num_updates,
                    "start": start,
                    "residual_dtype": name,
                    "way": way,
                    "weight_error": f"{error:.5f}",
                    "drift_max": f"{moved.max():.5f}",
                    "drift_mean": f"{moved.mean():.5f}",
                }


def rounded_as(
    way: str,
    model: nn.Module,
    targets: Mapping[str, Target],
    factors: Mapping[str, Factors],
    dtype: torch.dtype,
) -> tuple[nn.Module, float]:
    """Return a copy with the effective weights after a switch, and their relative error."""
    model = copy.deepcopy(model)
    lost, whole = 0.0, 0.0
    for name, target in targets.items():
        weight = target.weight(model).double()
        found = effective(way, weight, factors[name], dtype)
        lost += float((weight - found).square().sum())
        whole += float(weight.square().sum())
        model.get_submodule(target.module).weight.copy_(found)
    return model, (lost / whole) ** 0.5


def effective(way: str, weight: Tensor, factors: Factors, dtype: torch.dtype) -> Tensor:
    """Return Q(W_res) + B A in float64."""
    A, B = factors.A.double(), factors.B.double()
    fitted, times = WAYS[way]
    product = B @ A
    codes = rounded(weight - product, dtype)
    for turn in range(times):
        if turn:
            codes = rounded(weight - product, dtype)
        if fitted == "B":
            product = (weight - codes) @ torch.linalg.pinv(A) @ A
        else:
            U, S, Vh = truncated_svd(weight - codes, len(A))
            product = (U * S) @ Vh
    return codes + product


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the codes of a weight stand for."""
    return dequantised(*quantised(weight, dtype), dtype, weight.shape[1]).double()


if __name__ == "__main__":
    main()
