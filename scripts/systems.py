"""Tune every system on the same budget, then run it with the rate it chose: ``make systems``.

``python scripts/systems.py pretrained`` does so for ``experiments/pretrained.yaml``.

1. Full training runs with each rate of ``Budget.full``. Other systems start from the best of them.
   The ``PROJECTED`` ones train in full with an optimizer of their own, and with each rate of it.
2. Every other system runs with each value of ``Budget.key``. Those of this project are not tuned.
3. Every system runs with its best rate, and shortened full training beside them: ``LEADERS`` with
   five seeds, the others with three.

The best rate has the best validation top1. The seed that chooses it is not reported. Finished jobs
are not run again: start the command again after an interruption. Words that are given, such as
``epochs=2``, are set in all runs.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from switchlora.analysis.tables.columns import val_top1
from switchlora.analysis.tables.rows import settings_of
from switchlora.storage import Record, find_records

HERE = Path(__file__).resolve().parents[1]
LR, FACTOR_LR = "full.optimizer.lr", "adapter.factor_lr"
PROJECTED = ("galore", "fira", "apollo", "apollo_mini")
OF_PROJECTED = ("2.5e-3", "5e-3", "1e-2", "2e-2")
"""rates around that of their authors"""
OWN = ("update_norm", "staged", "guarded")
LEADERS = (
    *("full", "full_short", "update_norm", "cola", "pufferfish", "low_rank_32", "low_rank_63"),
    *("fira", "apollo", "oialr"),
)
"""the best at the same cost, and at the same memory of the optimizer, by three seeds"""
TUNING_SEED = 100
SEEDS = "0,1,2"
MORE_SEEDS = "3,4"
FAILED = 1
"""exit status of a sweep in which a job failed"""
Tried = dict[str, float]
"""val top1 in % by the value of a key"""


@dataclass(frozen=True)
class Budget:
    """What is tried in an experiment: as many rates for each system."""

    full: Sequence[str]
    """learning rates of full training"""
    key: str
    """the rate of an adapter"""
    adapters: Sequence[str]
    """values of ``key``"""
    lengths: str
    """shares of its updates that full training is shortened to"""
    leaders: Sequence[str] = ()
    """methods that run with ``MORE_SEEDS`` too"""


BUDGETS = {
    "systems": Budget(
        full=("5e-4", "1e-3", "2e-3", "4e-3"),
        key=FACTOR_LR,
        adapters=("matched", "1", "3", "10"),
        lengths="0.6,0.7,0.8,0.9",
        leaders=LEADERS,
    ),
    "pretrained": Budget(
        full=("1e-5", "3e-5", "1e-4", "3e-4"),
        key="adapter.optimizer.lr",
        adapters=("1e-4", "3e-4", "1e-3", "3e-3"),
        lengths="0.7",
    ),
}


def main() -> None:
    """Tune, report, and write what was chosen among what."""
    words = sys.argv[1:]
    experiment = words.pop(0) if words and words[0] in BUDGETS else "systems"
    budget = BUDGETS[experiment]
    study = Study(experiment, words)
    methods = methods_of(HERE / "experiments" / f"{experiment}.yaml")
    own = [name for name in methods if name in OWN]
    projected = [name for name in methods if name in PROJECTED]
    others = [name for name in methods if name not in ("full", *OWN, *PROJECTED)]
    of_full = study.tune(["full"], LR, budget.full)["full"]
    lr = f"{LR}={best(of_full)}"
    of_projected = study.tune(projected, LR, OF_PROJECTED)
    of_others = study.tune(others, budget.key, budget.adapters, lr)
    study.report(["full", *own], lr)
    study.report(["full_short"], lr, f"length={budget.lengths}")
    study.report_best(of_projected, LR)
    study.report_best(of_others, budget.key, lr)
    write_notes({LR: {"full": of_full, **of_projected}, budget.key: of_others}, own, study.folder)


@dataclass(frozen=True)
class Study:
    """The runs of an experiment; ``words`` are set in all of them."""

    experiment: str
    words: Sequence[str]

    @property
    def folder(self) -> Path:
        """Where the runs lie, and what is written of them."""
        return Path("runs") / self.experiment

    def tune(
        self, methods: Sequence[str], key: str, values: Sequence[str], *words: str
    ) -> dict[str, Tried]:
        """Run each method with each value of ``key``, and return what each of them reached."""
        if not methods:
            return {}
        swept = [f"+method={','.join(methods)}", f"{key}={','.join(values)}", *words]
        self.sweep("tuning", [*swept, f"seed={TUNING_SEED}"], may_fail=True)
        found = find_records([self.folder / "tuning"])
        records = [record for record in found if record.finished]
        return {name: tried(records, name, key, values) for name in methods}

    def report_best(self, found: dict[str, Tried], key: str, *words: str) -> None:
        """Run methods with all seeds that are reported, each with its best value of ``key``."""
        chosen: dict[str, list[str]] = {}
        for name, results in found.items():
            chosen.setdefault(best(results), []).append(name)
        for value, names in chosen.items():
            self.report(names, f"{key}={value}", *words)

    def report(self, methods: Sequence[str], *words: str) -> None:
        """Run some methods with all seeds that are reported."""
        self.sweep("sweep", [f"+method={','.join(methods)}", f"seed={SEEDS}", *words])
        leaders = [name for name in methods if name in BUDGETS[self.experiment].leaders]
        if leaders:
            self.sweep("sweep", [f"+method={','.join(leaders)}", f"seed={MORE_SEEDS}", *words])

    def sweep(self, folder: str, words: Sequence[str], may_fail: bool = False) -> None:
        """Run a sweep in ``folder``. Exit if it is interrupted, or if a job fails that may not.

        A job fails when its rate is so high that the loss is not finite.
        """
        program = [sys.executable, "-m", "switchlora", f"+experiments={self.experiment}"]
        place = f"hydra.sweep.dir={self.folder / folder}"
        status = subprocess.run([*program, place, *words, *self.words]).returncode
        if status and not (may_fail and status == FAILED):
            sys.exit(status)


def methods_of(experiment: Path) -> list[str]:
    """Return the methods that an experiment sweeps over."""
    params = OmegaConf.load(experiment).hydra.sweeper.params
    return [name.strip() for name in params["+method"].split(",")]


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


def write_notes(results: dict[str, dict[str, Tried]], own: Sequence[str], folder: Path) -> None:
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
    if own:
        lines.append(f"Not tuned, with the rate of full training: {', '.join(own)}.")
    (folder / "tuning.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
