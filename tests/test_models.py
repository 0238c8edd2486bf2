"""Weights that a model starts from: filters, new heads, and runs that need the file once."""

import argparse
import math
import os
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from conf_yamls import build, composed
from conftest import tiny_vit
from runs import DIGITS, make_run
from switchlora.adapters import Factors, find_targets, inject, is_factor, scaling_one
from switchlora.models import create_model, load_weights
from switchlora.storage import find_all, load_model, save_adapter, save_merged
from switchlora.sweep import trunk_key

REPOSITORY = Path(__file__).parents[1]
PLACE = os.environ.get("SWITCHLORA_PRETRAINED", "../shared/data/vit_small_patch14.safetensors")
VIT_S = "vit_small_patch14_dinov2"


@pytest.fixture
def pretrained():
    """The file of a pretrained ViT-S/14."""
    path = REPOSITORY / PLACE
    if not path.is_file():
        pytest.skip("no pretrained ViT-S/14: SWITCHLORA_PRETRAINED says where one is")
    return str(path)


@pytest.fixture
def file(tmp_path):
    """A tiny ViT for colour images, in a file."""
    torch.manual_seed(3)
    save_file(tiny_vit(in_chans=3).state_dict(), tmp_path / "tiny.safetensors")
    return str(tmp_path / "tiny.safetensors")


@pytest.fixture
def digits_file(tmp_path):
    """The model of the digits with other weights than those of seed 0, in a file."""
    torch.manual_seed(3)
    save_file(build(composed(*DIGITS).model).state_dict(), tmp_path / "digits.safetensors")
    return str(tmp_path / "digits.safetensors")


def equal(one, other, but=()):
    """Whether two models have the same tensors, except those of the modules ``but``."""
    mine, theirs = one.state_dict(), other.state_dict()
    kept = [key for key in mine if not key.startswith(tuple(but))]
    return all(torch.equal(mine[key], theirs[key]) for key in kept)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "tiny_vit_5m_224", "davit_tiny", "pvt_v2_b0", "hieradet_small"),
        *("caformer_s18", "nextvit_small", "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224"),
    ],
)
def test_a_family_builds_whether_or_not_it_takes_the_size_of_the_images(name):
    with torch.device("meta"):
        model = create_model(name, img_size=224, in_chans=1, num_classes=7)
        assert model(torch.zeros(2, 1, 224, 224)).shape == (2, 7)


def test_a_family_without_a_size_of_images_refuses_other_unknown_options():
    with torch.device("meta"), pytest.raises(ValueError, match="'resnet18' refuses.*hidden"):
        create_model("resnet18", img_size=224, hidden=3)


def test_a_pretrained_model_of_its_own_size_is_what_timm_loads(pretrained):
    options = {"img_size": 518, "num_classes": 0}
    model = create_model(VIT_S, **options)
    said = load_weights(model, pretrained)
    assert equal(model, timm.create_model(VIT_S, checkpoint_path=pretrained, **options))
    assert said == f"{pretrained}: 174 of 174 tensors"


@torch.no_grad()
def test_a_pretrained_models_features_do_not_depend_on_its_new_head(pretrained):
    images = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    bare, headed = (create_model(VIT_S, img_size=70, num_classes=n).eval() for n in (0, 10))
    drawn = headed.head.weight.clone()
    said = [load_weights(model, pretrained) for model in (bare, headed)]
    assert torch.equal(bare.forward_features(images), headed.forward_features(images))
    assert torch.equal(headed.head.weight, drawn) and "new: head.weight, head.bias" in said[1]
    positions = load_file(pretrained)["pos_embed"].float()
    resampled = resample_abs_pos_embed(positions, new_size=[5, 5])
    assert torch.allclose(headed.pos_embed, resampled)
    assert "pos_embed (1, 1370, 384) -> (1, 26, 384)" in said[1]


def test_a_file_of_the_same_model_is_loaded_with_its_head(file):
    model = tiny_vit(in_chans=3)
    load_weights(model, file)
    assert all(torch.equal(model.state_dict()[k], tensor) for k, tensor in load_file(file).items())


def test_a_training_checkpoint_of_timm_is_loaded_by_its_weights(file, tmp_path):
    path, model, other = str(tmp_path / "last.pth"), *(tiny_vit(in_chans=3) for _ in range(2))
    weights = {f"module.{key}": tensor for key, tensor in load_file(file).items()}
    torch.save({"epoch": 3, "state_dict": weights}, path)
    load_weights(model, path)
    load_weights(other, file)
    assert equal(model, other)


def test_only_a_head_of_other_classes_stays_new(file):
    model, same = tiny_vit(in_chans=3, num_classes=7), tiny_vit(in_chans=3)
    drawn = model.head.weight.clone()
    said = [load_weights(each, file) for each in (model, same)]
    assert torch.equal(model.head.weight, drawn) and said[0].endswith(
        "new: head.weight, head.bias"
    )
    assert equal(model, same, but=["head"]) and "new" not in said[1]


@torch.no_grad()
def test_a_grey_image_has_the_features_of_three_equal_channels(file, images):
    grey, colour = tiny_vit().eval(), tiny_vit(in_chans=3).eval()
    said = load_weights(grey, file)
    load_weights(colour, file)
    assert torch.allclose(grey(images), colour(images.expand(-1, 3, -1, -1)), atol=1e-5)
    assert "adapted: patch_embed.proj.weight (32, 3, 4, 4) -> (32, 1, 4, 4)" in said


def test_images_and_patches_of_another_size_are_resampled(file):
    model = tiny_vit(in_chans=3, img_size=18, patch_size=6)
    said = load_weights(model, file)
    assert "patch_embed.proj.weight" in said and "pos_embed (1, 5, 32) -> (1, 10, 32)" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": 3}, "it lacks blocks.2.norm1.weight and 11 more"),
        ({"depth": 1}, "it has besides blocks.1.* and 11 more"),
        ({"mlp_ratio": 2.0}, r"differs in blocks.0.mlp.fc1.* \(128.*, here \(64.* and 5 more"),
        ({"init_values": 1e-5}, "it lacks blocks.0.ls1.gamma"),
    ],
)
def test_another_architecture_is_refused_by_its_keys(file, options, says):
    model = tiny_vit(in_chans=3, **options)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"another model's.*{says}.*model.name"):
        load_weights(model, file)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def saved(path, found):
    torch.save(found, path)
    return str(path)


def two_sets(state):
    other = {key: tensor + 1 for key, tensor in state.items()}
    return {"state_dict": other, "state_dict_ema": state, "epoch": 3}


WRAPPINGS = {
    "a number of NumPy beside": lambda state: {"model": state, "best": np.float64(3.5)},
    "options beside": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=1e-3)},
    "prefix": lambda state: {f"model.{key}": tensor for key, tensor in state.items()},
    "two prefixes": lambda state: {f"module._orig_mod.{key}": t for key, t in state.items()},
    "two averages": two_sets,
    "student and teacher": lambda state: {
        f"{who}.{key}": tensor + (who == "student")
        for who in ("student", "teacher")
        for key, tensor in state.items()
    },
    "lightning": lambda state: {
        "state_dict": {f"net.{key}": t for key, t in state.items()}
        | {"loss.weight": torch.ones(5)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "optimizer": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": torch.ones(())}}},
    },
}
SAID = {
    "prefix": "; taken from model$",
    "two averages": "taken from state_dict_ema; left aside: state_dict.* and 31 more",
    "student and teacher": "taken from teacher; left aside: student.* and 31 more",
    "lightning": "taken from state_dict.net; left aside: state_dict.loss.weight",
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_weights_are_found_in_what_they_are_wrapped_in_and_it_is_said(kind, file, tmp_path):
    state, model = load_file(file), tiny_vit(in_chans=3)
    said = load_weights(model, saved(tmp_path / "last.pth", WRAPPINGS[kind](state)))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert f"{len(state)} of {len(state)} tensors" in said
    assert re.search(SAID.get(kind, ""), said)


@pytest.mark.parametrize("name", ["weights.bin", "weights.pth"])
def test_the_content_says_what_a_file_is_and_not_its_name(name, file, tmp_path):
    (tmp_path / name).write_bytes(Path(file).read_bytes())
    other = saved(tmp_path / "torch.safetensors", load_file(file))
    one, two = tiny_vit(in_chans=3), tiny_vit(in_chans=3)
    load_weights(one, str(tmp_path / name))
    load_weights(two, other)
    assert equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_numbers_of_any_width_are_loaded(dtype, tmp_path):
    state = {key: tensor.to(dtype) for key, tensor in tiny_vit().state_dict().items()}
    model = tiny_vit()
    load_weights(model, saved(tmp_path / "m.pth", state))
    assert all(tensor.equal(state[key].float()) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_quantised_weights_are_refused_by_name(dtype, tmp_path):
    state = dict(tiny_vit().state_dict())
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"].to(dtype)
    with pytest.raises(ValueError, match="is quantised: blocks.1.mlp.fc1.weight holds no float"):
        load_weights(tiny_vit(), saved(tmp_path / "m.pth", state))


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("by", ["init_checkpoint", "model.checkpoint_path"])
def test_no_code_in_a_file_of_weights_runs(zipped, by, tmp_path):
    path, evil = str(tmp_path / "evil.pth"), tmp_path / "made"
    content = {"state_dict": tiny_vit().state_dict(), "x": Attack(evil)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="would run code"):
        if by == "init_checkpoint":
            load_weights(tiny_vit(), path)
        else:
            create_model("test_vit", checkpoint_path=path)
    assert not evil.exists()


def as_adapter(path, model):
    targets = find_targets(model, ["attn.qkv"])
    ones = {n: Factors(torch.ones(2, 32), torch.ones(96, 2)) for n in targets}
    inject(model, targets, ones, scaling_one)
    save_merged(model, path / "model.safetensors")
    return save_adapter(model, path / "adapter")


UNREADABLE = {
    "whole module": (
        lambda p, m: saved(p / "m.pth", m),
        "would run code: it holds timm.*state_dict",
    ),
    "script": (
        lambda p, m: torch.jit.trace(m.head, torch.ones(1, 32)).save(p / "s.pt") or p / "s.pt",
        "TorchScript",
    ),
    "adapter": (
        lambda p, m: as_adapter(p, m) / "adapter_model.safetensors",
        "low-rank factors, such as .*half a model.*merged",
    ),
    "adapter folder": (as_adapter, "is a folder: an adapter.*give .*/model.safetensors$"),
    "run folder": (
        lambda p, m: as_adapter(p, m).parent,
        "is a folder: give .*/model.safetensors$",
    ),
    "residual": (
        lambda p, m: as_adapter(p, m) / "residual.safetensors",
        "is half a model.*give .*/model.safetensors$",
    ),
    "moved residual": (
        lambda p, m: (as_adapter(p, m) / "residual.safetensors").rename(p / "base.safetensors"),
        "is half a model",
    ),
    "cut": (lambda p, m: cut(saved(p / "m.pth", m.state_dict())), "damaged"),
    "cut safetensors": (
        lambda p, m: cut(as_adapter(p, m).parent / "model.safetensors"),
        "damaged",
    ),
    "empty": (lambda p, m: text(p / "m.pth", ""), "is empty"),
    "pointer": (
        lambda p, m: text(p / "m.pth", "version https://git-lfs.github.com/"),
        "git lfs pull",
    ),
    "page": (lambda p, m: text(p / "m.pth", "<!DOCTYPE html>"), "web page"),
    "no numbers": (
        lambda p, m: saved(p / "m.pth", {k: t * math.nan for k, t in m.state_dict().items()}),
        "cls_token holds numbers that are not finite",
    ),
    "no tensors": (lambda p, m: saved(p / "m.pth", {"epoch": 3}), "holds no weights"),
}


def cut(path):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    return path


def text(path, content):
    path.write_text(content)
    return path


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_the_matter_with_a_file_of_weights_is_said_in_one_line(kind, tmp_path):
    make, says = UNREADABLE[kind]
    source = str(make(tmp_path, tiny_vit()))
    with pytest.raises(
        ValueError, match=f"^init_checkpoint={re.escape(source)}.*{says}"
    ) as caught:
        load_weights(tiny_vit(), source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.pth", __file__, "hf-hub:owner/name", "pretrained"])
def test_what_cannot_be_loaded_is_said_in_one_line(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"^init_checkpoint={re.escape(source)}: ") as caught:
        load_weights(tiny_vit(), source)
    assert "\n" not in str(caught.value)


def test_a_run_needs_the_file_only_when_it_begins(digits_file, tmp_path, capsys):
    start = f"init_checkpoint={digits_file}"
    make_run(tmp_path / "begun", start, "epochs=1", "switch/criterion=never")
    assert f"starts from {digits_file}: " in capsys.readouterr().out
    Path(digits_file).unlink()
    branch = f"resume={tmp_path / 'begun'}"
    summary = make_run(tmp_path / "on", start, branch, "epochs=2", "switch/criterion=never")
    assert summary["status"] == "finished"
    assert load_model(find_all(tmp_path / "on")[0])
    with pytest.raises(ValueError, match="there is no such file"):
        make_run(tmp_path / "anew", start)


def test_other_weights_under_the_same_name_are_another_trunk(digits_file):
    config = composed(*DIGITS, f"init_checkpoint={digits_file}")
    plain = OmegaConf.to_container(config, resolve=True)

    def key():
        return trunk_key(plain, torch.device("cpu"), "data")

    before = key()
    assert key() == before
    save_file({"weight": torch.zeros(1)}, digits_file)
    assert key() != before


def test_lora_trains_factors_and_head_of_a_pretrained_model(digits_file, tmp_path):
    start = f"init_checkpoint={digits_file}"
    summary = make_run(tmp_path, "+method=lora", start, "epochs=1", "switch.rank.rank=4")
    assert summary["switch"]["num_updates"] == 0 and summary["switch"]["drift"] < 1e-5
    model, before = load_model(find_all(tmp_path)[0]), load_file(digits_file)
    moved = {k for k, t in model.state_dict().items() if k in before and not t.equal(before[k])}
    assert moved == {"head.weight", "head.bias"}
    factors = {n: p for n, p in model.named_parameters() if is_factor(n)}
    assert len(factors) == 2 * 4 * len(model.blocks) and all(
        factor.any() for factor in factors.values()
    )
    trained = sum(p.numel() for p in (*factors.values(), *model.head.parameters()))
    assert summary["phases"]["adapter"]["trainable_parameters"] == trained
    layer = model.blocks[0].mlp.fc1
    A, B = (factors[f"blocks.0.mlp.fc1.lora_{side}"] for side in "AB")
    x = torch.randn(5, layer.in_features)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x), plain + 16 / 4 * x @ A.T @ B.T, atol=1e-5)
