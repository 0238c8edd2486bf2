"""Whole runs on real digits that many tests make, and the comparison of two of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from conf_yamls import composed
from packaging.version import Version
from safetensors.torch import load_file

from switchlora.checkpoint import find_all, read
from switchlora.train import train

DIGITS = ("data=digits", "model=digits", "log=quiet", "log.figures=false")
SHORT = (*DIGITS, "epochs=3", "full.scheduler.warmup_t=10", "monitor.window=10", "log.every=1")
BY_DATE = ("switch/criterion=at_epoch", "switch.criterion.epoch=1.5")
TIMES = {
    "train/images_per_second",
    "train/epoch_seconds",
    "memory/peak_bytes",
    "monitor/time_share",
    "switch/seconds",
}


def make_run(folder, *overrides):
    """Train on digits in ``folder``; 20 updates an epoch, a measurement every 10."""
    return train(composed(*SHORT, *overrides), Path(folder))


def events_without_times(folder):
    """Lines of metrics.jsonl, without what a clock or the memory says."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def last_state(folder):
    """The newest checkpoint of a run, without times and places."""
    state = read(find_all(Path(folder))[0])
    for key in ("stopwatch", "log", "config"):
        state.pop(key)
    state["train"].pop("phases")
    if state["train"]["switch_report"]:
        state["train"]["switch_report"].pop("seconds")
    return state


def wandb_records(folder):
    """Records of the offline run by ``wandb leet inspect``, W&B's own reader since 0.31."""
    if Version(wandb.__version__) < Version("0.31"):
        pytest.skip("this W&B has no `wandb leet inspect`")
    (run,) = (folder / "wandb").glob("offline-run-*")
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    found = subprocess.run(reader, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in found.stdout.splitlines()]


def history_row(record):
    """One step of W&B as a dict."""
    return record["history"]["item"]


def differences(one, other, path="state"):
    """Paths at which two nested plain structures with tensors differ."""
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [path]
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [path]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    return [] if one == other or (one != one and other != other) else [path]


def assert_same_run(one, other):
    """Both runs ended bit-equal: weights, moments, average, generators, history and metrics."""
    found = differences(last_state(one), last_state(other))
    assert not found, found
    assert events_without_times(one) == events_without_times(other)
    for name in ("model.safetensors", "model_ema.safetensors"):
        paths = [Path(folder) / name for folder in (one, other)]
        assert len({path.exists() for path in paths}) == 1
        if paths[0].exists():
            assert differences(*[load_file(path) for path in paths]) == []
