"""The recipes of published systems, where their authors' code decides: numbers, rates, ramps."""

import pytest
import torch

from conf_yamls import build, composed
from runs import BY_DATE, assert_same_run, make_run, make_run_in_parts
from switchlora.adapters import (
    Factors,
    SlicedLowRankLinear,
    find_targets,
    inject,
    scaling_one,
)
from switchlora.learner import build_optimizer
from switchlora.names import family
from switchlora.storage import find_all, load_model, read_events


def recipe_of(method, *words):
    return composed(f"+method={method}", "data=digits", "model=digits", *words)


def test_lora_and_rslora_have_one_alpha():
    alphas = [recipe_of(method).switch.scaling.alpha for method in ("lora", "rslora")]
    assert alphas == [16, 16]


def test_prelora_tests_three_families_of_a_fused_qkv_in_windows_of_its_own_yaml():
    config = composed("+method=prelora", "experiments=systems")
    assert config.monitor.window == "epoch"
    policy = build(config.switch)
    assert (policy.criterion.tau, policy.criterion.zeta) == (1.0, 5.0)
    targets = find_targets(build(config.model), policy.targets, policy.split_qkv)
    families = {family(name) for name in targets}
    assert {f"attn.qkv.{part}" for part in "qkv"} < families and len(families) == 6


def rates_of(config, model):
    """The learning rates of all that trains in the adapter phase."""
    recipe = build(config.adapter)
    groups = build_optimizer(model, recipe).param_groups
    lr = config.full.optimizer.lr
    return {recipe.lr_scale * group["lr_scale"] * lr for group in groups}


@pytest.mark.parametrize("method, times", [("cuttlefish", 0.667), ("relora", 2.0)])
def test_the_rate_after_the_switch_is_another_for_everything_that_trains(method, times, vit):
    targets = find_targets(vit, [r"attn\.qkv"])
    factors = {n: Factors(torch.randn(2, 32), torch.randn(96, 2)) for n in targets}
    inject(vit, targets, factors, scaling_one)
    config = recipe_of(method)
    (rate,) = rates_of(config, vit)
    assert rate == pytest.approx(times * config.full.optimizer.lr)


def test_cuttlefish_decays_its_factors_as_adamw_decays_weights_and_keeps_frobenius_decay():
    config = recipe_of("cuttlefish")
    assert config.adapter.factor_weight_decay == config.full.weight_decay == 0.05
    assert build(config.adapter).frobenius_decay == 0
    words = ("adapter.factor_weight_decay=0", "adapter.frobenius_decay=1e-4")
    assert build(recipe_of("cuttlefish", *words).adapter).frobenius_decay == 1e-4


TEN = ("data.train_size=320", "full.scheduler.warmup_t=5", "monitor.window=5")
"""10 updates an epoch"""
RELORA = (
    *("+method=relora", "switch.criterion.epoch=0.5", "switch.restart.every_epochs=0.6"),
    *("switch.restart.rewarmup_updates=3", "switch.rank.rank=2", "max_updates=20"),
)


def test_relora_has_a_fresh_optimizer_and_a_ramp_at_the_switch_and_another_at_a_restart(
    tmp_path, at_update
):
    words = (*TEN, *RELORA, "full.scheduler.lr_min=1e-3", "full.precision=bf16")
    whole = make_run(tmp_path / "whole", *words)
    switch, first, *_ = whole["transitions"]
    assert (switch["kind"], switch["moments_carried"]) == ("switch", 0)
    assert first["kind"] == "restart" and first["moments_carried"] > 0
    rates = [event["train/lr"] for event in read_events(tmp_path / "whole", "train")]
    for change, ramp in ((switch, 5), (first, 3)):
        start = change["num_updates"]
        expected = [2e-3 * min(1, (n + 1) / ramp) for n in range(6)]
        assert rates[start : start + 6] == pytest.approx(expected)
    in_the_ramp = first["num_updates"] + 1
    make_run_in_parts(tmp_path / "stopped", at_update, [in_the_ramp], *words)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_relora_scales_its_adapter_by_a_quarter_and_drops_a_tenth_of_its_inputs():
    policy = build(recipe_of("relora").switch)
    assert policy.scaling(policy.rank.rank) == 32 / 128 and policy.dropout == 0.1


def test_pufferfishs_run_has_factors_of_q_k_and_v_stops_resumes_and_loads(tmp_path, at_update):
    words = (
        *TEN,
        "+method=pufferfish",
        "model.depth=2",
        "switch.criterion.epoch=1",
        "max_updates=16",
        "ema=0.9",
    )
    make_run(tmp_path / "whole", *words)
    make_run_in_parts(tmp_path / "stopped", at_update, [10, 13], *words)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    model = load_model(find_all(tmp_path / "whole")[0])
    assert isinstance(model.blocks[1].attn.qkv, SlicedLowRankLinear)


@pytest.mark.parametrize(
    "words,said",
    [
        (["+full.optimizer.foo=1", "+adapter.optimizer.foo=1"], "full.optimizer: .*foo"),
        (["+adapter.optimizer.foo=1"], "adapter.optimizer: .*foo"),
        (["+full.scheduler.foo=1", "+adapter.scheduler.foo=1"], "full.scheduler: .*foo"),
        (["+adapter.scheduler.foo=1"], "adapter.scheduler: .*foo"),
        (["adapter.compile={mood: default}"], "adapter.compile is .*mood"),
        (["adapter.compile=graphs"], "adapter.compile=graphs is for NVIDIA's GPUs"),
    ],
)
def test_an_option_that_is_refused_is_told_by_its_key_before_the_first_update(
    words, said, tmp_path
):
    with pytest.raises(ValueError, match=f"^{said}"):
        make_run(tmp_path, *BY_DATE, *words)
    assert not (tmp_path / "metrics.jsonl").exists()
