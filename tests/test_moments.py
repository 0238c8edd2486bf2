"""What the recipe adds for factors, and what pruning leaves of their moments."""

from dataclasses import replace

import pytest
import torch

from conf_yamls import build, composed
from switchlora.adapters import (
    Factors,
    add_frobenius_decay,
    find_targets,
    inject,
    is_factor,
    kept_parameters,
    train_only,
    trained_adapters,
)
from switchlora.initializers import zero_b
from switchlora.learner import (
    Unreduced,
    build_learner,
    moments_of,
    parameter_groups,
    prune_moments,
)
from test_distributed import run_ranks


def unbalanced(weight, update, rank):
    A, B = zero_b(weight, update, rank)
    return Factors(A, 0.1 * torch.randn(B.shape))


@pytest.fixture
def adapted(vit):
    """A tiny ViT with adapters on q, k, v and fc1, of scaling 3."""
    targets = find_targets(vit, (r"attn\.qkv", r"mlp\.fc1"), split_qkv=True)
    chosen = {n: unbalanced(t.weight(vit), None, 2) for n, t in targets.items()}
    inject(vit, targets, chosen, lambda rank: 3.0)
    train_only(vit, kept_parameters(vit, {t.module for t in targets.values()}, (".*",)))
    return vit


def recipe(**changes):
    return replace(build(composed("full.scheduler.warmup_t=0").adapter), **changes)


def trained(model, images, updates=3, **changes):
    """A learner after some updates."""
    learner = build_learner(model, recipe(**changes), total_updates=10)
    for number in range(updates):
        learner.update(images, torch.arange(8) % 5, torch.nn.CrossEntropyLoss(), number)
    return learner


def test_frobenius_decay_is_the_gradient_of_its_penalty(adapted):
    adapters, strength = trained_adapters(adapted), 0.7
    factors = [factor for adapter in adapters for factor in (adapter.A, adapter.B)]
    norms = [(a.scaling * a.B @ a.A).square().sum() for a in adapters]
    expected = torch.autograd.grad(strength / 2 * sum(norms), factors)
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    add_frobenius_decay(adapters, strength)
    for factor, grad in zip(factors, expected, strict=True):
        assert torch.allclose(factor.grad, 1 + grad, rtol=1e-5, atol=1e-6)


def test_frobenius_decay_is_added_before_the_norm_is_taken_and_clipped(adapted, images):
    strong = trained(adapted, images, updates=1, frobenius_decay=100.0, clip_grad=0.5)
    grads = [p.grad for p in adapted.parameters() if p.grad is not None]
    norm = torch.stack([grad.norm() for grad in grads]).norm().item()
    assert norm == pytest.approx(0.5, rel=1e-4)
    again = strong.update(images, torch.arange(8) % 5, torch.nn.CrossEntropyLoss(), 1)
    assert again.grad_norm > 10


def test_frobenius_decay_does_not_go_with_weight_decay_of_the_factors():
    with pytest.raises(ValueError, match="frobenius_decay replaces weight decay on the factors"):
        recipe(frobenius_decay=1e-4, factor_weight_decay=0.1)


def test_lora_plus_gives_B_its_own_learning_rate_and_only_then_its_own_group(adapted):
    plain = parameter_groups(adapted, recipe(factor_lr=3.0))
    plus = parameter_groups(adapted, recipe(factor_lr=3.0, factor_B_lr_scale=16.0))
    assert [g["lr_scale"] for g in plain] == [1.0, 1.0, 3.0]
    assert [g["lr_scale"] for g in plus] == [1.0, 1.0, 3.0, 48.0]
    names = {id(p): n for n, p in adapted.named_parameters()}
    for group, which in zip(plus[2:], ("lora_A", "lora_B"), strict=True):
        found = {names[id(p)] for p in group["params"]}
        assert found == {n for n in names.values() if which in n}
    learner = build_learner(adapted, recipe(factor_lr=3.0, factor_B_lr_scale=16.0), 10)
    lr = learner.set_lr(3)
    rates = [group["lr"] for group in learner.optimizer.param_groups]
    assert rates == pytest.approx([lr, lr, 3 * lr, 48 * lr])


@pytest.mark.parametrize("how,share", [("random", 0.9), ("magnitude", 0.75), ("zero", 1.0)])
def test_pruning_zeroes_its_share_of_the_factors_moments_only(how, share, adapted, images):
    learner = trained(adapted, images)
    moments = moments_of(adapted, learner.optimizer)
    before = {n: {k: v.clone() for k, v in state.items()} for n, state in moments.items()}
    prune_moments(moments, how, share, seed=7)
    gone = total = 0
    for name, state in moments.items():
        assert state["step"] == before[name]["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            old, new = before[name][key], state[key]
            if not is_factor(name):
                assert torch.equal(new, old)
                continue
            zero = new == 0
            assert torch.equal(new[~zero], old[~zero])
            if how == "magnitude":
                assert zero.sum() == int(share * new.numel())
                assert old[zero].abs().max() <= old[~zero].abs().min()
            gone, total = gone + zero.sum().item(), total + new.numel()
        if how == "random" and is_factor(name):
            assert torch.equal(state["exp_avg"] == 0, state["exp_avg_sq"] == 0)
    assert gone / total == pytest.approx(share, abs=0.02)


def test_random_pruning_depends_on_its_seed_alone(adapted, images):
    learner = trained(adapted, images)
    state = torch.get_rng_state()
    moments = moments_of(adapted, learner.optimizer)

    def pruned(seed):
        copied = {n: {k: v.clone() for k, v in s.items()} for n, s in moments.items()}
        prune_moments(copied, "random", 0.5, seed)
        return torch.cat([copied[n]["exp_avg"].flatten() for n in copied if is_factor(n)])

    assert torch.equal(pruned(3), pruned(3)) and not torch.equal(pruned(3), pruned(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_way_of_pruning_is_refused():
    with pytest.raises(ValueError, match="how is 'some': choose one of random, magnitude, zero"):
        prune_moments({}, "some", 0.5, seed=0)


def test_unreduced_parameters_drift_apart_and_only_they(tmp_path):
    start = ("switch/criterion=at_start", "switch/init=zero_b", "switch/rank=fixed")
    options = (*start, "switch.rank.rank=2", "adapter.clip_grad=null", "max_updates=4")
    patterns = r"adapter.before_ddp.patterns=['blocks\.0\.norm1']"
    found = run_ranks(2, tmp_path, *options, "+method/prelora_bug=unreduced", patterns)
    assert found["differ"] == ["blocks.0.norm1.weight", "blocks.0.norm1.bias"]


def test_a_pattern_of_unreduced_parameters_that_finds_nothing_is_refused(adapted):
    with pytest.raises(ValueError, match="Unreduced pattern 'normm' matches no parameter"):
        Unreduced(["normm"])(adapted)
