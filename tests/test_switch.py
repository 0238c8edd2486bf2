"""The switch: what it keeps, what it drops, and that it is all or nothing."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import scipy.linalg
import timm.optim
import torch
from hydra.errors import InstantiationException
from torch import nn

from conf_yamls import build, composed, names
from conftest import tiny_vit
from switchlora.adapters import adapted_linear, adapted_modules, is_factor, merged_state_dict
from switchlora.errors import SwitchFailed
from switchlora.learner import WeightEMA, build_learner
from switchlora.models import create_model
from switchlora.monitor import UpdateMonitor
from switchlora.switching import Scene, switch
from trials import LOSS, SWITCH_AT, TOTAL, Trial, batch

BALANCED = "switch/init=update_svd"
"""a start at which neither factor is zero"""


def snapshot(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.fixture(scope="module")
def trained():
    """A full phase that is copied, not trained again."""
    return Trial()


@pytest.mark.parametrize("init", names("switch/init"))
@pytest.mark.parametrize("rank", names("switch/rank"))
def test_every_initializer_and_rank_policy_switches_without_drift(init, rank, trained):
    trial = copy.deepcopy(trained)
    options = {
        "budget": ["switch.rank.share=0.4"],
        "cuttlefish": ["switch.rank.multiplier=0.1"],
        "prelora": ["switch.rank.r_min=1", "switch.rank.r_max=4"],
    }
    policy = build(composed(f"switch/rank={rank}", *options.get(rank, [])).switch)
    start = build(composed(f"switch/init={init}").switch).init
    trial.policy = replace(policy, init=start)
    report = trial.switch()
    assert report.drift <= 1e-5
    applied = {n: len(m.lora_A) for n, m in adapted_modules(trial.model).items()}
    assert applied == {n: r for n, r in report.ranks.items() if r}
    trial.train(3)


IN_A_SUBSPACE = ("apollo", "apollo_mini", "fira", "galore")
"""recipes whose moments of weights say too little of the factors"""


@pytest.mark.parametrize("recipe", [n for n in names("recipe") if n not in ("base", "adapter")])
@pytest.mark.parametrize("moments", ["surviving", "factors", "reset"])
def test_every_optimizer_switches_and_trains_on(recipe, moments):
    trial = Trial(f"recipe@full={recipe}", f"switch.moments={moments}", BALANCED)
    report = trial.switch()
    surviving = len(
        [n for n, p in trial.model.named_parameters() if p.requires_grad and not is_factor(n)]
    )
    of_factors = 0 if recipe in IN_A_SUBSPACE else 16
    expected = {"reset": 0, "surviving": surviving, "factors": surviving + of_factors}[moments]
    assert report.moments_carried == expected
    trial.train(5)


def test_the_next_update_with_no_learning_rate_has_the_full_models_loss():
    trial, twin = Trial(), Trial()
    trial.switch()
    after = trial.learner.update(*batch(500), LOSS, trial.done).loss
    full = twin.learner.update(*batch(500), LOSS, twin.done).loss
    assert after == pytest.approx(full, abs=1e-6)


@pytest.mark.parametrize("factors", ["[A,B]", "[B]"])
def test_what_is_frozen_has_no_gradient_no_group_no_state_and_never_moves(factors):
    trial = Trial("full.weight_decay=0.5", f"switch.train_factors={factors}")
    trial.switch()
    frozen = {n: p for n, p in trial.model.named_parameters() if not p.requires_grad}
    assert {n for n in frozen if not is_factor(n)} == frozen_weights(trial)
    assert any(is_factor(n, "A") for n in frozen) == (factors == "[B]")
    assert not any(is_factor(n, "B") for n in frozen)
    before = {n: p.clone() for n, p in frozen.items()}
    trial.train(10)
    grouped = {id(p) for g in trial.learner.optimizer.param_groups for p in g["params"]}
    for name, p in frozen.items():
        assert p.grad is None and id(p) not in grouped and p not in trial.learner.optimizer.state
        assert torch.equal(p, before[name])


def test_the_factors_train():
    trial = Trial()
    trial.switch()
    before = snapshot(trial.model)
    trial.train(3)
    for name, p in trial.model.named_parameters():
        assert p.requires_grad != torch.equal(p, before[name]), name


def test_the_optimizer_state_round_trips_after_the_switch_with_its_groups():
    trial = Trial("adapter.factor_lr=3")
    trial.switch()
    trial.train(3)
    groups = trial.learner.optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.0, 0.05, 0.0]
    assert [g["lr_scale"] for g in groups] == [1.0, 1.0, 3.0]
    saved = trial.learner.optimizer.state_dict()
    fresh = trial.rebuild(trial.model).optimizer
    fresh.load_state_dict(saved)
    again = fresh.state_dict()
    assert again["param_groups"] == saved["param_groups"]
    for key, state in saved["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(again["state"][key][k]))
            for k, v in state.items()
        )


def test_surviving_tensors_keep_their_moments_and_the_rest_is_freed():
    trial = Trial()
    old = trial.learner.optimizer
    head = trial.model.get_parameter("head.weight")
    moment = old.state[head]["exp_avg"].clone()
    replaced = weakref.ref(trial.model.get_parameter("blocks.0.mlp.fc1.weight"))
    watched = weakref.ref(old)
    del old
    trial.switch()
    assert torch.equal(trial.learner.optimizer.state[head]["exp_avg"], moment)
    gc.collect()
    assert watched() is None, "the old optimizer is still referenced"
    assert replaced() is None, "a replaced weight is still referenced"


def test_first_moments_in_the_factor_basis_are_those_of_the_factors_own_gradients():
    trial = Trial("switch.moments=factors", BALANCED)
    weight = trial.model.get_parameter("blocks.0.mlp.fc1.weight")
    m, v = (trial.learner.optimizer.state[weight][k].clone() for k in ("exp_avg", "exp_avg_sq"))
    trial.switch()
    module = trial.model.get_submodule("blocks.0.mlp.fc1")
    A, B, state = module.lora_A, module.lora_B, trial.learner.optimizer.state
    A.grad = B.grad = None
    product = module.scaling * B @ A
    product.backward(m)
    assert torch.allclose(state[A]["exp_avg"], A.grad, atol=1e-7)
    assert torch.allclose(state[B]["exp_avg"], B.grad, atol=1e-7)
    assert torch.allclose(state[A]["exp_avg_sq"], (B**2).mT @ v)
    assert (state[B]["exp_avg_sq"] >= 0).all() and state[A]["step"] == SWITCH_AT


def test_the_learning_rate_after_the_switch_is_the_plans_also_after_a_restart():
    trial = Trial("adapter.factor_lr=3", "adapter.rewarmup_updates=0")
    plan = build_learner(tiny_vit(), trial.full, TOTAL)
    trial.switch()
    for restarted in (trial.learner, trial.rebuild(trial.model)):
        for n in (SWITCH_AT, SWITCH_AT + 1, TOTAL - 1):
            assert restarted.set_lr(n) == pytest.approx(plan.set_lr(n))
            assert restarted.optimizer.param_groups[-1]["lr"] == pytest.approx(3 * plan.set_lr(n))


def test_the_optional_rewarmup_ramps_to_the_plan_and_is_applied_once():
    trial = Trial("adapter.rewarmup_updates=4")
    plan = build_learner(tiny_vit(), trial.full, TOTAL)
    trial.switch()
    ramp = [trial.learner.set_lr(n) / plan.set_lr(n) for n in range(SWITCH_AT, SWITCH_AT + 6)]
    assert ramp == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert trial.learner.set_lr(SWITCH_AT) == trial.learner.set_lr(SWITCH_AT)


@pytest.mark.parametrize("broken", ["rank", "init", "rebuild", "drift"])
def test_an_exception_inside_leaves_the_full_phase_intact(broken, monkeypatch):
    trial, twin = Trial(), Trial()

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    if broken == "drift":
        object.__setattr__(trial.policy, "max_drift", -1.0)
    elif broken != "rebuild":
        object.__setattr__(trial.policy, broken, fail)
    modules = dict(trial.model.named_modules())
    learner = trial.learner
    with pytest.raises(SwitchFailed):
        trial.switch(rebuild=fail if broken == "rebuild" else None)
    assert trial.learner is learner and dict(trial.model.named_modules()) == modules
    trial.train(5)
    twin.train(5)
    for (name, mine), other in zip(
        snapshot(trial.model).items(), snapshot(twin.model).values(), strict=True
    ):
        assert torch.equal(mine, other), name


def test_an_injection_that_fails_halfway_leaves_every_module_in_place():
    trial, calls = Trial(), []
    modules = dict(trial.model.named_modules())

    def out_of_memory(linear, adapters):
        calls.append(linear)
        if len(calls) == 3:
            raise MemoryError("third")
        return adapted_linear(linear, adapters)

    trial.policy = replace(trial.policy, adapter=out_of_memory)
    with pytest.raises(SwitchFailed, match="third"):
        trial.switch()
    assert len(calls) == 3 and dict(trial.model.named_modules()) == modules


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_after_the_injection_leaves_the_model_training(error, monkeypatch):
    trial, calls = Trial(), []
    modules, forward = dict(trial.model.named_modules()), type(trial.model).forward

    def failing(self, images):
        calls.append(self.training)
        if len(calls) == 2:
            raise error("in the probe after the injection")
        return forward(self, images)

    monkeypatch.setattr(type(trial.model), "forward", failing)
    with pytest.raises(SwitchFailed if error is RuntimeError else KeyboardInterrupt):
        trial.switch()
    assert calls == [False, False] and trial.model.training
    assert dict(trial.model.named_modules()) == modules
    assert all(p.requires_grad for p in trial.model.parameters())


@pytest.mark.parametrize("scaling", names("switch/scaling"))
@pytest.mark.parametrize("init", ["update_svd", "weight_svd"])
def test_an_svd_starts_adapter_is_the_leading_part_whatever_the_scaling(scaling, init):
    trial = Trial(f"switch/init={init}", f"switch/scaling={scaling}", "switch.init.gain=1")
    name = "blocks.1.mlp.fc1"
    source = trial.monitor.updates()[name]
    if init == "weight_svd":
        source = trial.monitor.targets[name].weight(trial.model).clone()
    trial.switch()
    (adapter,) = trial.model.get_submodule(name).adapters().values()
    U, S, Vh = scipy.linalg.svd(source.numpy())
    leading = torch.tensor(U[:, :2] * S[:2] @ Vh[:2])
    assert torch.allclose(adapter.scaling * adapter.B @ adapter.A, leading, atol=1e-5)


def test_what_was_frozen_before_the_switch_stays_frozen():
    trial = Trial()
    trial.model.pos_embed.requires_grad_(False)
    trial.switch()
    assert not trial.model.pos_embed.requires_grad and trial.model.cls_token.requires_grad


def test_ranks_that_are_all_zero_are_refused():
    trial = Trial()
    object.__setattr__(trial.policy, "rank", lambda context: dict.fromkeys(context.updates, 0))
    with pytest.raises(SwitchFailed, match="every rank is 0"):
        trial.switch()


def test_the_switch_leaves_the_global_rng_where_it_was():
    trial = Trial("switch/init=zero_b")
    before = torch.get_rng_state()
    trial.switch()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("keep", ["[.*]", "[norm]", "[]"])
def test_a_rank_that_saves_nothing_leaves_the_layer_full_and_says_so(keep):
    trial = Trial()
    overrides = ("switch/rank=fixed", "switch.rank.rank=20", f"switch.keep={keep}")
    trial.policy = build(composed(*overrides).switch)
    report = trial.switch()
    assert report.left_full == ["blocks.0.attn.proj", "blocks.1.attn.proj"]  # 20 * 64 >= 32 * 32
    assert type(trial.model.get_submodule("blocks.0.attn.proj")) is nn.Linear
    assert trial.model.get_parameter("blocks.0.attn.proj.weight").requires_grad
    trial.train(2)


def test_when_no_rank_saves_anything_the_switch_is_refused():
    trial = Trial()
    trial.policy = build(composed("switch/rank=fixed", "switch.rank.rank=32").switch)
    with pytest.raises(SwitchFailed, match="no rank saves parameters"):
        trial.switch()


def test_earliest_and_latest_bound_the_criterion():
    history = Trial().history
    for overrides, fires in [
        ((), True),
        (("switch.earliest=12",), True),
        (("switch.earliest=13",), False),
        (("switch.latest=12",), True),
        (("switch.latest=11",), False),
    ]:
        verdict = build(composed("switch/criterion=at_start", *overrides).switch).decide(history)
        assert verdict.fires == fires, verdict.reason


def test_the_average_of_effective_weights_is_continuous_and_exact():
    trial = Trial()
    ema = WeightEMA(trial.model, 0.9)
    trial.train(2)
    ema.update(trial.model)
    probe = batch(7)[0]
    before = ema.model(probe)
    trial.switch()
    assert torch.equal(ema.model(probe), before)
    reference = {n: t.clone() for n, t in ema.model.state_dict().items()}
    for _ in range(3):
        trial.train(1)
        ema.update(trial.model)
        for name, weight in merged_state_dict(trial.model).items():
            reference[name].lerp_(weight, 1 - 0.9)
    for name, average in ema.model.state_dict().items():
        assert torch.allclose(average, reference[name], atol=1e-6), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("switched", [False, True])
def test_an_average_stays_as_it_is_where_a_weight_is_not_finite_and_names_it(switched, value):
    trial = Trial()
    ema = WeightEMA(trial.model, 0.9)
    if switched:
        trial.switch()
    assert ema.update(trial.model) is None
    kept = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    parameters = dict(trial.model.named_parameters())
    name = next(n for n in parameters if "qkv" in n and parameters[n].requires_grad)
    parameters[name].data.view(-1)[0] = value
    assert ema.update(trial.model) == name
    assert all(torch.equal(kept[n], tensor) for n, tensor in ema.state_dict().items())


@pytest.mark.parametrize("split_qkv", [False, True])
def test_bf16_autocast_and_compiled_graphs_switch(split_qkv):
    trial = Trial(
        "full.precision=bf16", "full.compile={backend:eager}", f"switch.split_qkv={split_qkv}"
    )
    report = trial.switch()
    assert report.drift <= 1e-5
    trial.train(2)
    assert all(torch.isfinite(p).all() for p in trial.model.parameters())
    assert not any("_orig_mod" in name for name in trial.model.state_dict())


@pytest.mark.parametrize("factors", ["[A,B]", "[B]"])
def test_gradient_checkpointing_with_frozen_weights_still_trains_the_adapters(factors):
    trial = Trial(f"switch.train_factors={factors}")
    trial.switch()
    trial.model.set_grad_checkpointing(True)
    trial.train(1)
    for name, p in trial.model.named_parameters():
        if is_factor(name):
            trains = is_factor(name, "B") or factors == "[A,B]"
            assert (p.grad is not None) == trains, name


def test_a_scalar_timm_optimizer_of_another_kind_also_switches():
    trial = Trial()
    lion = lambda groups: timm.optim.Lion(groups, lr=1e-4)  # noqa: E731
    object.__setattr__(trial.adapter, "optimizer", lion)
    assert trial.switch().moments_carried == 0  # nothing carries over between optimizers
    trial.train(2)


@pytest.mark.parametrize(
    "name,options",
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 32}),
        (
            "vit_base_patch16_reg4_gap_256",
            {"depth": 2, "img_size": 32, "embed_dim": 64, "num_heads": 2},
        ),
        ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 28}),
        ("eva02_base_patch14_224", {"depth": 2, "img_size": 28, "embed_dim": 64, "num_heads": 2}),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1), "img_size": 56, "embed_dim": 24, "num_heads": (2, 4)},
        ),
    ],
)
def test_other_transformers_train_and_switch(name, options):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **options)
    config = composed("switch/rank=fixed", "switch.rank.rank=2", "switch.split_qkv=true")
    policy, full, adapter = (build(config[key]) for key in ("switch", "full", "adapter"))
    monitor = UpdateMonitor(model, policy.find_targets(model), 2)
    learner = build_learner(model, full, TOTAL)
    images, labels = torch.randn(4, 3, options["img_size"], options["img_size"]), torch.arange(4)
    for n in range(2):
        learner.update(images, labels, LOSS, n + 5)
    rebuild = partial(build_learner, recipe=adapter, total_updates=TOTAL, start=2)
    scene = Scene(learner, policy, monitor, images, rebuild)
    learner, report = switch(scene, [monitor.measure(2, 1.0)])
    assert report.drift <= 1e-5 and len(report.ranks) == len(monitor.targets)
    losses = [learner.update(images, labels, LOSS, n + 5).loss for n in range(2, 8)]
    assert losses[-1] < losses[0]


def test_a_rank_policy_that_names_no_target_is_told_so():
    trial = Trial()
    object.__setattr__(trial.policy, "rank", lambda context: {"module.blocks.0.attn.qkv": 2})
    with pytest.raises(
        SwitchFailed, match="each target a rank, but 'blocks.0.attn.proj' is missing"
    ):
        trial.switch()


@pytest.mark.parametrize(
    "overrides, trained",
    [
        ((), "B"),
        (("switch/init=zero_b",), "AB"),
        (("switch/init=update_svd",), "AB"),
        (("switch/init=zero_b", "switch.train_factors=[B]"), "B"),
        (("switch.train_factors=[A,B]",), "AB"),
        (("switch/adapter=factorized",), "AB"),
        (("switch/adapter=core", "switch/init=weight_svd"), "B"),
    ],
)
def test_the_start_says_which_factors_train_unless_they_are_given(overrides, trained):
    assert list(build(composed(*overrides).switch).trained_factors) == list(trained)


def test_with_B_alone_A_stays_where_the_switch_put_it():
    trial = Trial()
    report = trial.switch()
    before = snapshot(trial.model)
    trial.train(3)
    for name, p in trial.model.named_parameters():
        assert p.requires_grad == (not is_factor(name, "A") and name not in frozen_weights(trial))
        assert p.requires_grad != torch.equal(p, before[name]), name
    both = Trial("switch.train_factors=[A,B]").switch()
    assert report.trainable_after < both.trainable_after


def frozen_weights(trial):
    """Names of the weights under adapters."""
    return {f"{name}.weight" for name in adapted_modules(trial.model)}


@pytest.mark.parametrize("share", [0.4, 0.7, 0.8])
def test_a_budget_counts_only_factors_that_train_and_is_kept(share):
    ranks = []
    for factors in ("[A,B]", "[B]"):
        trial = Trial()
        overrides = ("switch.rank.captured=null", f"switch.rank.share={share}")
        trial.policy = build(composed(*overrides, f"switch.train_factors={factors}").switch)
        report = trial.switch()
        assert report.trainable_after <= share * report.parameters and not report.left_full
        ranks.append(sum(report.ranks.values()))
    assert ranks[1] > ranks[0]


@pytest.mark.parametrize("factors", ["[A]", "[]", "[B,C]"])
def test_factors_that_cannot_train_are_refused(factors):
    with pytest.raises(
        InstantiationException, match=r"switch\.train_factors.*give \[A, B\] or \[B\]"
    ):
        build(composed(f"switch.train_factors={factors}").switch)


def test_a_residual_weight_in_bf16_has_half_the_bytes_and_says_how_far_the_logits_move():
    trial, exact = Trial("switch.residual_dtype=bf16", BALANCED), Trial()
    report = trial.switch()
    assert exact.switch().rounding_drift is None
    assert report.drift <= 1e-5 and 0 < report.rounding_drift < 0.05
    for module in adapted_modules(trial.model).values():
        assert module.weight.dtype == torch.bfloat16 and module.lora_A.dtype == torch.float32
    trial.train(3)
    merged = merged_state_dict(trial.model)
    assert all(t.dtype == torch.float32 for t in merged.values())
    for name, module in adapted_modules(trial.model).items():
        whole = module.weight.double() + module.lora_B.double() @ module.lora_A.double()
        assert torch.allclose(merged[f"{name}.weight"].double(), whole, atol=1e-7)


def test_a_start_at_zero_is_refused_beside_a_rounded_residual_weight():
    trial = Trial("switch/init=zero_b", "switch.residual_dtype=bf16")
    with pytest.raises(SwitchFailed, match="does not go with a start at B = 0"):
        trial.switch()


def test_a_residual_weight_in_bf16_leaves_bf16_training_as_it_was():
    losses = []
    for residual in ("null", "bf16"):
        trial = Trial("full.precision=bf16", f"switch.residual_dtype={residual}", BALANCED)
        trial.switch()
        losses.append([trial.learner.update(*batch(i), LOSS, i).loss for i in range(5)])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


FRONT = r"switch.freeze=[patch_embed,pos_embed,cls_token,'blocks\.0\.']"


def test_a_frozen_front_has_no_adapter_and_costs_no_backward_pass():
    trial = Trial(FRONT)
    report = trial.switch()
    assert {n for n, rank in report.ranks.items() if not rank} == {
        n for n in report.ranks if n.startswith("blocks.0.")
    }
    assert all(name.startswith("blocks.1.") for name in adapted_modules(trial.model))
    outputs = {}
    for i, block in enumerate(trial.model.blocks):
        block.register_forward_hook(lambda *args, i=i: outputs.update({i: args[2]}))
    before = snapshot(trial.model)
    trial.train(2)
    assert not outputs[0].requires_grad and outputs[1].requires_grad
    for name, p in trial.model.named_parameters():
        if name.startswith(("blocks.0.", "patch_embed", "pos_embed", "cls_token")):
            assert torch.equal(p, before[name]) and p.grad is None, name


@pytest.mark.parametrize("rank", names("switch/rank"))
def test_every_rank_policy_leaves_a_frozen_front_out(rank):
    options = {
        "budget": ["switch.rank.share=0.4"],
        "cuttlefish": ["switch.rank.multiplier=0.1"],
        "prelora": ["switch.rank.r_min=1", "switch.rank.r_max=4"],
    }
    trial = Trial(FRONT)
    overrides = [f"switch/rank={rank}", FRONT, *options.get(rank, [])]
    trial.policy = build(composed(*overrides).switch)
    report = trial.switch()
    assert all(bool(r) == n.startswith("blocks.1.") for n, r in report.ranks.items())


def test_a_target_is_frozen_by_its_weights_name_and_its_bias_with_it():
    trial = Trial(r"switch.freeze=['blocks\.0\.attn\.qkv\.weight','mlp\.fc2$']")
    report = trial.switch()
    frozen = {"blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    assert {name for name, rank in report.ranks.items() if not rank} == frozen
    for name in frozen:
        module = trial.model.get_submodule(name)
        assert not module.weight.requires_grad and not module.bias.requires_grad


def test_what_cannot_be_frozen_is_told():
    with pytest.raises(SwitchFailed, match=r"switch\.freeze leaves no target"):
        Trial("switch.freeze=[blocks]").switch()
    part = r"switch.freeze=['blocks\.0\.attn\.qkv\.q$']"
    with pytest.raises(SwitchFailed, match=r"freezes blocks\.0\.attn\.qkv\.q, but .* stays full"):
        Trial("switch.split_qkv=true", part, "switch.rank.rank=20").switch()


@pytest.mark.parametrize("full, adapter", [("blocks", "null"), ("null", "blocks")])
def test_a_switch_that_is_undone_leaves_checkpointing_as_it_was(full, adapter):
    recipes = [
        f"{phase}.activation_checkpointing={what}"
        for phase, what in (("full", full), ("adapter", adapter))
    ]
    trial = Trial(*recipes, "switch.moments=factors", BALANCED)
    for state in trial.learner.optimizer.state.values():
        state["unknown"] = torch.ones(3)
    with pytest.raises(SwitchFailed, match="unknown"):
        trial.switch()
    assert trial.model.grad_checkpointing == (full == "blocks")
    trial.learner.optimizer.state.clear()
    trial.train(1)


def test_freezing_nothing_by_mistake_is_told():
    with pytest.raises(SwitchFailed, match=r"switch\.freeze.*'blcks'.* matches no parameter"):
        Trial("switch.freeze=[blcks]").switch()


@pytest.mark.parametrize(
    "phase, what", [("full", "blocks"), ("adapter", "blocks"), ("adapter", "gelu")]
)
def test_activation_checkpointing_changes_no_loss_and_keeps_less(phase, what):
    """From a gelu on, both factors keep what B alone does not."""
    results = []
    for on in ("null", what):
        trial = Trial(f"full.activation_checkpointing={on}", "switch.train_factors=[A,B]")
        if phase == "adapter":
            trial.switch()
        trial.learner.activation_bytes = None
        losses = [trial.learner.update(*batch(i), LOSS, i).loss for i in range(4)]
        results.append((losses, trial.learner.activation_bytes))
    (losses, kept), (checkpointed, kept_less) = results
    assert losses == pytest.approx(checkpointed, abs=1e-6)
    assert kept_less < (0.6 if what == "blocks" else 0.85) * kept
