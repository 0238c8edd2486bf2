"""Tune every system on the same budget, then run it with the rate it chose: ``make systems``.

1. Full training runs with each rate of ``FULL``. Every other system starts from the best of them.
   The ``PROJECTED`` ones train in full with an optimizer of their own, and with each rate of it.
2. Every other system runs with each rate of ``FACTORS``. Those of this project are not tuned.
3. Every system runs with its best rate, and shortened full training beside them.

The best rate has the best validation top1. The seed that chooses it is not reported. Finished jobs
are not run again: start the command again after an interruption. Words that are given, such as
``epochs=2``, are set in all runs.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from switchlora.analysis.tables.columns import val_top1
from switchlora.analysis.tables.rows import settings_of
from switchlora.storage import Record, find_records

HERE = Path(__file__).resolve().parents[1]
RUNS = Path("runs/systems")
TUNING, REPORTED = RUNS / "tuning", RUNS / "sweep"
LR, FACTOR_LR = "full.optimizer.lr", "adapter.factor_lr"
FULL = ("5e-4", "1e-3", "2e-3", "4e-3")
FACTORS = ("matched", "1", "3", "10")
PROJECTED = ("galore", "fira", "apollo", "apollo_mini")
OF_PROJECTED = ("2.5e-3", "5e-3", "1e-2", "2e-2")
"""rates around that of their authors"""
OWN = ("update_norm", "staged", "guarded")
TUNING_SEED = 100
SEEDS = "0,1,2"
FAILED = 1
"""exit status of a sweep in which a job failed"""
LENGTHS = "0.6,0.7,0.8,0.9"
Tried = dict[str, float]
"""val top1 in % by the value of a key"""


def main() -> None:
    """Tune, report, and write what was chosen among what."""
    words = sys.argv[1:]
    methods = methods_of(HERE / "experiments" / "systems.yaml")
    of_full = tune(["full"], LR, FULL, words)["full"]
    lr = f"{LR}={best(of_full)}"
    of_projected = tune(PROJECTED, LR, OF_PROJECTED, words)
    others = [name for name in methods if name not in ("full", *OWN, *PROJECTED)]
    of_others = tune(others, FACTOR_LR, FACTORS, [lr, *words])
    report(["full", *OWN], [lr, *words])
    report(["full_short"], [lr, f"length={LENGTHS}", *words])
    for value in OF_PROJECTED:
        chosen = [name for name in PROJECTED if best(of_projected[name]) == value]
        if chosen:
            report(chosen, [f"{LR}={value}", *words])
    for value in FACTORS:
        chosen = [name for name in others if best(of_others[name]) == value]
        if chosen:
            report(chosen, [lr, f"{FACTOR_LR}={value}", *words])
    write_notes({LR: {"full": of_full, **of_projected}, FACTOR_LR: of_others}, RUNS)


def methods_of(experiment: Path) -> list[str]:
    """Return the methods that an experiment sweeps over."""
    params = OmegaConf.load(experiment).hydra.sweeper.params
    return [name.strip() for name in params["+method"].split(",")]


def tune(
    methods: Sequence[str], key: str, values: Sequence[str], words: Sequence[str]
) -> dict[str, Tried]:
    """Run each method with each value of ``key``, and return what each of them reached."""
    swept = f"{key}={','.join(values)}"
    names = f"+method={','.join(methods)}"
    sweep(TUNING, [names, swept, f"seed={TUNING_SEED}", *words], may_fail=True)
    records = [record for record in find_records([TUNING]) if record.finished]
    return {name: tried(records, name, key, values) for name in methods}


def tried(records: Iterable[Record], method: str, key: str, values: Sequence[str]) -> Tried:
    """Return the val top1 of a method's runs by the value of ``key``. A run that failed has 0."""
    found = dict.fromkeys(values, 0.0)
    for record in records:
        settings = settings_of(record.config)
        top1 = val_top1(record)
        if record.config["method"] != method or top1 is None:
            continue
        for value in values:
            if same_value(settings[key], value):
                found[value] = top1
    return found


def same_value(value: object, word: str) -> bool:
    """Return whether a configuration's value is what ``word`` sets.

    >>> same_value(0.001, "1e-3"), same_value("matched", "1"), same_value(3.0, "3")
    (True, False, True)
    """
    return value == word if isinstance(value, str) or word == "matched" else value == float(word)


def best(results: Tried) -> str:
    """Return the value with the highest top1."""
    return max(results, key=lambda value: results[value])


def report(methods: Sequence[str], words: Sequence[str]) -> None:
    """Run some methods with all seeds that are reported."""
    sweep(REPORTED, [f"+method={','.join(methods)}", f"seed={SEEDS}", *words])


def sweep(folder: Path, words: Sequence[str], may_fail: bool = False) -> None:
    """Run a sweep in ``folder``. Exit when it is interrupted, or when a job fails that may not.

    A job fails when its rate is so high that the loss is not finite.
    """
    program = [sys.executable, "-m", "switchlora", "+experiments=systems"]
    status = subprocess.run([*program, f"hydra.sweep.dir={folder}", *words]).returncode
    if status and not (may_fail and status == FAILED):
        sys.exit(status)


def write_notes(results: dict[str, dict[str, Tried]], folder: Path) -> None:
    """Write all results, and the sentences that stand below the table."""
    (folder / "tuning.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    lines = []
    for key, by_method in results.items():
        told = [f"{name} {best(found)}" for name, found in by_method.items()]
        values = dict.fromkeys(value for found in by_method.values() for value in found)
        lines.append(
            f"{key} was chosen among {', '.join(values)}, by val top1 of seed {TUNING_SEED}: "
            f"{'; '.join(told)}."
        )
    lines.append(f"Not tuned, with the rate of full training: {', '.join(OWN)}.")
    (folder / "tuning.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
