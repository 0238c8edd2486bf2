"""Muon and LoRA-Muon: torch's own where it has one, the claims of the paper for factors."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from conf_yamls import build, composed
from conftest import tiny_vit
from switchlora.adapters import Factors, find_targets, inject, is_factor, train_only
from switchlora.learner import Muon, build_learner, parameter_groups
from switchlora.learner.muon import inverse_root
from switchlora.learner.recipe import check_goes_with_fsdp

LR = 1e-3
OUT, IN, RANK = 24, 40, 4


def recipe(**changes):
    words = ("recipe@full=muon", f"full.optimizer.lr={LR}", "full.scheduler.warmup_t=0")
    return replace(build(composed(*words).adapter), clip_grad=None, **changes)


class One(nn.Module):
    """A model of one linear with an adapter."""

    def __init__(self, A, B, scaling=1.0):
        super().__init__()
        self.fc = nn.Linear(IN, OUT, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.linspace(-1, 1, OUT * IN).view(OUT, IN))
        inject(self, find_targets(self, ("fc",)), {"fc": Factors(A, B)}, lambda rank: scaling)

    def product(self):
        fc = self.get_submodule("fc")
        return fc.scaling * fc.lora_B @ fc.lora_A


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(RANK, IN, generator=generator)
    B = torch.randn(OUT, RANK, generator=generator)
    return A, B, torch.randn(OUT, IN, generator=generator)


def moved(model, gradient, train=("A", "B"), updates=1, **changes):
    """The changes of the effective weight by some updates with the same gradient of it."""
    train_only(model, (), train)
    learner = build_learner(model, recipe(**changes), total_updates=1000)
    changes = []
    for number in range(updates):
        learner.set_lr(number)
        learner.optimizer.zero_grad()
        before = model.product().detach().clone()
        (model.product() * gradient).sum().backward()
        learner.optimizer.step()
        changes.append(model.product().detach() - before)
    return changes


def spectral(matrix):
    return torch.linalg.matrix_norm(matrix, ord=2).item()


def test_matrices_and_the_rest_are_stepped_as_by_torch():
    mine, theirs = tiny_vit(), tiny_vit()
    theirs.load_state_dict(mine.state_dict())
    optimizer = build_learner(mine, recipe(), total_updates=10).optimizer
    inside = [p for n, p in theirs.named_parameters() if n.startswith("blocks") and p.ndim == 2]
    plain, decayed = [], []
    for name, parameter in theirs.named_parameters():
        if not any(parameter is each for each in inside):
            bare = parameter.ndim < 2 or name in ("pos_embed", "cls_token")
            (plain if bare else decayed).append(parameter)
    own = [
        torch.optim.Muon(inside, LR, 0.05, 0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], LR),
    ]
    own[1].param_groups[0]["weight_decay"] = 0.05
    for group in optimizer.param_groups:
        group["lr"] = LR
    for seed in range(3):
        torch.manual_seed(seed)
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for each in (optimizer, *own):
            each.step()
    for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_each_factor_makes_half_a_step_of_muon_measured_by_the_spectral_norm(scaling):
    A, B, gradient = drawn()
    norm = LR * 0.2 * math.sqrt(IN)
    for train, share in ((("B",), 1.0), (("A", "B"), 0.5)):
        model = One(A.clone(), B.clone(), scaling)
        before = model.fc.lora_B.detach().clone()
        moved(model, gradient, train)
        step = scaling * (model.fc.lora_B.detach() - before) @ A
        assert spectral(step) == pytest.approx(share * norm, rel=1e-2)


def test_steps_do_not_depend_on_how_the_adapter_is_split_into_factors():
    A, B, gradient = drawn()
    change = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(5))
    for new in (100 * torch.eye(RANK), change):
        one = moved(One(A.clone(), B.clone()), gradient, updates=1)
        other = moved(One(new @ A, B @ torch.linalg.inv(new)), gradient, updates=1)
        for mine, theirs in zip(one, other, strict=True):
            assert torch.allclose(mine, theirs, rtol=2e-2, atol=2e-2 * mine.abs().max().item())


def test_the_step_is_the_steepest_one_of_its_spectral_norm_that_moves_B_alone():
    A, B, gradient = drawn()
    (step,) = moved(One(A, B), gradient, train=("B",))
    basis = torch.linalg.qr(A.mT).Q
    U, _, Vh = torch.linalg.svd(gradient @ basis, full_matrices=False)
    steepest = -LR * 0.2 * math.sqrt(IN) * U @ Vh @ basis.mT
    assert torch.allclose(step, steepest, atol=1e-2 * steepest.abs().max().item())


def test_A_stays_where_B_is_zero_and_moves_once_B_has_moved():
    A, _, gradient = drawn()
    model = One(A.clone(), torch.zeros(OUT, RANK))
    moved(model, gradient)
    assert torch.equal(model.fc.lora_A, A) and model.fc.lora_B.any()
    moved(model, gradient)
    assert not torch.equal(model.fc.lora_A, A)


def test_the_inverse_root_of_a_gram_matrix_inverts_its_square():
    A, _, _ = drawn()
    root = inverse_root(A.mT)
    assert torch.allclose(root @ (A @ A.mT) @ root, torch.eye(RANK), atol=1e-4)
    assert not inverse_root(torch.zeros(RANK, RANK)).any()


def test_factors_have_the_rate_of_the_weights():
    A, B, _ = drawn()
    model = One(A, B)
    train_only(model, ())
    (group,) = parameter_groups(model, recipe())
    assert group["lr_scale"] == 1.0 and group["part"] == "factors"
    (group,) = parameter_groups(model, recipe(factor_lr=3.0))
    assert group["lr_scale"] == 3.0


def test_the_classifier_and_embeddings_are_no_matrices():
    model = tiny_vit()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, recipe()):
        for parameter in group["params"]:
            found[names[parameter]] = group["part"]
    matrices = {name for name, part in found.items() if part == "matrices"}
    inside = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert matrices == inside and found["head.weight"] == "others"
    assert not any(map(is_factor, found))


def test_each_factor_has_the_rate_of_its_own_group():
    A, B, gradient = drawn()
    plain, plus = One(A.clone(), B.clone()), One(A.clone(), B.clone())
    moved(plain, gradient)
    moved(plus, gradient, factor_B_lr_scale=16.0)
    fc, other = plain.get_submodule("fc"), plus.get_submodule("fc")
    assert torch.allclose(other.lora_B - B, 16 * (fc.lora_B - B), rtol=1e-2, atol=1e-6)
    assert torch.equal(other.lora_A, fc.lora_A)


def test_a_factor_without_its_adapter_is_an_error():
    A, B, _ = drawn()
    model = One(A, B)
    train_only(model, ())
    optimizer = Muon(parameter_groups(model, recipe()))
    with pytest.raises(ValueError, match="a factor to train whose adapter it was not given"):
        optimizer.pair([])


def test_muon_is_refused_with_shards():
    with pytest.raises(ValueError, match="Muon does not go with system.parallel=fsdp"):
        check_goes_with_fsdp(recipe())


def test_an_optimizer_is_made_of_plain_parameters_too():
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([weight], lr=LR)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3, 3))
