"""Check versions against their checksums: ``switchlora-runs verify REGISTRY [VERSION]``."""

import argparse
import sys
from pathlib import Path

from switchlora.process import USER_ERRORS, one_line
from switchlora.registry import VersionDamaged, check, entries, existing, resolve, versions


def main() -> None:
    """Verify a version, or all. Exit with a line for each that is damaged."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("registry", type=Path, metavar="REGISTRY")
    parser.add_argument("version", nargs="?", metavar="VERSION", help="or an alias; default: all")
    options = parser.parse_args()
    try:
        damaged = verified(options.registry, options.version)
    except USER_ERRORS as error:
        sys.exit(f"verify: {one_line(error)}")
    if damaged:
        sys.exit("\n".join(f"verify: {line}" for line in damaged))


def verified(registry: Path, word: str | None = None) -> list[str]:
    """Print a line for each version that is whole, and return one for each that is not.

    ValueError for a registry without versions, or whose log is damaged.
    """
    entries(existing(registry))
    damaged = []
    for version in [resolve(registry, word)] if word else versions(registry):
        try:
            print(f"{version}: whole, {check(registry / version)} files")
        except VersionDamaged as error:
            damaged.append(str(error))
    return damaged
