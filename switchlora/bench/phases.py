"""Compare both phases of a run that switched: ``switchlora-bench phases RUN``.

RUN may be a folder of runs: its newest run that switched is taken. Updates of the full and of the
adapter phase take turns in one process, so that other load on the machine slows both alike. On a
CPU the seconds are processor seconds. Bytes are those that the run itself measured after an update
of each phase. Options:

- ``--out FOLDER`` also writes speed.json and speed.md.
- ``--rounds N`` sets how many updates each phase makes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from switchlora.bench.lowrank import milliseconds, publish, ratios
from switchlora.bench.systems import step_of, timed
from switchlora.errors import check_range
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import Record, find_records, output_folder, warn

FULL, ADAPTER = PHASES = ("full", "adapter")
MIB = 2**20
PARTS = {
    "parameters": "weights, MiB",
    "gradients": "gradients, MiB",
    "optimizer_state": "optimizer state, MiB",
    "activations": "activations, MiB",
    "total": "in all, MiB",
}
"""rows of the table by the memory part that they show"""


def main() -> None:
    """Measure and print the table. Exit with one line on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=output_folder)
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="your class that a run names"
    )
    options = parser.parse_args()
    try:
        check_range("--rounds", options.rounds, 1)
        record = newest_switched(find_records([options.run], warn))
        found = measure(record, options.rounds, options.allow)
    except USER_ERRORS as error:
        sys.exit(f"switchlora-bench phases: {one_line(error)}")
    if options.out is None:
        print(page(found), end="")
    else:
        publish(found, page(found), options.out)


def newest_switched(records: Sequence[Record]) -> Record:
    """Return the newest finished run with updates in both phases; ValueError if there is none."""
    found = []
    for record in records:
        if record.finished and all(_phase(record, name).get("num_updates") for name in PHASES):
            found.append(record)
    if not found:
        raise ValueError("no finished run among them has a full and an adapter phase")
    return max(found, key=lambda record: (record.folder / "summary.json").stat().st_mtime)


def measure(record: Record, rounds: int, allow: Sequence[str] = ()) -> dict[str, Any]:
    """Time ``rounds`` updates of each phase; return the seconds, the bytes and the environment."""
    makers = {name: partial(step_of, record, allow=allow, anew=name == FULL) for name in PHASES}
    return {
        "run": str(record.folder),
        **timed(makers, rounds),
        "bytes": {name: bytes_of(record, name) for name in PHASES},
        "trained": {name: _phase(record, name)["trainable_parameters"] for name in PHASES},
    }


def bytes_of(record: Record, phase: str) -> dict[str, int]:
    """Return what the run held after an update of a phase, by part; nothing if it is not known."""
    memory = _phase(record, phase).get("memory") or {}
    return dict(memory.get("measured") or {})


def page(found: Mapping[str, Any]) -> str:
    """Return the table as Markdown: a row for each number, a column for each phase."""
    where, seconds = found["environment"], found["seconds"]
    gain = ratios(seconds[FULL], seconds[ADAPTER])
    lines = [
        "| | full phase | adapter phase | |",
        "|---|---|---|---|",
        f"| update, ms | {milliseconds(seconds[FULL])} | {milliseconds(seconds[ADAPTER])} "
        f"| {gain} times as fast |",
        _row("trained parameters", found["trained"], "{:,.0f}"),
    ]
    for part, title in PARTS.items():
        held = {name: found["bytes"][name].get(part) for name in PHASES}
        if None not in held.values():
            lines.append(_row(title, {name: size / MIB for name, size in held.items()}, "{:.2f}"))
    lines += [
        "",
        f"{found['run']}: medians of {found['rounds']} rounds in which the phases take turns, "
        f"quartiles in brackets; {found['clock']} seconds, {where['threads']} thread(s). "
        f"{where['device']}; commit `{where['git']}`.",
    ]
    return "\n".join(lines) + "\n"


def _phase(record: Record, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = record.result["phases"].get(name, {})
    return found


def _row(title: str, numbers: Mapping[str, float], form: str) -> str:
    full, adapter = numbers[FULL], numbers[ADAPTER]
    share = f"{adapter / full:.2f} of it" if full else ""
    return f"| {title} | {form.format(full)} | {form.format(adapter)} | {share} |"
