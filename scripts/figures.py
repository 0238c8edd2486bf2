"""Draw the pictures of finished, or running, runs again: ``python scripts/figures.py RUN...``."""

import sys
from pathlib import Path

from switchlora.figures import draw_figures


def main() -> None:
    """Draw into each run's ``figures`` folder and name the files."""
    if not sys.argv[1:]:
        sys.exit("usage: python scripts/figures.py RUN...")
    for folder in map(Path, sys.argv[1:]):
        if not (folder / "metrics.jsonl").is_file():
            sys.exit(f"{folder} holds no metrics.jsonl: give the folder of a run")
        for path in draw_figures(folder):
            print(path)


if __name__ == "__main__":
    main()
