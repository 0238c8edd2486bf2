"""What factors gain in time, on shapes where the answer is known."""

import copy

import pytest
import torch
from torch import nn

from switchlora.adapters import factorized_linear, find_targets
from switchlora.cost import measured_gains, timing as gain


def gains_of(model, ranks, inputs, precision="fp32"):
    return measured_gains(model, find_targets(model, list(ranks)), ranks, inputs, precision)


def retried(claim, times=4):
    """Whether a claim about times holds once: other work on the machine may break it."""
    return any(claim() for _ in range(times))


def test_a_small_rank_of_a_wide_linear_gains_and_a_rank_near_full_does_not():
    model, x = nn.Sequential(nn.Linear(1024, 1024)), torch.randn(256, 1024)
    assert retried(lambda: gains_of(model, {"0": 16}, x)["0"] > 1.5)
    assert retried(lambda: gains_of(model, {"0": 1000}, x)["0"] < 1.2)


def test_each_target_is_timed_on_the_shape_that_its_module_gets_and_alike_ones_once(
    vit, images, monkeypatch
):
    timed = []

    def noted(x, device, *shape):
        timed.append((tuple(x.shape), *shape))
        return float(len(timed))

    monkeypatch.setattr(gain, "_gain", noted)
    ranks = {f"blocks.{i}.mlp.{fc}": 4 for i in (0, 1) for fc in ("fc1", "fc2")}
    found = gains_of(vit, ranks, images)
    assert found == {n: 1.0 if n.endswith("fc1") else 2.0 for n in ranks}
    tokens = (8, 5)  # four patches and the class token
    assert timed == [
        ((*tokens, 32), 128, 4, True, "fp32", factorized_linear),
        ((*tokens, 128), 32, 4, True, "fp32", factorized_linear),
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measuring_changes_neither_the_model_nor_the_generator(vit, images, precision):
    vit.train()
    before, random = copy.deepcopy(vit.state_dict()), torch.get_rng_state()
    ranks = {"blocks.0.attn.qkv": 2}
    assert gains_of(vit, ranks, images, precision)["blocks.0.attn.qkv"] > 0
    assert torch.equal(random, torch.get_rng_state()) and vit.training
    assert all(torch.equal(before[n], tensor) for n, tensor in vit.state_dict().items())
    assert all(p.grad is None for p in vit.parameters())
    assert not any(module._forward_pre_hooks for module in vit.modules())
