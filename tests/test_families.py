"""Every family of timm: it builds, takes adapters and exports them, or is refused in words."""

import re

import pytest
import timm
import torch
from timm.models import list_modules
from torch import nn

from switchlora.adapters import (
    DEFAULT_TARGETS,
    Factors,
    adapted_modules,
    check_adapters_work,
    coverage_line,
    find_targets,
    inject,
    scaling_one,
)
from switchlora.models import create_model
from switchlora.run.messages import export_lines
from switchlora.storage import merged_for_peft, save_adapter, save_merged

FLAT = {"depth": 1, "embed_dim": 32, "num_heads": 2}
STAGES = {"depths": (1, 1, 1, 1), "embed_dim": 16}
HEADED = {**STAGES, "num_heads": (1, 1, 2, 2)}
THREE = {"depths": (1, 1, 1), "embed_dims": (16, 32, 48), "num_heads": (1, 1, 1)}
HIERA = {"stages": (1, 1, 1, 1), "embed_dim": 16, "num_heads": 1}
SMALL = {
    "beit": ("beit_base_patch16_224", FLAT, 32),
    "cait": ("cait_xxs24_224", FLAT, 32),
    "coat": ("coat_tiny", {}, 32),
    "convit": ("convit_tiny", FLAT, 32),
    "convnext": ("test_convnext", {}, 64),
    "crossvit": ("crossvit_tiny_240", {}, 240),
    "davit": ("davit_tiny", THREE, 64),
    "deit": ("deit_tiny_distilled_patch16_224", FLAT, 32),
    "edgenext": ("edgenext_xx_small", {}, 64),
    "eva": ("eva02_tiny_patch14_224", FLAT, 28),
    "hiera": ("hiera_tiny_224", HIERA, 224),
    "levit": ("levit_128s", {}, 224),
    "mlp_mixer": ("gmlp_ti16_224", {}, 32),
    "mobilevit": ("mobilevit_xxs", {}, 64),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", FLAT, 32),
    "pit": ("pit_ti_224", {}, 224),
    "pvt_v2": ("pvt_v2_b0", THREE, 64),
    "qwen3_vit": ("qwen3_vit_88m", FLAT, 32),
    "sequencer": ("sequencer2d_s", {"layers": (1, 1, 1, 1)}, 64),
    "swin_transformer": ("swin_tiny_patch4_window7_224", STAGES, 224),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", HEADED, 256),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", HEADED, 224),
    "tiny_vit": ("tiny_vit_5m_224", THREE, 224),
    "tnt": ("tnt_s_legacy_patch16_224", {"depth": 1}, 32),
    "twins": ("twins_svt_small", THREE, 64),
    "vision_transformer": ("test_vit", FLAT, 32),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", FLAT, 32),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", FLAT, 32),
    "vision_transformer_sam": ("samvit_base_patch16_224", FLAT, 64),
    "vitamin": ("vitamin_small_224", {"depth": 1}, 64),
    "xcit": ("xcit_nano_12_p16_224", FLAT, 32),
}
"""a model of the family, options that make it tiny, and the size of its images"""


SIZES = ("test", "atto", "femto", "pico", "nano", "xxs", "tiny", "small", "_t", "_s")
"""what names say of models, from small to large"""


def smallest_names():
    """A small model of each of timm's modules that is not in ``SMALL``."""
    found = {}
    for family in list_modules():
        names = timm.list_models(module=family)
        if family not in SMALL and names:
            found[family] = min(names, key=size_of)
    return found


def size_of(name):
    """Sorts models by what their names say of their size."""
    told = [size for size, word in enumerate(SIZES) if word in name]
    return (*told, len(SIZES))[0], len(name), name


def targets_of(model):
    """The default targets that the model has, else all of its linears."""
    found = {}
    for pattern in (*DEFAULT_TARGETS, r".*"):
        try:
            if not found or pattern != r".*":
                found |= find_targets(model, [pattern])
        except ValueError as error:
            assert "linears of this model" in str(error)
    return found


def fresh(name, options, file):
    """The model of timm, as others build it, with the weights of a file."""
    return timm.create_model(name, num_classes=5, checkpoint_path=str(file), **options).eval()


def built(family):
    name, options, size = SMALL[family]
    torch.manual_seed(0)
    sized = {**options, "img_size": size}
    model = create_model(name, num_classes=5, **sized).eval()
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:  # layer scales would hide what is behind them
            nn.init.uniform_(parameter)
    try:
        timm.create_model(name, num_classes=5, **sized)
    except TypeError:
        sized = options
    return model, torch.randn(2, 3, size, size), name, sized


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_a_family_switches_and_its_exports_compute_the_same(family, tmp_path):
    from peft import PeftModel

    model, images, name, options = built(family)
    targets = targets_of(model)
    check_adapters_work(model, targets.values(), images)
    before = model(images)
    factors = {}
    for target in targets.values():
        weight = target.weight(model)
        A = torch.randn(2, weight.shape[1]) / weight.shape[1] ** 0.5
        factors[target.name] = Factors(A, 5 * torch.randn(len(weight), 2) * weight.std())
    inject(model, targets, factors, scaling_one)
    near = {"rtol": 0, "atol": 5e-5 * float(before.abs().max())}
    torch.testing.assert_close(model(images), before, **near)
    for module in {target.module for target in targets.values()}:
        B = model.get_submodule(module).lora_B
        B.mul_(-1)
    logits = model(images)
    assert (logits - before).abs().max() > 20 * near["atol"]

    plain = fresh(name, options, save_merged(model, tmp_path / "model.safetensors"))
    torch.testing.assert_close(plain(images), logits, **near)
    folder = save_adapter(model, tmp_path / "adapter")
    base = fresh(name, options, folder / "residual.safetensors")
    torch.testing.assert_close(PeftModel.from_pretrained(base, folder)(images), logits, **near)


@pytest.mark.parametrize("family", ["beit", "eva"])
def test_what_timm_reads_directly_is_merged_for_peft_and_it_is_said(family):
    model, *_ = built(family)
    targets = targets_of(model)
    factors = {}
    for target in targets.values():
        out, inner = target.weight(model).shape
        factors[target.name] = Factors(torch.ones(1, inner), torch.zeros(out, 1))
    inject(model, targets, factors, scaling_one)
    merged = merged_for_peft(model)
    assert merged == ["blocks.0.attn.qkv"] and len(adapted_modules(model)) > 1
    (line,) = export_lines(merged)
    assert line.startswith("adapter/: 1 linear(s), such as blocks.0.attn.qkv, are merged")
    assert not export_lines([])


@pytest.mark.parametrize("family,name", smallest_names().items())
def test_another_family_builds_and_its_targets_are_found_or_its_linears_are_told(family, name):
    with torch.device("meta"):
        model = create_model(name, num_classes=5)
    try:
        targets = find_targets(model, DEFAULT_TARGETS)
    except ValueError as error:
        assert re.search("matches no linear layer; .*linears of this model: .", str(error))
        return
    assert re.match(r"targets: \d+\.\d% of the weights", coverage_line(model, targets.values()))
