"""Row slices of a fused linear that switch one after the other: q now, k and v still in full."""

import copy
import dataclasses
import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import tiny_vit
from runs import assert_same_run, make_run
from switchlora.adapters import (
    SlicedLoRALinear,
    adapted_modules,
    adapter_layout,
    inject_empty,
    merged_state_dict,
    plain_shapes,
)
from switchlora.criteria import Verdict
from switchlora.errors import SwitchFailed
from switchlora.learner import WeightEMA, load_moments, moments_of
from switchlora.policy import Stages
from switchlora.storage import (
    PEFT_PREFIX,
    find_all,
    load_model,
    save_adapter,
    save_merged,
    updates_of,
)
from switchlora.switching import with_frozen_front
from test_transitions import Trial, weights

QKV = "blocks.0.attn.qkv"
MASKS = ["q", "k", "v", "qk", "qv", "kv"]
STAGES = ("switch.split_qkv=true", "switch/stages=by_margin", "adapter.clip_grad=null")


@cache
def full_phase(*overrides):
    return Trial(*STAGES, *overrides)


def trained(*overrides):
    """A trial of its own after the full phase."""
    return copy.deepcopy(full_phase(*overrides))


def staged(chosen, *overrides):
    """A trial after its first stage, of these slices of one qkv."""
    trial = trained(*overrides)
    return trial, stage(trial, chosen)


def stage(trial, chosen):
    report = trial.switch([f"{QKV}.{part}" for part in chosen])
    trial.monitor.watch(report.waiting, trial.done)
    return report


def fused(model):
    return model.get_submodule(QKV)


def named_moments(trial):
    return moments_of(trial.model, trial.learner.optimizer)


@pytest.mark.parametrize("mask", MASKS)
def test_any_slices_switch_and_the_others_train_in_full_until_their_stage(mask):
    trial, report = staged(mask)
    module, rest = fused(trial.model), set("qkv") - set(mask)
    assert isinstance(module, SlicedLoRALinear) and set(module.dense) == rest
    assert report.drift <= 1e-5 and not module.weight.requires_grad
    assert report.parameters == sum(p.numel() for p in tiny_vit().parameters())
    before, frozen = weights(trial), module.weight.detach().clone()
    trial.train(2)
    moved = weights(trial)
    assert all(not torch.equal(moved[f"{QKV}.{part}"], before[f"{QKV}.{part}"]) for part in "qkv")
    assert torch.equal(module.weight, frozen)
    trial.history = [trial.monitor.measure(trial.done, 2.0)]
    factors = {p: (module.lora_A[p].clone(), module.lora_B[p].clone()) for p in mask}
    state = {n: s["exp_avg"].clone() for n, s in named_moments(trial).items()}
    assert stage(trial, rest).drift <= 1e-5
    module = fused(trial.model)
    assert not module.dense and len(module.weight) == module.out_features
    for part, (A, B) in factors.items():
        assert torch.equal(module.lora_A[part], A) and torch.equal(module.lora_B[part], B)
        name = f"{QKV}.lora_B.{part}"
        assert torch.equal(named_moments(trial)[name]["exp_avg"], state[name])
    trial.train(2)


@pytest.mark.parametrize("mask", MASKS)
def test_a_dense_slice_gets_the_gradient_and_the_step_of_its_rows_of_the_fused_weight(mask):
    plain, (trial, _) = trained(), staged(mask)
    old = plain.learner
    plain.learner = plain.rebuild(plain.model)
    load_moments(plain.model, plain.learner.optimizer, moments_of(plain.model, old.optimizer))
    for one in (plain, trial):
        one.train(1)
    for part in set("qkv") - set(mask):
        target = trial.monitor.known[f"{QKV}.{part}"]
        for read in (target.grad, target.weight):
            assert torch.allclose(read(trial.model), read(plain.model), atol=1e-6)
        gradient = target.grad(trial.model)
        assert gradient.any() and gradient.untyped_storage().nbytes() == gradient.nbytes


def test_moments_go_to_the_dense_slices_by_rows_and_counters_are_copied():
    trial = trained()
    before = copy.deepcopy(dict(named_moments(trial)[f"{QKV}.weight"]))
    size = fused(trial.model).out_features // 3
    stage(trial, "q")
    after = named_moments(trial)
    for i, part in ((1, "k"), (2, "v")):
        state = after[f"{QKV}.dense.{part}"]
        assert state["step"] == before["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], before[key][i * size : (i + 1) * size])
    states = [after[f"{QKV}.dense.{part}"]["step"] for part in "kv"]
    assert states[0] is not states[1], "each is counted on by its own steps"


def test_factor_moments_are_projected_from_those_of_the_slice_whenever_it_switches():
    trial, _ = staged("q", "switch.moments=factors", "switch/init=update_svd")
    assert f"{QKV}.lora_A.q" in named_moments(trial)
    trial.train(2)
    own = {n: copy.deepcopy(dict(s)) for n, s in named_moments(trial).items() if QKV in n}
    trial.history = [trial.monitor.measure(trial.done, 2.0)]
    stage(trial, "v")
    adapter = fused(trial.model).adapters()["v"]
    after = named_moments(trial)
    expected = adapter.scaling * adapter.B.mT @ own[f"{QKV}.dense.v"]["exp_avg"]
    assert torch.allclose(after[f"{QKV}.lora_A.v"]["exp_avg"], expected)
    for name in (f"{QKV}.lora_B.q", f"{QKV}.dense.k"):
        assert torch.equal(after[name]["exp_avg"], own[name]["exp_avg"])


def test_a_model_of_dense_and_adapted_slices_is_rebuilt_from_its_layout():
    trial, _ = staged("k", "switch.residual_dtype=bf16", "switch/init=update_svd")
    trial.train(1)
    layout = json.loads(json.dumps(adapter_layout(trial.model)))
    again = tiny_vit()
    shapes = {name: tuple(tensor.shape) for name, tensor in again.state_dict().items()}
    assert plain_shapes(trial.model) == shapes
    inject_empty(again, layout)
    again.load_state_dict(trial.model.state_dict(), strict=True)
    module = fused(again)
    assert module.weight.dtype == torch.bfloat16 and module.dense["q"].dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(again.eval()(trial.probe), trial.logits())


def test_the_residual_weight_of_a_slice_is_rounded_once_in_all_stages():
    trial, _ = staged("k", "switch.residual_dtype=bf16", "switch/init=update_svd")
    rounded = fused(trial.model).weight.clone()
    trial.train(2)
    trial.history = [trial.monitor.measure(trial.done, 2.0)]
    stage(trial, "q")
    assert torch.equal(fused(trial.model).weight[len(rounded) :], rounded)


def test_exports_are_the_plain_model_and_peft_adapters_on_its_residual(tmp_path):
    trial, _ = staged("qv")
    trial.train(2)
    logits, plain = trial.logits(), tiny_vit().eval()
    plain.load_state_dict(load_file(save_merged(trial.model, tmp_path / "model.safetensors")))
    assert torch.allclose(plain(trial.probe), logits, atol=1e-5)
    folder = save_adapter(trial.model, tmp_path / "adapter")
    plain.load_state_dict(load_file(folder / "residual.safetensors"))
    factors = load_file(folder / "adapter_model.safetensors")
    A, B = (factors[f"{PEFT_PREFIX}{QKV}.lora_{factor}.weight"] for factor in "AB")
    with torch.no_grad():
        fused(plain).weight += B @ A
    assert torch.allclose(plain(trial.probe), logits, atol=1e-5)


def test_an_export_has_no_adapter_where_slices_are_frozen_or_dense_alone(tmp_path):
    trial = trained(rf"switch.freeze=['{QKV}\.k$']")
    trial.switch([f"{QKV}.k", "blocks.0.mlp.fc1"])
    folder = save_adapter(trial.model, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["blocks.0.mlp.fc1"]
    tiny_vit().load_state_dict(load_file(folder / "residual.safetensors"), strict=True)


def test_the_average_of_the_weights_goes_on_through_the_stages():
    trial = trained()
    ema = WeightEMA(trial.model, 0.9)
    before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    stage(trial, "v")
    trial.train(2)
    ema.update(trial.model)
    for name, weight in merged_state_dict(trial.model).items():
        assert torch.allclose(ema.state_dict()[name], before[name].lerp(weight, 0.1), atol=1e-6)


def test_a_stage_that_fails_leaves_the_slices_as_they_were(monkeypatch):
    trial, _ = staged("q")
    trial.train(2)
    trial.history = [trial.monitor.measure(trial.done, 2.0)]
    state, flags, old = copy.deepcopy(trial.model.state_dict()), trial.trained_now(), trial.learner

    def failing(model):
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patched, pytest.raises(SwitchFailed, match="no memory left"):
        patched.setattr(trial, "rebuild", failing)
        stage(trial, "kv")
    assert trial.learner is old and trial.trained_now() == flags
    assert all(torch.equal(t, state[n]) for n, t in trial.model.state_dict().items())
    trial.train(1)


def test_growing_leaves_dense_slices_alone_and_all_are_taken_back():
    trial, _ = staged("q")
    trial.train(2)
    logits = trial.logits()
    gradients = {f"{QKV}.{p}": torch.randn(32, 32) for p in "qkv"}
    assert trial.grow(gradients).ranks == {f"{QKV}.q": 4} and set(fused(trial.model).dense) == {
        "k",
        "v",
    }
    assert torch.allclose(trial.logits(), logits, atol=1e-5)
    trial.train(1)
    before, logits = weights(trial), trial.logits()
    assert trial.take_back().drift <= 1e-5 and not adapted_modules(trial.model)
    assert trial.trained_now() == set(trial.trained)
    assert all(torch.allclose(w, before[n], atol=1e-6) for n, w in weights(trial).items())
    trial.train(1)


def test_a_slice_whose_rank_saves_nothing_trains_on_after_the_last_stage():
    trial, _ = staged("q")
    trial.train(2)
    trial.history = [trial.monitor.measure(trial.done, 2.0)]
    names = list(trial.monitor.targets)
    rank = {name: 40 if name == f"{QKV}.k" else 2 for name in names}
    trial.policy = dataclasses.replace(trial.policy, rank=lambda _: rank, keep=["head"])
    report = trial.switch(names)
    assert report.left_full == [f"{QKV}.k"] and not report.waiting
    dense = {name for name in trial.trained_now() if ".dense." in name}
    assert dense == {f"{QKV}.dense.k"}
    assert "norm.weight" not in trial.trained_now()
    trial.train(1)


def test_a_slice_that_is_frozen_outright_waits_for_no_other():
    trial, report = staged("k", rf"switch.freeze=['{QKV}\.k$']")
    assert report.ranks == {f"{QKV}.k": 0} and report.drift <= 1e-6
    before = weights(trial)
    trial.train(2)
    still = {n for n, weight in weights(trial).items() if torch.equal(weight, before[n])}
    assert still == {f"{QKV}.k"}
    trial.history = [trial.monitor.measure(trial.done, 2.0)]
    stage(trial, "qv")
    trial.train(1)
    assert torch.equal(weights(trial)[f"{QKV}.k"], before[f"{QKV}.k"])


def test_a_front_that_stands_still_ends_before_a_linear_with_slices_that_train():
    trial = trained()
    waiting = trial.switch(["blocks.1.attn.qkv.q"]).waiting
    policy = dataclasses.replace(trial.policy, stages=Stages(interval=0, still=0.5))
    known, margins = trial.monitor.known, dict.fromkeys(waiting, 1.0)
    policy = with_frozen_front(trial.model, policy, known, margins, waiting, trial.probe)
    frozen = {pattern.replace("\\", "").strip("^$") for pattern in policy.freeze}
    assert {"blocks.0.attn.qkv.weight", "blocks.1.norm1.weight"} <= frozen
    assert not any("blocks.1.attn" in name for name in frozen)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_computes_the_merged_weight_in_every_mode_and_compiles(dropout):
    trial, _ = staged("qv", f"switch.dropout={dropout}")
    module, x = fused(trial.model).eval(), torch.randn(4, 32)
    expected = nn.functional.linear(x, module.merged(), module.bias)
    assert torch.allclose(module(x), expected, atol=1e-5)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(module(x).float(), expected, atol=0.05)
    module.train()(x).sum().backward()
    assert module.dense["k"].grad.shape == (32, 32) and module.weight.grad is None


def test_a_slice_that_switches_trains_its_factors_instead_of_its_rows_alone():
    trial, report = staged("v")
    rank, size = 2, 32
    assert report.trainable_before - report.trainable_after == size * size - rank * size
    targets = trial.monitor.known
    assert not targets[f"{QKV}.v"].is_dense(trial.model)
    assert all(target.is_dense(trial.model) for n, target in targets.items() if n != f"{QKV}.v")


def one_by_one(history):
    """A criterion that lets q go at update 4 and v at 8, and keeps everything else."""
    done = history[-1].num_updates if history else 0
    margins = {f"{QKV}.q": done - 4.0, f"{QKV}.v": done - 8.0}
    return Verdict(False, margins, "each slice has its day")


def test_a_run_switches_slices_in_stages_and_resumes_bit_equal_between_them(tmp_path):
    options = (
        *STAGES,
        *("switch/criterion=never", "switch.criterion.path=test_slices.one_by_one"),
        *("switch.stages.interval=1", "switch/rank=fixed", "switch.rank.rank=4"),
        *("switch.moments=factors", "switch.targets=[attn.qkv]", "checkpoint.keep=9"),
        "checkpoint.every_updates=2",
        *("ema=0.9", "model.depth=1", "epochs=1", "max_updates=12", "monitor.window=4"),
    )
    summary = make_run(tmp_path / "whole", *options)
    stages = [(t["num_updates"], list(t["ranks"])) for t in summary["transitions"]]
    assert stages == [(4, [f"{QKV}.q"]), (8, [f"{QKV}.v"])]
    between = next(p for p in find_all(tmp_path / "whole") if updates_of(p) == 6)
    assert set(fused(load_model(between)).dense) == {"k", "v"}
    make_run(tmp_path / "branch", *options, f"resume={between}")
    assert_same_run(tmp_path / "whole", tmp_path / "branch")
