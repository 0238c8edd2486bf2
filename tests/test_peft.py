"""Adapters that PEFT wrote, on our models: PEFT's own logits, or one line on what they are."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft")

from conf_yamls import composed  # noqa: E402
from runs import SHORT  # noqa: E402
from switchlora.adapters import adapted_modules, merge  # noqa: E402
from switchlora.config import as_plain, build  # noqa: E402
from switchlora.run import prepare  # noqa: E402
from switchlora.storage import (  # noqa: E402
    code_digest,
    load_adapter,
    load_saved,
    save_adapter,
    save_merged,
)
from switchlora.storage.hub import hub_config  # noqa: E402

CONFIG = composed(*SHORT, "model.depth=2", "log=quiet")
SETTINGS = {"r": 3, "lora_alpha": 7, "target_modules": ["qkv", "fc1"]}


def plain():
    torch.manual_seed(3)
    return build(CONFIG.model).eval()


@pytest.fixture
def images():
    data = CONFIG.data
    return torch.randn(4, data.in_chans, data.image_size, data.image_size)


def written(folder, **settings):
    """A model of PEFT whose adapter is in ``folder``; all that it trains has moved."""
    torch.manual_seed(4)
    model = peft.get_peft_model(plain(), peft.LoraConfig(**{**SETTINGS, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.3},
        {"rank_pattern": {"blocks.1.mlp.fc1": 5, "qkv": 2}, "alpha_pattern": {"0.attn.qkv": 11}},
        {"use_rslora": True, "rank_pattern": {"qkv": 6}, "alpha_pattern": {"^blocks.0.+fc1": 2}},
        {"modules_to_save": ["head", "norm"]},
        {"bias": "lora_only"},
        {"bias": "all", "target_modules": "all-linear", "init_lora_weights": "gaussian"},
    ],
)
@torch.no_grad()
def test_an_adapter_of_peft_gives_its_logits_and_merged_too(settings, images, tmp_path):
    theirs = written(tmp_path, **settings)(images)
    assert not torch.allclose(plain()(images), theirs, atol=1e-2)
    model = load_adapter(plain(), tmp_path).eval()
    near = 1e-5 * max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(model(images), theirs, rtol=0, atol=near)
    assert all(
        parameter.requires_grad
        for module in adapted_modules(model).values()
        for name, parameter in module.named_parameters()
        if "lora_" in name
    )
    merge(model)
    torch.testing.assert_close(model(images), theirs, rtol=0, atol=near)


@torch.no_grad()
def test_an_adapter_goes_from_peft_through_our_files_back_to_peft(images, tmp_path):
    wanted = written(tmp_path / "theirs", rank_pattern={"qkv": 5})(images)
    save_adapter(load_adapter(plain(), tmp_path / "theirs"), tmp_path / "ours")
    torch.manual_seed(9)
    other = build(CONFIG.model).eval()
    again = load_adapter(copy.deepcopy(other), tmp_path / "ours").eval()
    torch.testing.assert_close(again(images), wanted, rtol=1e-5, atol=1e-5)
    other.load_state_dict(load_file(tmp_path / "ours/residual.safetensors"))
    back = peft.PeftModel.from_pretrained(other, str(tmp_path / "ours")).eval()
    torch.testing.assert_close(back(images), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_run_starts_from_an_adapter_merged_into_its_weights(images, tmp_path, capsys):
    base = str(save_merged(plain(), tmp_path / "base.safetensors"))
    wanted = written(tmp_path / "theirs", modules_to_save=["head"])(images)
    start = [f"init_checkpoint={base}", f"init_adapter={tmp_path}/theirs"]
    run = prepare(composed(*SHORT, "model.depth=2", "log=quiet", *start), tmp_path / "run")
    torch.testing.assert_close(run.model.eval()(images), wanted, rtol=0, atol=1e-4)
    assert not adapted_modules(run.model)
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    assert "adapters of 4 linears, merged" in capsys.readouterr().out
    save_adapter(load_adapter(plain(), tmp_path / "theirs"), tmp_path / "ours")
    own = f"init_adapter={tmp_path}/ours"
    run = prepare(composed(*SHORT, "model.depth=2", "log=quiet", own), tmp_path / "own")
    torch.testing.assert_close(run.model.eval()(images), wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="has its own base model.*leave init_checkpoint out"):
        prepare(composed(*SHORT, "model.depth=2", "log=quiet", start[0], own), tmp_path / "both")


@torch.no_grad()
def test_an_adapter_of_peft_beside_its_base_is_a_saved_model(images, tmp_path):
    wanted = written(tmp_path, use_rslora=True)(images)
    save_merged(plain(), tmp_path / "residual.safetensors")
    described = hub_config(plain(), as_plain(CONFIG), ())
    (tmp_path / "config.json").write_text(json.dumps(described))
    saved = load_saved(tmp_path)
    assert not adapted_modules(saved.model)
    torch.testing.assert_close(saved.model(images), wanted, rtol=0, atol=1e-4)


def test_another_adapter_under_the_same_name_is_another_code(tmp_path):
    digests = set()
    for rank in (2, 3):
        written(tmp_path, r=rank)
        digests.add(code_digest({"init_adapter": str(tmp_path)}))
    assert len(digests) == 2


REFUSED = {
    "dora": ({"use_dora": True}, "adapter_config.json: use_dora is True, which is more than LoRA"),
    "bias of the factor": ({"lora_bias": True}, "lora_bias is True"),
    "other base": (
        {"init_lora_weights": "pissa"},
        "init_lora_weights is pissa, so its base is no",
    ),
    "convolution": ({"target_modules": ["patch_embed.proj"]}, "is a Conv2d: an adapter goes on"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_lora_on_linears_is_refused_in_a_line(kind, tmp_path):
    settings, says = REFUSED[kind]
    written(tmp_path, **settings)
    assert_refused(tmp_path, says)


def assert_refused(folder, says):
    model, before = plain(), plain().state_dict()
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}[^\n]*{says}[^\n]*$"):
        load_adapter(model, folder)
    assert not adapted_modules(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_another_method_of_peft_is_refused_in_a_line(tmp_path):
    settings = peft.LoHaConfig(r=2, target_modules=["qkv"])
    peft.get_peft_model(plain(), settings).save_pretrained(tmp_path)
    assert_refused(tmp_path, "peft_type is LOHA: only LORA is read")


WRONG = {
    "other names": (lambda key: key.replace("blocks", "layers"), None, "there is no layers.0"),
    "other shape": (None, lambda tensor: tensor[..., :-1], "has factors"),
    "unknown": (lambda key: f"{key}.magnitude", None, "has no pair of factors"),
    "half": (lambda key: key.replace("lora_B", "lora_X"), None, "has no pair of factors for bl"),
    "no numbers": (None, lambda tensor: tensor * torch.nan, "numbers that are not finite"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_adapter_of_another_model_or_a_damaged_one_is_told_in_a_line(kind, tmp_path):
    rename, change, says = WRONG[kind]
    written(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    changed = {}
    for key, tensor in load_file(path).items():
        name = rename(key) if rename else key
        changed[name] = (change(tensor) if change else tensor).contiguous()
    save_file(changed, path)
    assert_refused(tmp_path, says)


def test_what_is_missing_or_unknown_beside_the_factors_is_told_in_a_line(tmp_path):
    assert_refused(tmp_path, "adapter_config.json cannot be read: No such file")
    written(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    factors = load_file(path)
    save_file({**factors, "base_model.model.pooler": torch.ones(2)}, path)
    assert_refused(tmp_path, "pooler is no factor of LoRA, and no weight of this model")
    save_file({**factors, "base_model.model.norm.bias": torch.ones(2)}, path)
    assert_refused(tmp_path, "norm.bias is .* there and")
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_newer": [1]}))
    assert_refused(tmp_path, "use_newer is .1., which is more than LoRA")
    path.unlink()
    settings.write_text(json.dumps({"peft_type": "LORA"}))
    assert_refused(tmp_path, "adapter_model.bin is missing")


def test_a_model_with_adapters_gets_no_second_one(tmp_path):
    written(tmp_path)
    model = load_adapter(plain(), tmp_path)
    with pytest.raises(ValueError, match="an adapter goes on a plain nn.Linear alone"):
        load_adapter(model, tmp_path)


def test_the_factors_train_in_a_plain_loop(images, tmp_path):
    written(tmp_path)
    model = load_adapter(plain(), tmp_path).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    optimizer.step()
    for name, factor in before.items():
        assert not torch.equal(model.get_parameter(name), factor), name
