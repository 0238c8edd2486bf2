"""A run on a device that is not the CPU, where no operation may mix the two."""

import threading

import pytest
import torch
from torch import nn

from pretended import DEVICE, TwoDevices, on_pretended
from runs import assert_same_but_for_memory, make_run, make_run_in_parts
from switchlora.storage import checkpoint
from switchlora.storage.background import THREAD

THERE = f"system.device={DEVICE}"
SMALL = (
    *("data.train_size=320", "max_updates=22"),
    *("full.scheduler.warmup_t=5", "monitor.window=5"),
)
"""10 updates an epoch"""
EVERYTHING = (
    *("switch/criterion=at_epoch", "switch.criterion.epoch=1.5", "switch/init=update_svd"),
    *("ema=0.9", "switch/guard=full", "monitor.exact=true"),
)
KINDS = {
    "bases": ("+method=oialr_test",),
    "restarts": ("+method=relora_svd",),
    "guided": ("+method=self_guided_32", "model.depth=2"),
    "stages under Muon": ("+method=staged", "recipe@full=muon", "recipe@adapter=muon"),
}


pytestmark = pytest.mark.usefixtures("measured_together")


def test_the_pretended_device_refuses_what_a_real_one_refuses():
    with on_pretended():
        layer = nn.Linear(3, 2).to(DEVICE)
        images = torch.ones(4, 3)
        assert layer.weight.device == DEVICE and images.device.type == "cpu"
        with pytest.raises(TwoDevices):
            layer(images)
        loss = layer(images.to(DEVICE)).sum()
        loss.backward()
        assert loss.device == layer.weight.grad.device == DEVICE


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_another_device_is_the_run_on_the_cpu(kind, tmp_path):
    words = (*SMALL, *KINDS[kind])
    with on_pretended():
        make_run(tmp_path / "there", THERE, *words)
    make_run(tmp_path / "here", *words)
    assert_same_but_for_memory(tmp_path / "there", tmp_path / "here")


def test_a_run_stops_and_goes_on_on_another_device_where_a_thread_writes_its_checkpoints(
    tmp_path, at_update, monkeypatch
):
    words = (*SMALL, *EVERYTHING)
    threads = set()
    finish = checkpoint._finish_writing

    def finish_here(*args):
        threads.add(threading.current_thread().name)
        finish(*args)

    monkeypatch.setattr(checkpoint, "_finish_writing", finish_here)
    with on_pretended():
        make_run_in_parts(tmp_path / "there", at_update, [12, 18], THERE, *words)
    assert threads == {THREAD}
    make_run(tmp_path / "here", *words)
    assert_same_but_for_memory(tmp_path / "there", tmp_path / "here")
