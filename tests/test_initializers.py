"""Every initializer of conf/switch/init: factors that train and leave the function alone."""

import pytest
import scipy.linalg
import torch

from conf_yamls import build_yaml, names
from conftest import tiny_vit
from switchlora.adapters import alpha_over_rank, find_targets, inject, scaling_one
from switchlora.errors import NothingMeasured
from switchlora.initializers import UpdateSVD, WeightSVD, balanced, re_init

INITS = names("switch/init")
PATTERNS = [r"attn\.qkv", r"attn\.proj", r"mlp\.fc1", r"mlp\.fc2"]


def moved(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    thin = torch.randn(shape[0], 6, generator=generator)
    update = 0.1 * thin @ torch.randn(6, shape[1], generator=generator)
    return weight, update + 0.001 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (32, 32)])
def test_shapes_and_inputs_untouched(init, shape):
    weight, update = moved(shape)
    copies = weight.clone(), update.clone()
    A, B = build_yaml("switch/init", init)(weight, update, 4)
    assert A.shape == (4, shape[1]) and B.shape == (shape[0], 4)
    assert A.dtype == B.dtype == torch.float32 and torch.isfinite(A).all()
    assert torch.equal(weight, copies[0]) and torch.equal(update, copies[1])


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("scaling", [scaling_one, lambda r: alpha_over_rank(r, 16.0)])
@pytest.mark.parametrize("split_qkv", [False, True])
def test_the_logits_do_not_move(init, scaling, split_qkv, images):
    torch.manual_seed(0)
    model = tiny_vit().eval()
    before = model(images)
    targets = find_targets(model, PATTERNS, split_qkv)
    chosen = build_yaml("switch/init", init)
    factors = {}
    for name, target in targets.items():
        weight = target.weight(model)
        factors[name] = chosen(weight, moved(weight.shape)[1], 4)
    inject(model, targets, factors, scaling)
    assert (model(images) - before).abs().max() <= 1e-5


@pytest.mark.parametrize("init", INITS)
def test_at_least_one_factor_has_a_gradient(init, images):
    model = tiny_vit()
    targets = find_targets(model, PATTERNS)
    chosen = build_yaml("switch/init", init)
    inits = {
        n: chosen(t.weight(model), moved(t.weight(model).shape)[1], 4) for n, t in targets.items()
    }
    inject(model, targets, inits, scaling_one)
    model(images).square().sum().backward()
    for name in targets:
        module = model.get_submodule(name)
        assert module.lora_A.grad.any() or module.lora_B.grad.any()
        assert module.weight.grad is None


@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_update_svd_is_balanced_and_is_the_best_rank_r_part_of_the_update(gain):
    weight, update = moved((96, 64))
    A, B = UpdateSVD(gain)(weight, update, 6)
    U, S, Vh = scipy.linalg.svd(update.numpy())
    best = torch.tensor(U[:, :6] * S[:6] @ Vh[:6])
    assert torch.allclose(B @ A, gain**2 * best, atol=1e-4 * gain**2)
    assert torch.allclose(A @ A.mT, B.mT @ B, atol=1e-5 * gain**2)


def test_weight_svd_ignores_the_update():
    weight, update = moved((32, 64))
    first, second = WeightSVD()(weight, update, 4), WeightSVD()(weight, 0 * update, 4)
    assert torch.equal(first.A, second.A)


def test_re_init_draws_both_factors_as_torch_draws_the_weight_of_a_linear():
    weight, update = moved((96, 400))
    A, B = re_init(weight, update, 25)
    for factor, inputs in ((A, 400), (B, 25)):
        assert 0.9 < factor.abs().max() * inputs**0.5 <= 1
        assert factor.std() * (3 * inputs) ** 0.5 == pytest.approx(1, rel=0.1)


def test_a_balanced_start_is_the_product_of_re_init_in_factors_of_one_norm():
    weight, update = moved((96, 64))
    starts = []
    for init in (re_init, balanced):
        torch.manual_seed(3)
        starts.append(init(weight, update, 4))
    (A, B), (even_A, even_B) = starts
    assert torch.allclose(even_B @ even_A, B @ A, atol=1e-6)
    assert even_A.norm().item() == pytest.approx(even_B.norm().item(), rel=1e-5)
    assert B.norm() > 3 * A.norm()


@pytest.mark.parametrize("init", ["update_svd", "update_directions"])
def test_without_an_update_the_error_names_the_starts_that_need_none(init):
    with pytest.raises(NothingMeasured, match="zero_b"):
        build_yaml("switch/init", init)(torch.ones(8, 8), torch.zeros(8, 8), 2)
