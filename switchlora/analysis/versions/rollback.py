"""Put back what was in production before: ``switchlora-runs rollback REGISTRY``."""

import argparse
import sys
from pathlib import Path

from switchlora.analysis.versions.artifact import move_production
from switchlora.analysis.versions.options import add_change_options
from switchlora.process import USER_ERRORS, one_line
from switchlora.registry import PRODUCTION, rollback


def main() -> None:
    """Roll a registry back. Exit with one line on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("registry", type=Path, metavar="REGISTRY")
    add_change_options(parser)
    options = parser.parse_args()
    try:
        print(f"{rollback(options.registry, options.why)} is in {PRODUCTION} again")
        if options.wandb:
            print(move_production(options.registry))
    except USER_ERRORS as error:
        sys.exit(f"rollback: {one_line(error)}")
