"""The loop on a device that works alone: nobody waits for it; it computes what the CPU does."""

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from conf_yamls import build, composed
from conftest import tiny_vit
from pretended import DEVICE, READS, Pretended, on_pretended
from runs import BY_DATE, SHORT, assert_same_run, make_run
from switchlora import learner as learners
from switchlora.adapters import find_targets
from switchlora.data import build_data
from switchlora.errors import Interrupted
from switchlora.learner import (
    READ_LATE,
    Learner,
    Recipe,
    WeightEMA,
    build_learner,
    evaluate,
    precision_of,
)
from switchlora.monitor import UpdateMonitor
from switchlora.run import prepare
from switchlora.train import fit

THERE = f"system.device={DEVICE}"
ONE_KERNEL = ("+full.optimizer.fused=true", "+adapter.optimizer.fused=true")
LIVELY = (
    *(*BY_DATE, "epochs=2", "ema=0.9", "data.mixup_alpha=0.8", "data.crop_padding=1"),
    *("model.depth=1", "model.embed_dim=16", "checkpoint.every_updates=7", "max_skipped=9"),
    *("switch/rank=fixed", "switch.rank.rank=1"),
)


@pytest.fixture
def late(monkeypatch):
    """Treat devices of some types as those that work while the host goes on."""

    def treat(*types):
        monkeypatch.setattr("switchlora.learner.awaited.READ_LATE", list(types))

    return treat


def poisoned(monkeypatch, bad, stopped_at=None):
    """Make the images of some updates NaN, by their count, and ask the run to stop at one."""
    backward = Learner.backward

    def spoiled(self, images, *others):
        spoiled.calls += 1
        if spoiled.calls == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)
        images = images * float("nan") if spoiled.calls in bad else images
        return backward(self, images, *others)

    spoiled.calls = 0
    monkeypatch.setattr(Learner, "backward", spoiled)


def test_outcomes_read_late_change_no_bit_where_updates_are_skipped_and_a_run_is_resumed(
    tmp_path, monkeypatch, late
):
    bad = (6, 7, 20, 33)
    with monkeypatch.context() as patch:
        poisoned(patch, bad)
        summary = make_run(tmp_path / "at_once", *ONE_KERNEL, *LIVELY)
    assert summary["skipped_updates"] == len(bad) and summary["switch"]["fired"]
    late("cpu")
    with monkeypatch.context() as patch:
        poisoned(patch, bad, stopped_at=16)
        with pytest.raises(Interrupted):
            make_run(tmp_path / "late", *ONE_KERNEL, *LIVELY)
        make_run(tmp_path / "late", *ONE_KERNEL, *LIVELY, "resume=auto")
    assert_same_run(tmp_path / "at_once", tmp_path / "late")


class Counting(Pretended):
    """Also counts the bytes that reach the device.

    torch's clipping asks C++ for the device of gradients, where nothing is pretended.
    """

    sent = 0

    def _moved(self, name, args, kwargs):
        was, before = self.device_of(args[0]), self.crossings["waiting"]
        result = super()._moved(name, args, kwargs)
        callers = {Path(frame.filename).name for frame in traceback.extract_stack(limit=6)}
        if "clip_grad.py" in callers:
            self.crossings["waiting"] = before
            self.place(result, was)
        elif self.device_of(result) != was and was.type == "cpu":
            self.sent += result.nbytes
        return result


def test_no_update_between_windows_waits_for_the_device_or_sends_it_images(
    tmp_path, monkeypatch, late
):
    late(DEVICE.type)
    backward, seen = Learner.backward, []
    words = (*SHORT, "data.batch_size=8", "data.train_size=960", "model.depth=1", "ema=0.9")
    words += ("model.embed_dim=16", "max_updates=112", "monitor.window=111", "data.hflip=0.5")

    def noted(self, *args):
        waits = sum(mode.crossings[name] for name in (*READS, "waiting"))
        seen.append((waits, mode.sent))
        return backward(self, *args)

    monkeypatch.setattr(Learner, "backward", noted)
    with Counting() as mode:
        config = composed(*words, THERE, "data.mixup_alpha=0.8", "switch/criterion=never")
        run = prepare(config, tmp_path)
        with run.log:
            fit(run)
        moved = mode.crossings["waiting"]
        evaluate(run.model, run.data.val)
        assert mode.crossings["waiting"] == moved + 1
    assert run.learner.decides_on_device and len(seen) == 112
    between = seen[5:106]  # 100 updates
    assert {waits for waits, _ in between} == {between[0][0]}
    bytes_of_an_image = (between[-1][1] - between[0][1]) / 100 / 8
    assert 0 < bytes_of_an_image <= 16


class Squares(Dataset):
    """Colourful images."""

    targets = [0, 1, 2, 3] * 8

    def __getitem__(self, index):
        from PIL import Image

        pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        return Image.fromarray(pixels), self.targets[index]

    def __len__(self):
        return len(self.targets)


KINDS = {
    "in memory": {"image_size": 12, "crop_padding": 2, "hflip": 0.5, "cutmix_alpha": 1.0},
    "erased by noise": {"train_transform": {"re_prob": 0.9, "re_mode": "pixel", "re_count": 2}},
    "erased by colours": {"train_transform": {"re_prob": 0.9, "re_mode": "rand"}},
    "erased by black": {"train_transform": {"re_prob": 0.9}, "mixup_alpha": 0.8},
    "not normalised": {"train_transform": {"normalize": False}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_on_a_device_have_the_bits_of_those_on_the_cpu(kind):
    options = {"image_size": 8, "num_classes": 4, "in_chans": 3, "batch_size": 8, "seed": 3}
    options |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], **KINDS[kind]}

    def batches(there):
        data = build_data(Squares(), Squares(), **options)
        before = data.digest()
        if there:
            data.to(DEVICE)
        data.set_epoch(1)
        found = [*(data.mixup(*b) if data.mixup else b for b in data.train), *data.val]
        assert data.digest() == before and data.example(2)[0].shape[0] == 2
        assert not there or {t.device for batch in found for t in batch} == {DEVICE}
        return [tensor.cpu() for batch in found for tensor in batch]

    here = batches(there=False)
    with on_pretended():
        there = batches(there=True)
    assert len(here) == len(there) > 4
    assert all(map(torch.equal, here, there))


def test_workers_send_bytes():
    options = {"image_size": 8, "num_classes": 4, "in_chans": 3, "batch_size": 8}
    options |= {"mean": [0.5] * 3, "std": [0.5] * 3, "train_transform": {"no_aug": True}}
    data = build_data(Squares(), Squares(), **options)
    with on_pretended():
        data.to(DEVICE)
        images, *_ = data.train.dataset[torch.arange(4), torch.arange(4)]
    assert images.dtype == torch.uint8


@pytest.mark.parametrize(
    "device,has_it,expected",
    [("cuda", True, "bf16"), ("cuda", False, "fp32"), ("cpu", True, "fp32")],
)
def test_the_precision_is_bf16_where_a_gpu_has_it(device, has_it, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: has_it)
    assert precision_of("auto", torch.device(device)) == expected
    assert precision_of("fp16", torch.device(device)) == "fp16"


def test_the_files_of_a_run_name_the_precision_it_had(tmp_path):
    assert composed().full.precision == composed().adapter.precision == "auto"
    run = prepare(composed(*SHORT), tmp_path)
    assert run.config["full"]["precision"] == run.config["adapter"]["precision"] == "fp32"
    assert run.recipe.precision == "fp32"


SETTINGS = (
    "set_float32_matmul_precision('high')",
    "backends.fp32_precision = 'tf32'",
    "backends.cuda.matmul.fp32_precision = 'tf32'",
)


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_exact_where_a_switch_is_checked_however_tf32_was_set(setting):
    """In a process of its own, since torch does not forget which interface was used."""
    code = f"""
import torch
from switchlora.process import exact_products
parts = torch.backends.cuda.matmul, torch.backends.cudnn.conv
def tf32():
    return [part.fp32_precision for part in parts]
torch.{setting}
before = tf32()
with exact_products():
    assert "tf32" not in tf32(), tf32()
assert tf32() == before and before[0] == "tf32", (before, tf32())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_monitor_measures_without_tf32_wherever_it_is_used(monkeypatch):
    """From the start on, in a loop of one's own too: TF32 moves a stable rank by 1e-3."""
    products, seen, norm = torch.backends.cuda.matmul, [], torch.linalg.vector_norm

    def noted(*args, **options):
        seen.append(products.allow_tf32)
        return norm(*args, **options)

    monkeypatch.setattr(torch.linalg, "vector_norm", noted)
    model = tiny_vit()
    products.allow_tf32 = True
    try:
        UpdateMonitor(model, find_targets(model, [r"mlp\.fc1"]), 1).measure(1, 1.0)
        assert len(seen) > 2 and not any(seen) and products.allow_tf32
    finally:
        products.allow_tf32 = False


def test_a_deterministic_run_sets_torch_and_moves_no_bit_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    words = (*LIVELY, "max_updates=14")
    make_run(tmp_path / "plain", *words)
    try:
        make_run(tmp_path / "repeated", *words, "system.deterministic=true")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "plain", tmp_path / "repeated")


class Weights(nn.Module):
    """Its output is its weights, times a number."""

    def __init__(self, slope=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(8))
        self.slope = slope

    def forward(self, inputs):
        return self.w * self.slope


def recipe(**options):
    return Recipe(build(composed().full).optimizer, build(composed().full).scheduler, **options)


def first(output, _):
    return output.sum()


def test_a_norm_that_overflows_while_gradients_do_not_is_no_overflow_of_fp16():
    learner = build_learner(Weights(1e38), recipe(precision="fp16"), 10)
    learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": 2.0})
    step = learner.update(torch.zeros(1, 1), torch.zeros(1), first, 0)
    assert not step.applied and not step.overflow and learner.scaler.get_scale() == 2.0


def test_the_backward_pass_is_outside_of_autocast():
    model = Weights()
    seen = []
    model.w.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
    learner = build_learner(model, recipe(precision="bf16"), 10)
    learner.update(torch.zeros(1, 1), torch.zeros(1), first, 0)
    assert seen == [False]


@pytest.mark.parametrize(
    "of, precision, expected",
    [
        ("float32", "bf16", "float32"),
        ("float32", "fp32", "float32"),
        ("float64", "fp32", "float64"),
    ],
)
def test_a_loss_gets_outputs_of_at_least_float32(of, precision, expected):
    """CUDA's autocast leaves the log-probabilities of a cross entropy in 16 bits."""
    model, seen = nn.Linear(4, 5, dtype=getattr(torch, of)), []

    def loss(outputs, labels):
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, labels)

    learner = build_learner(model, recipe(precision=precision), 10)
    learner.update(torch.ones(3, 4, dtype=model.weight.dtype), torch.arange(3), loss, 0)
    assert seen == [getattr(torch, expected)]


def test_the_average_is_that_of_single_tensors_in_one_call(vit):
    ema = WeightEMA(vit, 0.9)
    expected = {name: average.clone() for name, average in ema.state_dict().items()}
    for step in range(2):
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(torch.randn_like(parameter))
            for name, tensor in vit.state_dict().items():
                expected[name].lerp_(tensor, 1 - 0.9)
        if step:  # with and without a look before
            ema.look(vit)
        assert ema.update(vit) is None
    assert all(torch.equal(expected[name], tensor) for name, tensor in ema.state_dict().items())


def test_only_optimizers_that_know_how_decide_on_the_device(vit, late):
    assert READ_LATE == ["cuda"] and learners.reads_late(torch.device("cuda"))
    late("cpu")
    decides = {}
    for name in ("adamw", "adam", "sgd", "lion", "muon"):
        chosen = build(composed(f"recipe@full={name}").full)
        decides[name] = build_learner(vit, chosen, 10).decides_on_device
    assert decides == {"adamw": True, "adam": True, "sgd": False, "lion": False, "muon": False}
    assert not build_learner(vit, recipe(precision="fp16"), 10).decides_on_device
