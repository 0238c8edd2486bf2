"""Who published, promoted and rolled back what, and why: ``switchlora-runs log REGISTRY``."""

import argparse
import sys
from pathlib import Path

from switchlora.analysis.formats import markdown
from switchlora.process import USER_ERRORS, one_line
from switchlora.registry import aliases, entries, existing

HEADER = ["when", "who", "what", "version", "why", "against"]


def main() -> None:
    """Print the log of a registry. Exit with one line on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("registry", type=Path, metavar="REGISTRY")
    options = parser.parse_args()
    try:
        print(told(options.registry))
    except USER_ERRORS as error:
        sys.exit(f"log: {one_line(error)}")


def told(registry: Path) -> str:
    """Return the log as a table, the oldest entry first, and what the aliases stand for now."""
    log = entries(existing(registry))
    rows = [HEADER]
    for entry in log:
        what = f"{entry.what} as {entry.alias}" if entry.alias else entry.what
        rows.append(
            [entry.when, entry.who, what, entry.version, entry.why or "", entry.against or ""]
        )
    now = [f"{alias}: {version}" for alias, version in aliases(log).items()]
    return f"{markdown(rows)}\n\n{', '.join(now)}"
