"""RefLoRA: the equation that S solves, the step that it makes, and whole runs with it."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import reflora as script
import reflora_rates

from conf_yamls import build, composed, names
from conftest import tiny_vit
from pretended import DEVICE, on_pretended
from runs import (
    assert_same_but_for_memory,
    assert_same_run,
    events_without_times,
    make_run,
    make_run_in_parts,
)
from switchlora.adapters import (
    Adapter,
    Factors,
    find_targets,
    inject,
    scaling_one,
    train_only,
    trained_adapters,
)
from switchlora.initializers import WeightSVD, empty_factors, zero_b
from switchlora.learner import (
    RefLoRA,
    RefLoRAS,
    balance,
    build_learner,
    factor_balance,
    load_moments,
    moments_of,
    precondition,
    refactored_from,
    refactoring_matrices,
)

LOSS = nn.CrossEntropyLoss()
REFACTORINGS = [name for name in names("adapter/refactoring") if name.startswith("reflora")]
ZERO_B = "_target_: hydra.utils.get_method, path: switchlora.initializers.zero_b"
START = ("switch/criterion=at_start", "switch/rank=fixed", "switch.rank.rank=2")


def pair(rank=4, cond=1.0, seed=0, out=24, inputs=16):
    """Trained factors; the singular values of A fall from 1 to 1 / cond."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.linalg.qr(torch.randn(inputs, rank, generator=generator))[0].T
    A = torch.logspace(0, -torch.log10(torch.tensor(cond)), rank)[:, None] * A
    B = torch.randn(out, rank, generator=generator)
    return Adapter(nn.Parameter(A), nn.Parameter(B), slice(0, out), 2.0)


def with_gradients(adapter):
    """The gradients of ||(s B A - 1) X||^2 in place; the loss as a function of the factors."""
    images = torch.randn(adapter.A.shape[1], 8, generator=torch.Generator().manual_seed(9))

    def loss(A, B):
        return ((adapter.scaling * B @ A - 1) @ images).square().mean()

    loss(adapter.A, adapter.B).backward()
    return loss


def unbalanced(weight, update, rank):
    A, B = zero_b(weight, update, rank)
    return Factors(A, 0.1 * torch.randn(B.shape))


def adapted(init, seed=0, rank=2):
    """A tiny ViT with adapters on q, k, v and fc1, but for one v that has rank 0."""
    torch.manual_seed(seed)
    model = tiny_vit()
    targets = find_targets(model, (r"attn\.qkv", r"mlp\.fc1"), split_qkv=True)
    weights = {name: target.weight(model) for name, target in targets.items()}
    chosen = {name: init(weight, weight, rank) for name, weight in weights.items()}
    chosen["blocks.0.attn.qkv.v"] = empty_factors(weights["blocks.0.attn.qkv.v"])
    inject(model, targets, chosen, scaling_one)
    train_only(model, ())
    return model


def learner(model, *overrides, start=0):
    recipe = build(composed("full.scheduler.warmup_t=0", *overrides).adapter)
    return build_learner(model, recipe, total_updates=200, start=start)


def batch():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    return images, torch.randint(0, 5, (16,), generator=generator)


def products(adapters):
    return [(a.B @ a.A).detach() for a in adapters]


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("cond", [1.0, 1e2, 1e4])
def test_S_solves_its_equation_and_has_its_inverse(rank, cond):
    A, B, *_ = pair(rank, cond)
    S, inverse = refactoring_matrices(A, B)
    A, B = A.double(), B.double()
    assert torch.allclose(S @ A @ A.mT @ S, B.mT @ B, rtol=1e-5, atol=1e-5)
    assert torch.allclose(S @ inverse, torch.eye(rank).double(), atol=1e-5)
    assert torch.equal(S, S.mT) or torch.allclose(S, S.mT, rtol=1e-10)
    assert (torch.linalg.eigvalsh(S) > 0).all()


def test_refactoring_leaves_the_product_alone_and_balances_the_factors():
    A, B, *_ = pair(cond=10.0)
    S, _ = refactoring_matrices(A, B)
    P = torch.linalg.cholesky(S).float()
    balanced_A, balanced_B = P.mT @ A, B @ torch.linalg.inv(P).mT
    assert torch.allclose(balanced_B @ balanced_A, B @ A, atol=1e-5)
    gram_A, gram_B = balanced_A @ balanced_A.mT, balanced_B.mT @ balanced_B
    assert torch.allclose(gram_A, gram_B, atol=1e-5)


def test_a_balanced_pair_is_left_alone():
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    factors = WeightSVD()(weight, weight, 4)
    S, inverse = refactoring_matrices(factors.A, factors.B)
    assert torch.allclose(S, torch.eye(4).double(), atol=1e-5)
    assert torch.allclose(inverse, torch.eye(4).double(), atol=1e-5)


@pytest.mark.parametrize("what", ["B is zero", "a row of A is zero", "both", "columns of B alike"])
def test_a_singular_pair_has_the_identity(what):
    A, B = (factor.detach().clone() for factor in pair()[:2])
    if what in ("B is zero", "both"):
        B.zero_()
    if what in ("a row of A is zero", "both"):
        A[1] = 0
    if what == "columns of B alike":
        B[:, 1] = 3 * B[:, 0] - B[:, 2]
    S, inverse = refactoring_matrices(A, B)
    assert torch.equal(S, torch.eye(4).double()) and torch.equal(inverse, S)


def test_a_singular_pair_does_not_disturb_the_others_of_its_batch():
    pairs = [pair(seed=0), pair(seed=1), pair(seed=2, inputs=40)]
    nn.init.zeros_(pairs[1].B)
    for each in pairs:
        with_gradients(each)
    before = [each.A.grad.clone() for each in pairs]
    precondition(pairs)
    for number in (0, 2):
        _, inverse = refactoring_matrices(pairs[number].A, pairs[number].B)
        expected = inverse.float() @ before[number]
        assert torch.allclose(pairs[number].A.grad, expected, rtol=1e-5)
    assert torch.equal(pairs[1].A.grad, before[1])


def test_a_preconditioned_sgd_step_is_the_balanced_pairs_step_mapped_back():
    each, lr = pair(cond=10.0), 0.01
    loss = with_gradients(each)
    S, _ = refactoring_matrices(each.A, each.B)
    P = torch.linalg.cholesky(S).float()
    inverse = torch.linalg.inv(P)
    A, B = (P.mT @ each.A).detach(), (each.B @ inverse.mT).detach()
    grad_A, grad_B = torch.func.grad(loss, argnums=(0, 1))(A, B)
    precondition([each])
    torch.optim.SGD([each.A, each.B], lr=lr).step()
    assert torch.allclose(each.A, inverse.mT @ (A - lr * grad_A), atol=1e-5)
    assert torch.allclose(each.B, (B - lr * grad_B) @ P.mT, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer,powers",
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), (1, 2, 2)),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), (1,)),
    ],
)
def test_balancing_keeps_the_product_and_scales_moments_as_gradients(optimizer, powers):
    each = pair()
    stepped = optimizer([each.A, each.B])
    with_gradients(each)
    stepped.step()
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if len(powers) > 1 else ("momentum_buffer",)
    product = (each.B @ each.A).detach()
    p = (each.B.norm() / each.A.norm()).sqrt().detach()
    before = {f: {k: stepped.state[f][k].clone() for k in keys} for f in (each.A, each.B)}
    balance([each], stepped)
    assert torch.allclose(each.B @ each.A, product, atol=1e-5)
    assert torch.allclose(each.A.norm(), each.B.norm(), rtol=1e-5)
    for key, power in zip(keys, powers, strict=True):
        for factor, scale in ((each.A, 1 / p), (each.B, p)):
            expected = before[factor][key] * scale**power
            assert torch.allclose(stepped.state[factor][key], expected, rtol=1e-5)


def test_balancing_does_nothing_while_B_is_zero():
    each = pair()
    nn.init.zeros_(each.B)
    before = each.A.clone()
    balance([each], torch.optim.AdamW([each.A, each.B]))
    assert torch.equal(each.A, before) and not each.B.any()


@pytest.mark.parametrize("how", REFACTORINGS)
@pytest.mark.parametrize("recipe,init", [("adamw", zero_b), ("sgd", unbalanced)])
def test_training_with_it_lowers_the_loss(how, recipe, init):
    short = "adapter.refactoring.warmup_updates=5"
    overrides = (f"recipe@full={recipe}", f"adapter/refactoring={how}", short)
    trained = learner(adapted(init), *overrides)
    losses = [trained.update(*batch(), LOSS, number).loss for number in range(25)]
    assert losses[-1] < 0.95 * losses[0]
    if how == "reflora_s":
        norms = [(a.A.norm(), a.B.norm()) for a in trained_adapters(trained.model)]
        assert all(A.item() == pytest.approx(B.item(), rel=1e-4) for A, B in norms)


def test_warm_up_and_intervals_count_from_where_the_recipe_took_over():
    options = ("adapter.refactoring.warmup_updates=2", "adapter.refactoring.interval=3")
    trained = learner(adapted(unbalanced), "adapter/refactoring=reflora", *options, start=10)
    refactored = []
    for number in range(10, 19):
        trained.set_lr(number)
        for adapter in trained_adapters(trained.model):
            adapter.A.grad, adapter.B.grad = map(torch.ones_like, (adapter.A, adapter.B))
        trained.optimizer.step()
        if not torch.equal(adapter.A.grad, torch.ones_like(adapter.A)):
            refactored.append(number)
    assert refactored == [12, 15, 18]


@pytest.mark.parametrize("refactoring", [RefLoRA(warmup_updates=0), RefLoRAS(warmup_updates=0)])
def test_pairs_with_a_frozen_factor_and_of_rank_zero_are_left_alone(refactoring):
    model = adapted(unbalanced)
    first, *others = trained_adapters(model)
    assert len(others) == 2 * 4 - 2
    first.A.requires_grad_(False)
    trained = learner(model)
    refactoring(trained)
    before = first.A.clone()
    trained.update(*batch(), LOSS, 0)
    assert torch.equal(first.A, before) and first.A.grad is None


def test_reflora_s_first_balances_when_its_warm_up_is_over():
    option = "adapter.refactoring.warmup_updates=3"
    trained = learner(adapted(unbalanced), "adapter/refactoring=reflora_s", option, start=10)
    balanced = []
    for number in range(10, 16):
        trained.update(*batch(), LOSS, number)
        ratio = factor_balance(trained_adapters(trained.model)[:1]).norm_ratio
        balanced.append(ratio == pytest.approx(1, rel=1e-4))
    assert balanced == [False, False, True, True, True, True]
    assert trained.refactored_from == 13


def test_a_learner_that_inherits_the_moments_of_another_begins_by_itself():
    option = "adapter.refactoring.warmup_updates=3"
    first = learner(adapted(unbalanced), "adapter/refactoring=reflora_s", option, start=10)
    for number in range(10, 13):
        first.update(*batch(), LOSS, number)
    moments = moments_of(first.model, first.optimizer)
    for start, known in ((10, 13), (13, None)):
        other = learner(first.model, "adapter/refactoring=reflora_s", option, start=start)
        load_moments(other.model, other.optimizer, moments)
        assert refactored_from(other) == known


def test_reflora_s_without_a_warm_up_counts_intervals_from_its_start():
    options = ("adapter.refactoring.warmup_updates=0", "adapter.refactoring.interval=2")
    trained = learner(adapted(unbalanced), "adapter/refactoring=reflora_s", *options)
    first, *_ = trained_adapters(trained.model)
    balanced = []
    for number in range(4):
        trained.update(*batch(), LOSS, number)
        balanced.append(factor_balance([first]).norm_ratio == pytest.approx(1, rel=1e-6))
    assert balanced == [False, True, False, True]


def test_the_balance_of_factors_is_that_of_their_norms_and_of_S():
    each = pair(cond=10.0)
    S, _ = refactoring_matrices(each.A, each.B)
    found = factor_balance([each])
    assert found.norm_ratio == pytest.approx((each.B.norm() / each.A.norm()).item(), rel=1e-5)
    assert found.spread == pytest.approx(torch.linalg.cond(S).item(), rel=1e-4)
    nn.init.zeros_(each.B)
    assert factor_balance([each]) == (0, 1)


def test_moments_of_the_factors_alone_begin_anew_where_that_is_asked_for():
    options = ("adapter.refactoring.warmup_updates=3", "adapter.refactoring.reset_moments=true")
    model = adapted(unbalanced)
    model.head.weight.requires_grad_(True)
    trained = learner(model, "adapter/refactoring=reflora", *options)
    for number in range(5):
        trained.update(*batch(), LOSS, number)
    first, *_ = trained_adapters(model)
    steps = [trained.optimizer.state[p]["step"] for p in (first.A, first.B, model.head.weight)]
    assert steps == [2, 2, 5]


@pytest.mark.parametrize("how", REFACTORINGS)
def test_it_begins_at_the_measured_balance_says_so_and_resumes_bit_equal(how, tmp_path, at_update):
    options = (*START, "switch/init=zero_b", f"adapter/refactoring={how}", "full.precision=bf16")
    options += ("adapter.refactoring.warmup_updates=2", "adapter.refactoring.start_balance=0.4")
    options += ("monitor.window=1", "full.scheduler.warmup_t=2", "max_updates=12")
    if how == "reflora":
        options += ("adapter.refactoring.reset_moments=true", "adapter.refactoring.interval=2")
    make_run(tmp_path / "whole", *options)
    events = events_without_times(tmp_path / "whole")
    (began,) = (event for event in events if event["event"] == "refactoring")
    ratios = {e["num_updates"]: e["factors/norm_ratio"] for e in events if e["event"] == "window"}
    assert list(ratios) == list(range(1, 13))
    assert began["num_updates"] == next(number for number in ratios if ratios[number] >= 0.4)
    assert 2 < began["num_updates"] < 9 and 0.4 <= began["factors/norm_ratio"] < 0.8

    make_run_in_parts(tmp_path / "parts", at_update, [9], *options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("how", REFACTORINGS)
@pytest.mark.usefixtures("measured_together")
def test_without_a_warm_up_it_runs_from_re_init_on_any_device(how, tmp_path):
    options = (*START, "switch/init=re_init", f"adapter/refactoring={how}", "max_updates=4")
    options += ("adapter.refactoring.warmup_updates=0",)
    with on_pretended():
        make_run(tmp_path / "there", *options, f"system.device={DEVICE}")
    make_run(tmp_path / "here", *options)
    assert_same_but_for_memory(tmp_path / "there", tmp_path / "here")


@pytest.mark.parametrize("how", REFACTORINGS)
@pytest.mark.parametrize(
    "start",
    [
        ("switch/init=zero_b",),
        (
            *("switch/init=update_directions", "switch.train_factors=[A,B]"),
            *("switch/criterion=at_epoch", "switch.criterion.epoch=1"),
        ),
        ("switch/init=weight_svd", "switch/restart=relora", f"switch.restart.init={{{ZERO_B}}}"),
    ],
)
def test_no_warm_up_beside_a_zero_factor_is_refused_before_the_start(how, start, tmp_path):
    options = (*START, f"adapter/refactoring={how}", "adapter.refactoring.warmup_updates=0")
    with pytest.raises(ValueError, match="warmup_updates=0 does not go with this switch.*B = 0"):
        make_run(tmp_path, *options, *start)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_is_too_short_for_its_warm_up_says_so(tmp_path, capsys):
    make_run(
        tmp_path, *START, "adapter/refactoring=reflora", "switch/init=zero_b", "max_updates=2"
    )
    assert "refactoring never began: median |B|/|A| is 0." in capsys.readouterr().out


@pytest.mark.parametrize("condition", script.CONDITIONS)
@pytest.mark.parametrize("start", ["|B| = 10 |A|", "|B| = 100 |A|"])
def test_from_unbalanced_factors_gradient_descent_is_many_times_faster_with_it(start, condition):
    """Each at the best of 24 rates: 8 and 11 steps to 1 % of the loss; LoRA takes over 200."""
    plain, whole, scalar = (
        script.best_curve("gradient descent", condition, start, method)
        for method in ("LoRA", "RefLoRA", "RefLoRA-S")
    )
    assert whole.steps < 25 and scalar.steps < 25
    assert plain.steps is None or plain.steps > 3 * whole.steps


def test_under_gradient_descent_its_products_do_not_depend_on_how_they_are_split():
    starts = ("|B| = |A|", "|B| = 10 |A|", "|B| = 100 |A|")
    even, *others = (script.best_curve("gradient descent", 10, s, "RefLoRA") for s in starts)
    for other in others:
        assert torch.allclose(other.losses, even.losses, rtol=1e-6, atol=1e-9)


def test_under_adam_it_gains_nothing_from_balanced_factors():
    plain, refactored = (
        script.best_curve("Adam", 10, "|B| = |A|", method) for method in ("LoRA", "RefLoRA")
    )
    assert refactored.steps > 0.8 * plain.steps


def test_the_command_writes_a_line_for_each_curve_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "STEPS", 3)
    monkeypatch.setattr(script, "CONDITIONS", (10,))
    monkeypatch.setattr(sys, "argv", ["reflora", "--out", str(tmp_path), "--seeds", "5", "6"])
    script.main()
    with (tmp_path / "reflora.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(script.STARTS) * (4 + 2)
    assert {line["seed"] for line in lines} == {"5", "6"}
    assert (tmp_path / "reflora.png").stat().st_size > 1000


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="refactoring.interval is 0: give at least 1"):
        RefLoRA(interval=0)
    with pytest.raises(ValueError, match="refactoring.warmup_updates is -1: give at least 0"):
        RefLoRAS(warmup_updates=-1)
    with pytest.raises(ValueError, match="refactoring does not go with system.parallel=fsdp"):
        recipe = build(composed("adapter/refactoring=reflora").adapter)
        build_learner(tiny_vit(), recipe, 10, parallel="fsdp")


def test_arms_are_compared_at_the_best_of_their_rates(tmp_path, monkeypatch):
    words = ("+method=lora", *START, "max_updates=20")
    for rate in (1, 10):
        make_run(tmp_path / f"runs/{rate}", *words, f"adapter.factor_lr={rate}")
    make_run(tmp_path / "runs/balanced", *words, "switch/init=balanced", "adapter.factor_lr=10")
    command = ["reflora_rates", str(tmp_path / "runs"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    reflora_rates.main()
    header, _, lora, balanced = (tmp_path / "reflora_rates.md").read_text().splitlines()
    assert header == "| AdamW | 0.001 | 0.01 | best | mean train loss |"
    name, *top1, best, _loss = lora.strip("| ").split(" | ")
    assert name == "lora" and best == max(top1, key=float)
    assert balanced.startswith("| lora, balanced | – | ")
    assert (tmp_path / "reflora_rates.png").stat().st_size > 10_000
