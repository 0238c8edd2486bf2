"""Take the adapter off: ``switchlora-runs takeoff RUN --output FOLDER``.

RUN is a run folder or a version of a registry. FOLDER gets the model of just before the switch,
bit for bit, as timm and ``switchlora-runs eval`` load it.
"""

import argparse
import shutil
import sys
from pathlib import Path

from switchlora.process import USER_ERRORS, one_line
from switchlora.registry import check, is_version
from switchlora.storage import CONFIG, is_regular, read_before, save_tensors

BESIDE = (CONFIG, "config.json")


def main() -> None:
    """Write what the command line names. Exit with one line on a mistake in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a version")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="a new folder for the model"
    )
    options = parser.parse_args()
    try:
        print(taken_off(options.run, options.output))
    except USER_ERRORS as error:
        sys.exit(f"takeoff: {one_line(error)}")


def taken_off(run: Path, output: Path) -> str:
    """Write the model of just before the switch into a new folder, and return a line on it.

    ValueError for a run without it, and for a folder that holds anything.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} is there already: give a new folder")
    if is_version(run):
        check(run.resolve())
    before = read_before(run)
    output.mkdir(parents=True, exist_ok=True)
    for name in BESIDE:
        if is_regular(run / name):
            shutil.copyfile(run / name, output / name)
    save_tensors(before.weights, output / "model.safetensors")
    return f"{output} has the model after update {before.num_updates}, just before the switch"
