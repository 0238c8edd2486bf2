"""With matched rates an update of the factors moves the weight as far as one of full training."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from conf_yamls import build, composed
from conftest import tiny_vit
from switchlora.adapters import (
    Factors,
    adapted_modules,
    adapter_layout,
    find_targets,
    inject,
    inject_empty,
    is_factor,
    merge,
    scaling_one,
    train_only,
)
from switchlora.initializers import UpdateSVD, update_directions, zero_b
from switchlora.learner import build_learner, parameter_groups
from switchlora.learner.matched import AGREEMENT

LR = 1e-3
STARTS = {"zero_b": zero_b, "update_directions": update_directions, "update_svd": UpdateSVD()}


class One(nn.Module):
    """A model of one linear; its gradient is given."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.fc = nn.Linear(in_features, out_features, bias=False)

    def forward(self, images):
        return self.fc(images)


def recipe(name, **changes):
    words = (f"recipe@full={name}", f"full.optimizer.lr={LR}", "full.scheduler.warmup_t=0")
    found = build(composed(*words, f"full.scheduler.lr_min={LR}").adapter)
    return replace(found, weight_decay=0.0, clip_grad=None, **changes)


def adapted(out_features, in_features, rank, init, scaling, train=("A", "B")):
    torch.manual_seed(0)
    model = One(out_features, in_features)
    targets = find_targets(model, ("fc",))
    update = 0.01 * torch.randn(out_features, in_features)
    factors = {"fc": STARTS[init](model.fc.weight.detach(), update, rank)}
    inject(model, targets, factors, lambda rank: scaling)
    train_only(model, (), train)
    return model


def moved(model, how, gradient):
    """The change of the effective weight by one update whose gradient of it is ``gradient``."""
    learner = build_learner(model, how, total_updates=10)
    before = weight(model)
    learner.set_lr(0)
    (weight_of(model) * gradient).sum().backward()
    learner.optimizer.step()
    return weight(model) - before


def weight_of(model):
    fc = model.fc
    if not hasattr(fc, "adapters"):
        return fc.weight
    (adapter,) = fc.adapters().values()
    return fc.weight + adapter.scaling * adapter.B @ adapter.A


def weight(model):
    return weight_of(model).detach().clone()


def rms(matrix):
    return matrix.square().mean().sqrt().item()


def leading_row(model):
    """The direction of inputs that A passes on with its largest singular value."""
    (adapter,) = model.fc.adapters().values()
    return torch.linalg.svd(adapter.A.detach(), full_matrices=False).Vh[0]


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("name", ["adamw", "adam", "lion"])
@pytest.mark.parametrize("shape", [(64, 64, 8), (256, 64, 4), (64, 256, 16)])
@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_outputs_move_a_fixed_times_as_far_as_an_entry_does_in_full_training(
    init, name, shape, scaling
):
    """For inputs along A's leading row, root mean square; all r signs that agree: sqrt(r) more."""
    model = adapted(*shape, init, scaling, train=("B",))
    out_features, in_features, rank = shape
    gradient = torch.randn(out_features, in_features)
    step = rms(moved(One(out_features, in_features), recipe(name), gradient))
    assert step == pytest.approx(LR, rel=0.02)
    found = rms(moved(model, recipe(name), gradient) @ leading_row(model))
    assert found * rank**0.5 == pytest.approx(AGREEMENT * step, rel=0.3)
    twice = adapted(*shape, init, scaling, train=("B",))
    again = moved(twice, recipe(name, matched_step=2.0), gradient) @ leading_row(twice)
    assert rms(again) == pytest.approx(2 * found, rel=1e-3)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_sgd_moves_outputs_along_the_leading_row_as_full_training_does(init, scaling):
    model = adapted(64, 256, 16, init, scaling, train=("B",))
    gradient = torch.randn(64, 256)
    full = moved(One(64, 256), recipe("sgd"), gradient) @ leading_row(model)
    found = moved(model, recipe("sgd"), gradient) @ leading_row(model)
    assert torch.allclose(found, full, rtol=0.1, atol=1e-7)


@pytest.mark.parametrize("shape", [(64, 64, 12), (256, 64, 12), (64, 256, 12)])
def test_orthogonal_rows_have_ten_times_the_rate_at_any_width_and_less_at_a_higher_rank(shape):
    found = rates(adapted(*shape, "update_directions", 1.0), recipe("adamw"))
    assert found["fc.lora_B"] == pytest.approx(10, rel=0.1)
    higher = rates(adapted(*shape[:2], 48, "update_directions", 1.0), recipe("adamw"))
    assert higher["fc.lora_B"] == pytest.approx(found["fc.lora_B"] / 2)


def rates(model, how):
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, how):
        for parameter in group["params"]:
            found[names[parameter]] = group["lr_scale"]
    return found


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_beside_B_of_zero_A_has_the_rate_of_a_weight_and_that_of_B_under_sgd(step):
    model = adapted(64, 32, 4, "zero_b", 1.0)
    found = rates(model, recipe("adamw", matched_step=step))
    assert found["fc.lora_A"] == step and found["fc.lora_B"] > 10 * step
    found = rates(model, recipe("sgd", matched_step=step))
    assert found["fc.lora_A"] == found["fc.lora_B"]


def test_A_does_not_outgrow_the_norm_that_the_rate_of_B_is_matched_to():
    """Gradients are random. With the rate of B, A would triple, and B's steps with it."""
    grown = {}
    for how, words in {"matched": {}, "as B": {"factor_lr": 5.0}}.items():
        model = adapted(384, 384, 48, "update_directions", 1.0)
        learner = build_learner(model, recipe("adamw", **words), total_updates=130)
        (adapter,) = model.fc.adapters().values()
        before = torch.linalg.matrix_norm(adapter.A.detach(), 2)
        for number in range(130):
            learner.set_lr(number)
            learner.optimizer.zero_grad()
            (weight_of(model) * torch.randn(384, 384)).sum().backward()
            learner.optimizer.step()
        grown[how] = float(torch.linalg.matrix_norm(adapter.A.detach(), 2) / before)
    assert grown["matched"] < 1.5 and grown["as B"] > 3


def test_a_factor_that_trains_alone_makes_the_whole_step():
    both = rates(adapted(64, 64, 4, "update_svd", 1.0), recipe("adamw"))
    alone = rates(adapted(64, 64, 4, "update_svd", 1.0, train=("B",)), recipe("adamw"))
    assert set(alone) == {"fc.lora_B"}
    assert alone["fc.lora_B"] == pytest.approx(2**0.5 * both["fc.lora_B"])


def test_a_number_is_the_rate_of_all_factors():
    model = adapted(64, 64, 4, "update_svd", 1.0)
    assert rates(model, recipe("adamw", factor_lr=7.0)) == {"fc.lora_A": 7.0, "fc.lora_B": 7.0}


def test_lora_plus_multiplies_the_matched_rate_of_B():
    model = adapted(64, 64, 4, "zero_b", 1.0)
    plain = rates(model, recipe("adamw"))
    plus = rates(model, recipe("adamw", factor_B_lr_scale=16.0))
    assert plus == {"fc.lora_A": plain["fc.lora_A"], "fc.lora_B": 16 * plain["fc.lora_B"]}


def vit_with_adapters(names=None):
    model = tiny_vit()
    targets = find_targets(model, (r"attn\.qkv", r"mlp\.fc1"), split_qkv=True)
    factors = {}
    for name, target in targets.items():
        if names is None or name in names:
            matrix = target.weight(model).detach()
            factors[name] = UpdateSVD()(matrix, 0.01 * torch.randn(matrix.shape), 2)
    inject(model, targets, factors, scaling_one)
    train_only(model, ())
    return model, targets


def test_rates_stay_while_the_factors_train_and_come_back_with_a_checkpoint():
    model, _ = vit_with_adapters()
    before = rates(model, recipe("adamw"))
    layout = adapter_layout(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_factor(name):
                parameter.mul_(5)
    assert rates(model, recipe("adamw")) == before
    again = tiny_vit()
    inject_empty(again, layout)
    again.load_state_dict(model.state_dict())
    train_only(again, ())
    assert rates(again, recipe("adamw")) == before


def test_a_slice_that_switches_later_leaves_the_rates_of_the_others():
    model, targets = vit_with_adapters(["blocks.0.attn.qkv.q"])
    first = rates(model, recipe("adamw"))["blocks.0.attn.qkv.lora_A.q"]
    with torch.no_grad():
        model.get_parameter("blocks.0.attn.qkv.lora_A.q").mul_(5)
    new = Factors(torch.randn(2, 32), torch.randn(32, 2))
    inject(model, targets, {"blocks.0.attn.qkv.k": new}, scaling_one)
    train_only(model, ())
    found = rates(model, recipe("adamw"))
    assert found["blocks.0.attn.qkv.lora_A.q"] == first
    assert found["blocks.0.attn.qkv.lora_A.k"] != first


def test_new_factors_in_the_place_of_old_ones_get_their_own_rates():
    model, targets = vit_with_adapters()
    before = rates(model, recipe("adamw"))
    name = "blocks.0.mlp.fc1"
    adapter = adapted_modules(model)[name].adapters()[""]
    inject(
        model, targets, {name: Factors(4 * adapter.A.detach(), adapter.B.detach())}, scaling_one
    )
    train_only(model, ())
    found = rates(model, recipe("adamw"))
    assert found[f"{name}.lora_B"] == before[f"{name}.lora_B"] / 4
    merge(model)
    assert not any(map(is_factor, rates(model, recipe("adamw"))))


def test_targets_of_about_the_same_norm_share_a_group():
    model, _ = vit_with_adapters()
    factors = [name for name, _ in model.named_parameters() if is_factor(name)]
    scales = {group["lr_scale"] for group in parameter_groups(model, recipe("adamw"))}
    assert len(scales) < len(factors) / 2


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": "0.1"},
        {"dropout": 2},
        {"start_norms": {"": ("x", 1.0)}},
        {"start_norms": {"": (-1.0, 1.0)}},
    ],
)
def test_settings_of_an_adapter_that_are_no_shares_or_norms_are_refused(settings):
    model = adapted(8, 8, 2, "zero_b", 1.0)
    layout = adapter_layout(model)
    layout["fc"]["settings"] |= settings
    with pytest.raises(TypeError, match="an adapter"):
        inject_empty(One(8, 8), layout)
