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
from switchlora.sweep import (
    Sweep,
    failed,
    follow_parent,
    is_empty,
    job_folder,
    objectives,
    run_job,
    told,
)
from switchlora.train import train


@cache
def start_time() -> datetime:
    """When the primary rank started: all ranks must name the same folder."""
    return distributed.from_primary(datetime.now)


def leaves_of(key: str, *, _root_: DictConfig, _parent_: DictConfig) -> DictConfig:
    """Return a section with the keys of section ``key``; each refers to its value there."""
    followed = OmegaConf.select(_root_, key)
    leaves = {name: f"${{{key}.{name}}}" for name in followed}
    return OmegaConf.create(leaves, parent=_parent_)


OmegaConf.register_new_resolver("switchlora_leaves", leaves_of)
OmegaConf.register_new_resolver("switchlora_root", lambda: str(folder_of("experiments").parent))
OmegaConf.register_new_resolver("switchlora_job", job_folder)
OmegaConf.register_new_resolver("switchlora_start", lambda form: start_time().strftime(form))


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name="config")
def _hydra_main(config: DictConfig) -> float | tuple[float, ...]:
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

    With SWITCHLORA_TRACEBACK=1 in the environment the whole traceback is shown.
    """
    if "--version" in sys.argv[1:]:
        print(f"switchlora {__version__}")
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them
    talk_without_risk()
    follow_parent()
    try:
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
    except Interrupted as stop:
        if distributed.is_primary():
            print(f"switchlora: {stop}", file=sys.stderr, flush=True)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        sys.exit("switchlora: interrupted; what was saved is kept, the same command goes on")
    except Exception as error:
        exit_with_one_line(error)
