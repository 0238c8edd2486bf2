"""Whole runs on real digits that many tests make, and the comparison of two of them."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from conf_yamls import composed
from switchlora.analysis.compare import TIMED, differences
from switchlora.errors import Interrupted
from switchlora.train import train

TINY = ("model.depth=1", "model.embed_dim=32")
DIGITS = ("data=digits", "model=digits", *TINY, "log=quiet", "log.figures=false")
FEW = ("data.train_size=640", "data.batch_size=32")
"""20 updates an epoch"""
ON_ANY_DATA = (
    *(*DIGITS, *FEW, "epochs=3", "full.scheduler.warmup_t=10"),
    *("monitor.window=10", "log.every=1"),
)
SHORT = (*ON_ANY_DATA, "data.eval_size=64")
BY_DATE = ("switch/criterion=at_epoch", "switch.criterion.epoch=1.5")


def make_run(folder, *overrides):
    """Train on digits in ``folder``; 20 updates an epoch, a measurement every 10."""
    return train(composed(*SHORT, *overrides), Path(folder))


def make_run_in_parts(folder, at_update, stops, *overrides):
    """As ``make_run``, but stopped by SIGTERM at each of these updates, and gone on with."""

    def stop(images):
        os.kill(os.getpid(), signal.SIGTERM)
        return images

    for update in stops:
        at_update(update, stop)
        with pytest.raises(Interrupted):
            make_run(folder, *overrides, "resume=auto")
    at_update(None, stop)
    return make_run(folder, *overrides, "resume=auto")


def events_without_times(folder):
    """Lines of metrics.jsonl, without what a clock or the memory says."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMED} for x in lines]


def wandb_records(folder):
    """Records of the offline run by ``wandb leet inspect``, W&B's own reader since 0.31."""
    if Version(version("wandb")) < Version("0.31"):
        pytest.skip("this W&B has no `wandb leet inspect`")
    (run,) = (folder / "wandb").glob("offline-run-*")
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    found = subprocess.run(reader, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in found.stdout.splitlines()]


def history_row(record):
    """One step of W&B as a dict."""
    return record["history"]["item"]


def assert_same_run(one, other):
    """Both runs ended bit-equal, as ``scripts/compare.py`` sees it."""
    found = differences(Path(one), Path(other))
    assert not found, found


def assert_same_but_for_memory(one, other):
    """As ``assert_same_run``, for runs on two devices, of which each counts what is on its own."""
    found = [line for line in differences(Path(one), Path(other)) if "memory" not in line]
    assert not found, found
