"""Drift: images that changed are found, those that did not are not, and how often by mistake."""

import json
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import chi2_contingency

from conf_yamls import build, composed
from runs import SHORT
from switchlora import commands
from switchlora.analysis.drift import drift, sample as samples
from switchlora.analysis.drift.sample import SAMPLE, Sample, read_sample, reference_of, save_sample
from switchlora.analysis.drift.statistics import (
    class_shift,
    compared,
    holm,
    mmd_of,
    mmd_permuted,
    permutations_for,
    rbf_kernel,
)
from switchlora.data import Digits
from switchlora.storage import load_saved

SMALL = ("model.embed_dim=32", "model.num_heads=1", "data.eval_size=null", "full.precision=fp32")
CLEAN = 20


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    """A model of which the last layer alone is fitted, and what drift is measured against."""
    folder = tmp_path_factory.mktemp("version")
    config = composed(*SHORT, *SMALL)
    torch.manual_seed(0)
    model = build(config.model)
    fit_head(model, config.data)
    save_file(model.state_dict(), folder / "model.safetensors")
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    save_sample(reference_of(load_saved(folder), (), "cpu"), folder / SAMPLE)
    return folder


@torch.no_grad()
def fit_head(model, data):
    """By least squares, on training images."""
    images = Digits(train=True)
    pixels = torch.from_numpy(images.images[:500]).float()[:, None] / 255
    features = model.forward_features((pixels - data.mean[0]) / data.std[0])
    features = model.forward_head(features, pre_logits=True)
    wanted = torch.nn.functional.one_hot(torch.from_numpy(images.targets[:500]), 10).float()
    solved = torch.linalg.lstsq(features, 20 * wanted).solution
    model.head.weight.copy_(solved.T)
    model.head.bias.zero_()


def paint(folder, change=lambda pixels: pixels, count=200):
    """Images of the test split, in two folders."""
    images = Digits(train=False)
    for number in range(count):
        image, _ = images[number]
        path = folder / ("a", "b/c")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(change(np.asarray(image))).save(path)
    return folder


def status_of(monkeypatch, *words):
    """Exit status of the command, or its line."""
    monkeypatch.setattr(sys, "argv", ["switchlora-runs", "drift", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        commands.runs()
    return stop.value.code


PLANTED = {
    "inverted": lambda pixels: 255 - pixels,
    "darkened": lambda pixels: pixels // 2,
    "one class": lambda pixels: np.asarray(Digits(train=False)[0][0]),
}


def test_planted_drift_is_found_and_drawn(version, tmp_path, monkeypatch, capsys):
    images = paint(tmp_path / "images", PLANTED["inverted"])
    out = tmp_path / "out"
    assert status_of(monkeypatch, version, images, "--output", out, "--device", "cpu") == 2
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("drift in ") and "features together" in verdict
    assert verdict.endswith("; 200 images against 144 of val)")
    content = json.loads((out / "drift.json").read_text())
    assert content["drift"] and content["verdict"] == verdict and content["psi"] > 0.1
    assert Image.open(out / "drift.png").size[0] > 500


@pytest.mark.parametrize("change", [name for name in PLANTED if name != "inverted"])
def test_other_planted_drift_is_found(version, tmp_path, change):
    images = paint(tmp_path / "images", PLANTED[change], count=100)
    found = drift.drift_of(version, [str(images)], device="cpu").found
    assert found.drift and found.tests[-1].adjusted <= found.level


def test_no_drift_is_found_where_none_is(version, tmp_path, monkeypatch, capsys):
    images = paint(tmp_path / "images")
    (images / "a/broken.png").write_bytes(b"\x89PNG")
    (images / "notes.txt").touch()
    assert status_of(monkeypatch, version, images) == 0
    *_, left_out, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith("no drift at level 0.01 (smallest p ")
    assert verdict.endswith("; 200 images against 144 of val)")
    assert left_out.startswith("1 cannot be read and are left out") and "broken.png" in left_out


def test_images_that_a_model_cannot_take_are_counted_where_too_few_are_left(version, tmp_path):
    folder = paint(tmp_path / "images", count=40)
    for number in range(15):
        path = folder / ("a", "b/c")[number % 2] / f"{number}.png"
        Image.open(path).convert("RGB").save(path)
    said = r"15 images left out, such as .*0\.png.* has colours .* and 25 images: drift needs 30"
    with pytest.raises(ValueError, match=said):
        drift.drift_of(version, [str(folder)], device="cpu")


def test_data_by_words_are_the_images_in_a_folder(version, tmp_path):
    by_words = drift.drift_of(version, ["data=digits"], device="cpu")
    folder = paint(tmp_path / "images", count=360)
    by_folder = drift.drift_of(version, [str(folder)], device="cpu")
    assert len(by_words.new) == len(by_folder.new) == 360 and not by_words.found.drift
    order = by_folder.new.confidence.sort().values
    assert torch.allclose(by_words.new.confidence.sort().values, order)


def test_of_many_images_a_sample_is_drawn(version, tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "MOST", 60)
    folder = paint(tmp_path / "images", count=90)
    for images in ([str(folder)], ["data=digits"]):
        assert len(drift.drift_of(version, images, device="cpu").new) == 60


def test_of_images_that_do_not_fit_words_say_what_to_do(version, tmp_path):
    def enlarge(pixels):
        return np.repeat(np.repeat(pixels, 2, 0), 2, 1)

    folder = paint(tmp_path / "images", enlarge, count=40)
    with pytest.raises(ValueError, match=r"16 x 16 pixels, but .* or let data.eval_transform={}"):
        drift.drift_of(version, [str(folder)], device="cpu")
    resized = drift.drift_of(version, [str(folder), "data.eval_transform={}"], device="cpu")
    assert len(resized.new) == 40


def flip(folder):
    content = bytearray((folder / SAMPLE).read_bytes())
    content[2] ^= 1
    (folder / SAMPLE).write_bytes(content)


def seal(folder):
    (folder / "version.json").write_text("{}")
    (folder / "checksums.json").write_text("{}")


MISTAKES = {
    "has 29 images: drift needs 30 or more": lambda v, i: (v, paint(i, count=29)),
    "has 0 images: drift needs": lambda v, i: (v, v),
    "is no folder of images": lambda v, i: (v, i / "nothing"),
    "is one folder too many": lambda v, i: (v, paint(i), i),
    "has no reference.safetensors: give a version": lambda v, i: ("/", paint(i)),
    "reference.safetensors is damaged": lambda v, i: (flip(v) or v, paint(i)),
    "is damaged: config.yaml was not published": lambda v, i: (seal(v) or v, paint(i)),
    "--level 0 is no probability": lambda v, i: (v, paint(i), "--level", "0"),
    "data=digts: choose one of bytes, cifar10": lambda v, i: (v, "data=digts"),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_is_one_line_and_has_another_status(
    version, tmp_path, monkeypatch, capsys, said
):
    copy = shutil.copytree(version, tmp_path / "version")
    line = status_of(monkeypatch, *MISTAKES[said](copy, tmp_path / "images"))
    assert line.startswith("drift: ") and said in line and "\n" not in line
    assert status_of(monkeypatch, "--nothing") == 1, "not that of drift"


def gaussian(rows, columns=6, seed=0, shift=0.0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift


def test_mmd_is_its_definition():
    one, other = gaussian(7), gaussian(5, seed=1, shift=0.5)
    rows = torch.cat([one, other]).double()
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    width = np.median([float((rows[i] - rows[j]).norm()) for i, j in pairs])

    def kernel(i, j):
        return np.exp(-float((rows[i] - rows[j]).square().sum()) / (2 * width**2))

    def mean(first, second):
        return np.mean([kernel(i, j) for i in first for j in second if i != j])

    defined = mean(range(7), range(7)) + mean(range(7, 12), range(7, 12))
    defined -= 2 * mean(range(7), range(7, 12))
    found, null = mmd_permuted(one, other, 99)
    assert abs(found - defined) < 0.02 and len(null) == 99  # torch's median is the lower one
    exact = rbf_kernel(rows)
    members = torch.zeros(12, 1, dtype=torch.double)
    members[:7] = 1
    by_loops = exact[:7, :7].sum() / 42 + exact[7:, 7:].sum() / 20 - 2 * exact[:7, 7:].mean()
    assert torch.isclose(mmd_of(exact, members)[0], by_loops)


def test_constant_features_have_no_drift():
    found, null = mmd_permuted(torch.ones(40, 3), torch.ones(50, 3), 99)
    assert abs(found) < 1e-12 and np.abs(null).max() < 1e-12


def test_chi_square_is_that_of_scipy_and_psi_that_of_its_definition():
    known, new = np.array([50, 30, 20]), np.array([80, 90, 30])
    chi, p, psi = class_shift(known, new)
    expected = chi2_contingency([known, new], correction=False)
    assert (chi, p) == (expected.statistic, expected.pvalue)
    first, second = (known + 0.5) / 101.5, (new + 0.5) / 201.5
    assert psi == pytest.approx(((second - first) * np.log(second / first)).sum())


def test_rare_classes_ring_no_alarm():
    """A thousand classes, of which a hundred images know few."""
    random = np.random.default_rng(0)
    shares = 1 / np.arange(1, 1001) ** 1.5
    values = []
    for _ in range(200):
        two = random.multinomial(100, shares / shares.sum(), 2)
        values.append(class_shift(*two)[1])
    assert np.mean(np.array(values) < 0.05) < 0.09
    assert class_shift(np.array([4, 0]), np.array([0, 4]))[1] == 1.0, "all of them are rare"


def test_holm_is_his_example_and_one_level_over_all():
    assert holm([0.005, 0.011, 0.02, 0.04]) == pytest.approx([0.02, 0.033, 0.04, 0.04])
    assert 4 / (1 + permutations_for(0.001)) < 0.001 / 3.9


def drawn(rows):
    """A sample as a model of ten classes would give it."""
    logits = rows @ gaussian(rows.shape[1], 10, seed=99)
    confidence, predicted = logits.softmax(1).max(1)
    return Sample(predicted, confidence, rows, 10, "val")


def test_clean_images_ring_as_often_as_the_level_says_and_moved_ones_always():
    alarms = []
    for seed in range(CLEAN):
        known, new = drawn(gaussian(80, seed=2 * seed)), gaussian(60, seed=2 * seed + 1)
        alarms.append(compared(known, drawn(new), level=0.05).drift)
        if seed < 3:
            assert compared(known, drawn(new + 1), level=0.05).drift
    assert sum(alarms) <= 3, f"{sum(alarms)} of {CLEAN} at a level of 5 %"


def test_a_sample_comes_back_from_its_file(version):
    sample = read_sample(version / SAMPLE)
    assert sample.features.shape == (144, 32) and sample.split == "val"
    logits = load_saved(version).model.head(sample.features)
    assert torch.equal(logits.argmax(1), sample.predicted)


def test_without_the_images_of_training_those_of_test_are_known(version, monkeypatch):
    def gone(*_, **__):
        raise ValueError("the images of training are gone")

    monkeypatch.setattr(samples, "build", gone)
    sample = reference_of(load_saved(version), (), "cpu")
    assert (sample.split, len(sample)) == ("test", 360)


FAMILIES = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 1},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)},
    "resnet10t": {"channels": (8, 8, 8, 16)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_the_last_layer_reads(name):
    model = timm.create_model(name, num_classes=4, **FAMILIES[name]).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        both = samples.Observed(model)(images)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.allclose(both[:, 4:], pooled, atol=1e-6)
