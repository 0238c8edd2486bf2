"""``switchlora key=value ...``: Hydra, and one clear line for a user's mistake."""

import math
import os
import sys
from datetime import datetime
from functools import cache
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from switchlora import __version__
from switchlora.config import folder_of
from switchlora.errors import Interrupted
from switchlora.process import (
    distributed,
    exit_with_one_line,
    prepare_words,
    say,
    talk_without_risk,
)

QUESTIONS = (
    "--help",
    "-h",
    "--hydra-help",
    "--info",
    "-i",
    "--cfg",
    "-c",
    "--shell-completion",
    "-sc",
)
"""words after which Hydra answers, and nothing is trained"""


@cache
def start_time() -> datetime:
    """When the primary rank started: all ranks must name the same folder."""
    return distributed.from_primary(datetime.now)


def leaves_of(key: str, *, _root_: DictConfig, _parent_: DictConfig) -> DictConfig:
    """Return a section with the keys of section ``key``; each refers to its value there."""
    followed = OmegaConf.select(_root_, key)
    leaves = {name: f"${{{key}.{name}}}" for name in followed}
    return OmegaConf.create(leaves, parent=_parent_)


def name_of_job(*, _root_: DictConfig) -> str:
    """Return the name of a job's folder; only a sweep asks for it."""
    from switchlora.sweep import job_folder

    return job_folder(_root_=_root_)


OmegaConf.register_new_resolver("switchlora_leaves", leaves_of)
OmegaConf.register_new_resolver("switchlora_root", lambda: str(folder_of("experiments").parent))
OmegaConf.register_new_resolver("switchlora_job", name_of_job)
OmegaConf.register_new_resolver("switchlora_start", lambda form: start_time().strftime(form))


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name="config")
def _hydra_main(config: DictConfig) -> float | tuple[float, ...]:
    from switchlora.sweep import objectives, run_job
    from switchlora.train import train

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode is RunMode.MULTIRUN:
        return objectives(config, run_job(config, folder, train))
    try:
        train(config, folder)
    except Exception as error:
        exit_with_one_line(error)
    return math.nan  # nobody reads it


def main() -> None:
    """``switchlora`` on the command line: one clear line for a user's mistake, exit status 1.

    With SWITCHLORA_TRACEBACK=1 in the environment the whole traceback is shown. What trains is
    imported only where something is trained, so that help and completion come sooner.
    """
    words = sys.argv[1:]
    if "--version" in words:
        print(f"switchlora {__version__}")
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them
    talk_without_risk()
    only_asks = not set(words).isdisjoint(QUESTIONS)
    try:
        if only_asks:
            prepare_words()
            _hydra_main()
        else:
            _train()
    except Interrupted as stop:
        if distributed.is_primary():
            print(f"switchlora: {stop}", file=sys.stderr, flush=True)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        sys.exit("switchlora: interrupted; what was saved is kept, the same command goes on")
    except Exception as error:
        exit_with_one_line(error)


def _train() -> None:
    """Make a run, or the jobs of a sweep, and say what became of them."""
    from switchlora.sweep import Sweep, failed, follow_parent, is_empty, told

    follow_parent()
    prepare_words()
    distributed.join()
    start_time()  # here, so that no rank asks for it alone
    try:
        _hydra_main()
    finally:
        for line in told(Sweep.running):
            say(line)
    distributed.leave()
    if is_empty(Sweep.running):
        raise ValueError("the multirun has no job: a word sweeps over nothing")
    if failed(Sweep.running):
        sys.exit(1)
