"""Put a version into production: ``switchlora-runs promote REGISTRY [VERSION|ALIAS]``."""

import argparse
import sys
from pathlib import Path

from switchlora.analysis.versions.artifact import move_production
from switchlora.analysis.versions.options import add_change_options, check_force
from switchlora.process import USER_ERRORS, one_line
from switchlora.registry import (
    CANDIDATE,
    PRODUCTION,
    check,
    existing,
    promote,
    read_about,
    resolve,
)


def main() -> None:
    """Promote what the command line names. Exit with one line on a mistake in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("registry", type=Path, metavar="REGISTRY")
    parser.add_argument(
        "version", nargs="?", default=CANDIDATE, metavar="VERSION", help="or an alias"
    )
    add_change_options(parser, "promote")
    options = parser.parse_args()
    try:
        print(promoted(options.registry, options.version, options.force, options.why))
        if options.wandb:
            print(move_production(options.registry))
    except USER_ERRORS as error:
        sys.exit(f"promote: {one_line(error)}")


def promoted(
    registry: Path, word: str = CANDIDATE, force: str | None = None, why: str | None = None
) -> str:
    """Put a version into production, and return a line on it.

    ValueError for one that is damaged, or against which there is an objection that no reason
    overrules (``force``).
    """
    version = resolve(existing(registry), word)
    check(registry / version)
    objection = read_about(registry / version).get("objection")
    check_force(force)
    if objection is not None and force is None:
        raise ValueError(f"{version} {objection}; --force REASON promotes it, the reason is kept")
    if not promote(registry, version, force or why, objection):
        return f"{version} is in {PRODUCTION} already"
    return f"{version} is in {PRODUCTION}"
