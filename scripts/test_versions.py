"""Run the test suite with the oldest packages that pyproject.toml admits, or with the newest.

    python scripts/test_versions.py {oldest,newest} [-k guard]

The packages go into an environment of their own, ``.venv-oldest`` or ``.venv-newest``, with the
tools of development. In the oldest, each package that ``pyproject.toml`` names has exactly its
lower bound, and what those packages need in turn is free; in the newest, everything is the newest
release. The lines before the tests are the versions there and here; what the script does not know
goes to pytest, whose exit status is the script's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_hard import ONE_THREAD, QUIET, ROOT, TWO_PROCESSES

NEWEST = ["--upgrade", "--upgrade-strategy", "eager"]
DEVELOPMENT = f"{ROOT}[dev]"


def requirements() -> list[Requirement]:
    """Return what the program and its development need, as ``pyproject.toml`` says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    return [Requirement(line) for line in lines]


def lower_bound(requirement: Requirement) -> str:
    """Return the oldest version that a requirement admits."""
    for specifier in requirement.specifier:
        if specifier.operator == ">=":
            return specifier.version
    raise ValueError(f"pyproject.toml: {requirement} has no lower bound")


def lower_bounds() -> list[str]:
    """Return pip's constraints that hold each requirement to exactly its lower bound."""
    return [f"{found.name}=={lower_bound(found)}" for found in requirements()]


def install(which: str, python: Path) -> None:
    """Make the environment if there is none, and bring its packages to their versions."""
    if not python.exists():
        venv.create(python.parents[1], with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", "--editable", DEVELOPMENT]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(lower_bounds()))
        command += ["--constraint", constraints] if which == "oldest" else NEWEST
        if subprocess.run(command).returncode:
            sys.exit(f"pip cannot install the {which} packages; the lines above say why")


def versions(python: Path | str) -> dict[str, str]:
    """Map the name of each installed package to its version."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.check_output(command))
    return {canonicalize_name(package["name"]): package["version"] for package in listed}


def version_lines(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """Return a line for each package that is required, and for each other that differs."""
    named = {canonicalize_name(found.name) for found in requirements()}
    lines = []
    for name in sorted(named | set(there)):
        ours, theirs = here.get(name, "-"), there.get(name, "-")
        if name in named or ours != theirs:
            lines.append(f"{name:32} {theirs:16} here {ours}")
    return lines


def run_tests(python: Path, words: list[str]) -> int:
    """Run the suite, and return pytest's exit status."""
    command = [python, "-m", "pytest", *TWO_PROCESSES, *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **ONE_THREAD, **QUIET}).returncode


def main() -> None:
    """Install, print the versions, and run the tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=["oldest", "newest"])
    given, words = parser.parse_known_args()
    python = ROOT / f".venv-{given.which}" / "bin" / "python"
    install(given.which, python)
    print("\n".join(version_lines(versions(python), versions(sys.executable))), flush=True)
    sys.exit(run_tests(python, words))


if __name__ == "__main__":
    main()
