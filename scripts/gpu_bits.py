"""Make a run, and the same gone on with from its first checkpoint: do both end with the same bits?

``python scripts/gpu_bits.py FOLDER UPDATES KEY=VALUE ...`` makes FOLDER/whole of that many updates
and FOLDER/resumed. Its status is 1 if their weights differ.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir

import switchlora.cli  # noqa: F401  what yamls refer to
from switchlora.storage import find_all
from switchlora.train import train

CONF = Path(__file__).parents[1] / "conf"
QUIET = ("log=quiet", "log.wandb.mode=disabled", "log.figures=false")


def run(folder: Path, words: Sequence[str]) -> bytes:
    """Return the bytes of the weights at the end of a run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        train(compose("config", [*QUIET, *words]), folder)
    return (folder / "model.safetensors").read_bytes()


def main() -> None:
    """Make both runs and compare them."""
    folder, updates, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    words += [f"max_updates={updates}", f"checkpoint.every_updates={updates // 3}"]
    words += ["checkpoint.keep=99", "system.deterministic=true"]
    whole = run(folder / "whole", words)
    early = find_all(folder / "whole")[-1]
    resumed = run(folder / "resumed", [*words, f"resume={early}"])
    if whole != resumed:
        sys.exit("the weights of the resumed run differ from those of the whole one")
    print("the same to the last bit")


if __name__ == "__main__":
    main()
