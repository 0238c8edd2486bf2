"""Run the test suite where it must not matter: other kernels, threads, order, load, user.

    python scripts/test_hard.py [--times 5] [--only avx2 random+busy] [--out build/test-hard]

Each condition is a run of the whole suite. The last lines name the tests that passed in some runs
and not in others, with the conditions; the exit status is 1 if any test failed. What pytest said,
and its report in JUnit's format, is kept in a file for each run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

Outcomes = dict[str, str]
"""'passed', 'failed' or 'skipped' for each test"""
ROOT = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
QUIET = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
TWO_PROCESSES = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
OTHER_USER = ["unshare", "--user", "--map-user=65534", "--map-group=65534", "--"]
"""Become 'nobody' in a user namespace, with no right beyond those of the files' owner."""


@dataclass(frozen=True)
class Condition:
    """What is different from ``make test``."""

    environment: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    busy: bool = False
    other_user: bool = False


CONDITIONS = {
    "default": Condition(),
    "plain": Condition({"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": Condition({"ATEN_CPU_CAPABILITY": "avx2"}),
    "limits": Condition({"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}),
    "threads": Condition({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}, words=("-n", "1")),
    "random": Condition(words=("-p", "randomly")),
    "busy": Condition(busy=True),
    "user": Condition(other_user=True),
}


def combined(name: str) -> Condition:
    """Return the condition of a name. Several names joined by '+' are all of them at once."""
    environment: dict[str, str] = {}
    words: list[str] = []
    busy = False
    other_user = False
    for part in name.split("+"):
        condition = CONDITIONS[part]
        environment |= condition.environment
        words += condition.words
        busy = busy or condition.busy
        other_user = other_user or condition.other_user
    return Condition(environment, tuple(words), busy, other_user)


@contextmanager
def both_cores_busy():
    """Keep as many processes spinning as there are cores."""
    while_parent_lives = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    command = [sys.executable, "-c", while_parent_lives]
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            spinner = stack.enter_context(subprocess.Popen(command))
            stack.callback(spinner.kill)
        yield


def run(condition: Condition, report: Path, words: list[str]) -> float:
    """Run the suite once, write ``report`` and a log beside it, and return the seconds it took."""
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="home-"))
        environment = {**os.environ, **ONE_THREAD, **QUIET, **condition.environment}
        command = [sys.executable, "-m", "pytest", *TWO_PROCESSES]
        command += [*condition.words, *words]
        command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
        if condition.other_user:
            environment |= {"HOME": home, "XDG_CACHE_HOME": f"{home}/cache", "USER": "nobody"}
            command = OTHER_USER + command
        if condition.busy:
            stack.enter_context(both_cores_busy())
        log = stack.enter_context(report.with_suffix(".log").open("w"))
        start = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
        return time.monotonic() - start


def outcomes(report: Path) -> Outcomes:
    """Map each test of a report to 'passed', 'failed' or 'skipped'; empty without a report."""
    found: Outcomes = {}
    if not report.exists():
        return found
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.get('classname')}::{case.get('name')}"
        found[test] = outcome(case)
    return found


def outcome(case: ElementTree.Element) -> str:
    """Return 'passed', 'failed' or 'skipped' for one test of a report."""
    kinds = {child.tag for child in case}
    if "failure" in kinds or "error" in kinds:
        return "failed"
    return "skipped" if "skipped" in kinds else "passed"


def run_line(found: Outcomes, seconds: float) -> str:
    """Return one line on a run."""
    counts = Counter(found.values())
    passed = f"{counts['passed']} passed, {counts['failed']} failed"
    return f"{passed}, {counts['skipped']} skipped in {seconds:.0f} s"


def failures(runs: dict[str, Outcomes]) -> list[str]:
    """Return lines on the tests that failed: in which runs, and of how many."""
    failed = defaultdict(list)
    for name, found in runs.items():
        for test, result in found.items():
            if result == "failed":
                failed[test].append(name)
    lines = []
    for test, where in sorted(failed.items()):
        names = ", ".join(where)
        lines.append(f"{test}: failed in {len(where)} of {len(runs)} runs ({names})")
    return lines


def parse(words: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line. What it does not know goes to pytest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1, help="runs of each condition")
    parser.add_argument("--only", nargs="+", default=list(CONDITIONS), metavar="CONDITION")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "test-hard")
    given, rest = parser.parse_known_args(words)
    for part in "+".join(given.only).split("+"):
        if part not in CONDITIONS:
            parser.error(f"no condition '{part}': choose from {', '.join(CONDITIONS)}")
    return given, rest


def main() -> None:
    """Run every condition, print a line on each run, and at the end the tests that failed."""
    given, words = parse()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    for time_number in range(1, given.times + 1):
        for name in given.only:
            report = (given.out / f"{name}.{time_number}.xml").resolve()
            report.unlink(missing_ok=True)
            seconds = run(combined(name), report, words)
            found = outcomes(report)
            runs[f"{name}.{time_number}"] = found
            print(f"{name}, time {time_number}: {run_line(found, seconds)}", flush=True)
    lines = failures(runs)
    for name, found in runs.items():
        if not found:
            lines.append(f"{name}: no report; see {given.out / name}.log")
    print("\n".join(lines or ["no test failed in any run"]))
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
