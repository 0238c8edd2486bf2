"""Time an update in the last phase of finished runs, side by side in one process.

Usage: ``switchlora-bench systems RUN... --out FOLDER``. A RUN may be a sweep.

The run with the lowest seed stands for its method. Each run is loaded from its last checkpoint.
Then the methods make updates in turn, so that other load on the machine slows all of them alike.
On a CPU the seconds are processor seconds. One run must have method=full; the others are compared
with it. The results are written to speed.json and speed.md.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from switchlora.bench.lowrank import milliseconds, publish, ratios
from switchlora.config import check_saved
from switchlora.cost import interleaved_seconds, work_clock_of
from switchlora.errors import check_range
from switchlora.process import USER_ERRORS, one_line
from switchlora.run import prepare
from switchlora.storage import (
    Record,
    check_alike,
    environment,
    find_records,
    output_folder,
    warn,
)

BASELINE = "full"
MakeStep = Callable[[Path], Callable[[], object]]
BUILT = ("data", "model", "switch", "full", "adapter")
"""sections of a configuration from which a run is built"""
QUIET = {
    "trunk": {"dir": None},
    "checkpoint": {"keep": 0},
    "log": {"progress": False, "wandb": {"mode": "disabled"}},
}


def main() -> None:
    """Measure, write both files and print the table. Exit with one line on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=output_folder, required=True)
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="your class that a run names"
    )
    options = parser.parse_args()
    try:
        check_range("--rounds", options.rounds, 1)
        record = measure(
            one_of_each(find_records(options.runs, warn)), options.rounds, options.allow
        )
    except USER_ERRORS as error:
        sys.exit(f"switchlora-bench systems: {one_line(error)}")
    publish(record, page(record), options.out)


def one_of_each(records: Sequence[Record]) -> dict[str, Record]:
    """Return each method's finished run with the lowest seed, full training first.

    Raise ValueError without a run of full training, or when runs differ in data, model or epochs.
    """
    finished = [record for record in records if record.finished and record.config["method"]]
    found: dict[str, Record] = {}
    for record in sorted(finished, key=_baseline_first):
        found.setdefault(record.config["method"], record)
    if BASELINE not in found:
        raise ValueError(
            "no finished run of method=full is among them: there is nothing to compare with"
        )
    check_alike(list(found.values()), ("data", "model", "epochs"), "runs of one experiment")
    return found


def _baseline_first(record: Record) -> tuple[bool, int]:
    return record.config["method"] != BASELINE, record.config["seed"]


def measure(
    records: Mapping[str, Record], rounds: int, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Time ``rounds`` updates of each method; return the seconds, clock and environment."""
    makers = {method: partial(step_of, record, allow=allow) for method, record in records.items()}
    return timed(makers, rounds)


def timed(makers: Mapping[str, MakeStep], rounds: int) -> dict[str, Any]:
    """Time steps in turn, each of which a function makes in a folder of its own.

    Return the seconds by name, with rounds, clock and environment.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock_name, clock = work_clock_of(device)
    steps = {}
    with TemporaryDirectory() as folder:
        for name, make in tqdm(makers.items(), desc="prepare", leave=False):
            steps[name] = make(Path(folder) / name)
        seconds = interleaved_seconds(steps, rounds, clock)
    return {
        "rounds": rounds,
        "clock": clock_name,
        "seconds": seconds,
        "environment": environment(device, 0),
    }


def step_of(
    record: Record, folder: Path, allow: Sequence[str], anew: bool = False
) -> Callable[[], object]:
    """Return a function that makes one update of the run, loaded from its last checkpoint.

    With ``anew`` the run is not loaded: the function makes an update of its first phase. Every
    call uses the first batch of the run's training data.
    """
    for section in BUILT:
        check_saved(record.config[section], f"{record.folder}: {section}", allow)
    resume = None if anew else str(record.folder)
    config = OmegaConf.merge(record.config, QUIET, {"resume": resume})
    assert isinstance(config, DictConfig)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        run = prepare(config, folder)
    inputs, targets = next(iter(run.data.train))
    run.model.train()
    last = run.last_update - 1
    return lambda: run.learner.update(inputs, targets, run.data.loss, last)


def page(record: Mapping[str, Any]) -> str:
    """Return the table as Markdown, with command, commit and hardware below it."""
    where = record["environment"]
    seconds = record["seconds"]
    lines = [
        "| last phase of | update, ms | over full training's |",
        "|---|---|---|",
    ]
    for method, mine in seconds.items():
        share = ratios(mine, seconds[BASELINE])
        lines.append(f"| `{method}` | {milliseconds(mine)} | {share} |")
    lines += [
        "",
        f"Medians of {record['rounds']} rounds in which the methods take turns, quartiles in "
        f"brackets; below 1 is faster; {record['clock']} seconds, {where['threads']} thread(s). "
        f"{where['device']}; commit `{where['git']}`.",
        "",
        f"    {where['command']}",
    ]
    return "\n".join(lines) + "\n"
