"""OIALR: a core between two frozen orthonormal bases, which follow it and shed small values."""

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from torch import nn

from conf_yamls import build, composed
from pretended import DEVICE, on_pretended
from runs import assert_same_but_for_memory, assert_same_run, make_run, make_run_in_parts
from switchlora.adapters import Adapter, CoreLinear, adapted_modules, core_linear
from switchlora.policy import Refresh
from switchlora.storage import find_all, load_model
from trials import Trial

CORE = (
    *("switch/adapter=core", "switch/init=weight_svd", "switch.train_factors=[B]"),
    *("switch/rank=pufferfish", "switch.rank.ratio=1"),
)
OIALR = (
    *("data.train_size=320", "full.scheduler.warmup_t=5", "monitor.window=5", "max_updates=26"),
    *("+method=oialr", "switch/criterion=at_epoch", "switch.criterion.epoch=0.5"),
    *("switch.restart.every_epochs=0.5", "switch.restart.step=0.4", "switch.restart.cutoff=0.3"),
    *("ema=0.9", "full.precision=bf16", "model.depth=2"),
)
"""a switch at update 5, a refresh every 5 updates"""


def pair_of(weight):
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return Adapter(S.sqrt()[:, None] * Vh, U * S.sqrt(), slice(0, len(weight)), 1.0)


def made(out=12, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(6, out, bias=bias)
    return linear, core_linear(linear, {"": pair_of(linear.weight.detach())})


@pytest.mark.parametrize("out, bias", [(12, True), (4, False)])
def test_it_is_u_s_v_with_orthonormal_bases_and_a_diagonal_start(out, bias):
    linear, module = made(out, bias)
    x, k = torch.randn(5, 7, 6), min(out, 6)
    assert torch.allclose(module(x), linear(x), atol=1e-5)
    assert torch.allclose(module.merged(), linear.weight, atol=1e-6)
    for basis in (module.lora_A, module.lora_U.mT):
        assert torch.allclose(basis @ basis.mT, torch.eye(k), atol=1e-5)
    assert torch.allclose(module.lora_B, torch.linalg.svdvals(linear.weight).diag(), atol=1e-5)
    assert {n for n, p in module.named_parameters() if p.requires_grad} - {"bias"} == {"lora_B"}


def test_the_core_gets_the_gradient_of_its_equation():
    _, module = made()
    x = torch.randn(5, 6)
    product = F.linear(x, module.lora_U @ module.lora_B @ module.lora_A, module.bias)
    (expected,) = torch.autograd.grad(product.square().sum(), module.lora_B)
    (found,) = torch.autograd.grad(module(x).square().sum(), module.lora_B)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_refresh_turns_the_bases_to_the_core_and_cuts_its_small_values():
    linear, module = made()
    P, Qh = (torch.linalg.qr(torch.randn(6, 6)).Q for _ in range(2))
    values = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.3, 0.1])
    with torch.no_grad():
        module.lora_B.copy_(P @ values.diag() @ Qh)
    kept = module.refreshed(cutoff=0.1)
    again = core_linear(linear, {"": Adapter(*kept, slice(0, 12), 1.0)})
    assert torch.allclose(again.lora_B, values[:4].diag(), atol=1e-5)
    turned = again.lora_U.mT @ module.lora_U @ P[:, :4]
    assert torch.allclose(turned.abs(), torch.eye(4), atol=1e-4)  # up to signs
    U, S, Vh = torch.linalg.svd(module.merged().double())
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    assert torch.allclose(again.merged().double(), best, atol=1e-5)


def test_the_nth_refresh_takes_n_tenths_of_the_layers_from_the_last():
    names = [f"layer{number}" for number in range(20)]
    how = Refresh(step=0.1)
    assert how.last(names, 1) == names[18:] and how.last(names, 3) == names[14:]
    assert how.last(names, 99) == names


def test_at_full_rank_every_target_switches_without_drift_and_trains_its_core_alone():
    trial = Trial()
    trial.policy = build(composed(*CORE).switch)
    report = trial.switch()
    assert report.drift < 1e-4 and not report.left_full
    before = {n: p.detach().clone() for n, p in trial.model.named_parameters()}
    trial.train(2)
    moved = {n for n, p in trial.model.named_parameters() if not torch.equal(p, before[n])}
    cores = {f"{name}.lora_B" for name in adapted_modules(trial.model)}
    assert cores <= moved and not any("lora_A" in name or "lora_U" in name for name in moved)


def test_a_run_cuts_last_layers_first_and_goes_on_after_stops(tmp_path, at_update):
    whole = make_run(tmp_path / "whole", *OIALR)
    switch, first, *later = whole["transitions"]
    assert switch["num_updates"] == 5 and first["num_updates"] == 10 and len(later) == 3
    names = list(switch["ranks"])
    cut = [name for name in names if first["ranks"][name] < switch["ranks"][name]]
    assert cut and set(cut) <= set(names[-4:])  # 40 % of 8
    last = later[-1]["ranks"]
    assert any(last[name] < switch["ranks"][name] for name in names[:4])
    assert first["moments_carried"] > 0 and first["trainable_after"] < first["trainable_before"]
    assert sum(phase["num_updates"] for phase in whole["phases"].values()) == whole["num_updates"]
    make_run_in_parts(tmp_path / "stopped", at_update, [5, 13], *OIALR)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    model = load_model(find_all(tmp_path / "whole")[0])
    assert isinstance(model.blocks[1].mlp.fc2, CoreLinear)


@pytest.mark.usefixtures("measured_together")
def test_on_another_device_it_is_the_run_on_the_cpu(tmp_path):
    words = (*OIALR, "full.precision=fp32", "max_updates=12", "ema=null")
    make_run(tmp_path / "here", *words)
    with on_pretended():
        make_run(tmp_path / "there", f"system.device={DEVICE}", *words)
    assert_same_but_for_memory(tmp_path / "there", tmp_path / "here")


@pytest.mark.parametrize(
    "options, says",
    [
        (("switch/restart=oialr",), "use switch/adapter=core"),
        ((*CORE, "switch.train_factors=[A,B]"), r"give switch.train_factors=\[B\]"),
        ((*CORE, "switch.split_qkv=true"), "does not go with switch.split_qkv"),
        ((*CORE, "switch/restart=relora"), "does not go with switch.restart"),
        ((*CORE, "switch.moments=factors"), "does not go with switch.moments=factors"),
    ],
)
def test_what_does_not_go_with_a_core_is_refused(options, says):
    with pytest.raises(InstantiationException, match=says):
        build(composed(*options).switch)
