"""Small real parts that many tests share."""

import gc
import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # two processes share the machine
    os.environ.setdefault(variable, "1")

import pytest
import timm
import torch

from switchlora.learner import Learner
from switchlora.monitor import LayerStats, Measurement, monitor
from switchlora.monitor.spectral import polar_by_products
from switchlora.storage import machine_line
from warm import merge_once, parse_interpolations_once, parse_yamls_once

LONGEST = (
    "resume",
    "distributed",
    "sweep",
    "trunk",
    "train",
    "launch",
    "killtest",
    "trials",
    "wheel",
    "transitions",
)
"""files that take minutes"""


@pytest.fixture(autouse=True, scope="session")
def parsed_once():
    """Yamls and interpolations are parsed and merged once, in all tests of a process."""
    with pytest.MonkeyPatch.context() as patch:
        parse_interpolations_once(patch)
        parse_yamls_once(patch)
        merge_once(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def disk_not_waited_for():
    """Files are not synced: no test cuts the power, and a run would wait for the disk 29 times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Collections of garbage, of which each switch makes one, see only what the test makes."""
    gc.collect()
    gc.freeze()


def pytest_report_header():
    """Processor, kernels, threads and versions, so that a failure elsewhere can be read."""
    return machine_line(torch.device("cpu"))


def pytest_collection_modifyitems(config, items):
    """The longest files first, so that processes that take a file each end at the same time."""
    if config.pluginmanager.hasplugin("randomly"):
        return
    names = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: (*names, item.path.stem).index(item.path.stem))


def tiny_vit(**options):
    """A ViT of two blocks that runs in milliseconds."""
    defaults = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 5}
    defaults |= {"embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **{**defaults, **options})


@pytest.fixture
def vit():
    """A seeded tiny ViT with a head that is not zero."""
    torch.manual_seed(0)
    return tiny_vit()


@pytest.fixture
def images():
    """Eight images for the tiny ViT."""
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def measured_together(monkeypatch):
    """All devices measure as a GPU does; ``test_monitor`` has how near that is to a CPU's way."""
    monkeypatch.setattr(monitor, "goes_together", lambda device: True)
    monkeypatch.setattr(monitor, "polar_factor", polar_by_products)


@pytest.fixture
def at_update(monkeypatch):
    """Do something to the images, or to the world, while a run makes a given update."""
    return acting(monkeypatch)


def acting(monkeypatch):
    """What ``at_update`` gives, for fixtures of a module."""
    update = Learner.update

    def when(number, act):
        def acting(self, images, targets, loss_fn, num_updates):
            if num_updates + 1 == number:
                images = act(images)
            return update(self, images, targets, loss_fn, num_updates)

        monkeypatch.setattr(Learner, "update", acting)

    return when


def stats(weight_norm=1.0, update_norm=0.1, weight_rank=4.0, update_rank=2.0, grad_norm=1.0):
    """Layer statistics with defaults."""
    return LayerStats(weight_norm, update_norm, weight_rank, update_rank, grad_norm)


def history(series, losses=None):
    """Measurements from ``{target: [LayerStats, ...]}``, ten updates and one epoch apart."""
    length = len(next(iter(series.values())))
    losses = losses or [1.0] * length
    return [
        Measurement(10 * (t + 1), t + 1.0, losses[t], {name: s[t] for name, s in series.items()})
        for t in range(length)
    ]
