"""What comes after a switch or before its end: joint phase, stages, restarts, growth, return."""

import copy
import dataclasses

import pytest
import scipy.linalg
import torch
from hydra.errors import InstantiationException

import trials
from conf_yamls import build, composed
from runs import make_run
from switchlora.adapters import (
    LowRankLinear,
    adapted_modules,
    applied_ranks,
    merge,
    restore,
    set_mix,
)
from switchlora.errors import SwitchFailed
from switchlora.learner import moments_of
from switchlora.monitor import UpdateMonitor
from switchlora.policy import Stages
from switchlora.ranks import Budget, largest_saving_rank
from switchlora.switching import (
    grow,
    larger_ranks,
    restart,
    settle,
    take_back,
    with_frozen_front,
)
from trials import BASE, SWITCH_AT, batch

BOTH = "switch.train_factors=[A,B]"


class Trial(trials.Trial):
    """And what a run does with it after the switch."""

    def __init__(self, *overrides):
        super().__init__(*overrides)
        self.trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.probe = batch(99)[0]

    def switch(self, chosen=None):
        report = super().switch(chosen)
        self.ranks = report.ranks
        return report

    def settle(self):
        self.learner, outcome = settle(self.scene(), self.ranks)
        return outcome

    def restart(self):
        self.learner, outcome = restart(self.scene(), self.done)
        return outcome

    def grow(self, gradients, growth=2):
        ranks = larger_ranks(
            self.model, self.monitor.known, lambda adapter: growth * len(adapter.A)
        )
        self.learner, outcome = grow(self.scene(), lambda: gradients, ranks)
        return outcome

    def take_back(self):
        scene = self.scene(rebuild=lambda model: self.rebuild(model, full=True))
        self.learner, outcome = take_back(scene, self.trained)
        return outcome

    def logits(self):
        with torch.no_grad():
            return self.model.eval()(self.probe)

    def trained_now(self):
        return {n for n, p in self.model.named_parameters() if p.requires_grad}


def weights(trial):
    return {n: t.weight(trial.model).clone() for n, t in trial.monitor.known.items()}


def test_in_the_joint_phase_weights_and_factors_train_and_then_the_factors_alone():
    keep = composed("+method=prelora").switch["keep"][0]
    trial = Trial("switch.joint_epochs=1", "switch.moments=reset", "switch/init=zero_b")
    trial.policy = dataclasses.replace(trial.policy, keep=[keep])
    trial.switch()
    jointly = trial.trained_now()
    assert jointly >= set(trial.trained)
    residual = {n: m.weight.detach().clone() for n, m in adapted_modules(trial.model).items()}
    trial.train(3)
    for name, module in adapted_modules(trial.model).items():
        assert not torch.equal(module.weight, residual[name])
        assert module.lora_B.any()
    outcome = trial.settle()
    assert outcome.drift == 0 and outcome.moments_carried == 0
    targets = {t.module for t in trial.monitor.known.values()}
    gone = {f"{name}.{part}" for name in targets for part in ("weight", "bias")}
    assert trial.trained_now() == jointly - gone
    frozen = {n: m.weight.detach().clone() for n, m in adapted_modules(trial.model).items()}
    trial.train(3)
    assert all(torch.equal(m.weight, frozen[n]) for n, m in adapted_modules(trial.model).items())


def test_guided_layers_end_as_their_factors_alone_and_keep_the_moments():
    trial = Trial("switch/adapter=guided", "switch/init=weight_svd", "switch.joint_epochs=1")
    trial.switch()
    set_mix(trial.model, 0.5)
    trial.train(3)
    set_mix(trial.model, 0.0)
    before = trial.logits()
    factors = {n for n in trial.trained_now() if "lora_" in n}
    outcome = trial.settle()
    assert torch.allclose(trial.logits(), before, atol=1e-6)
    assert all(isinstance(m, LowRankLinear) for m in adapted_modules(trial.model).values())
    assert outcome.moments_carried == len(trial.trained_now()) and factors <= trial.trained_now()
    trial.train(2)


@pytest.mark.parametrize("mask", range(1, 15, 3))
def test_any_mask_of_switched_targets_trains_and_the_rest_trains_in_full(mask):
    trial = Trial()
    names = list(trial.monitor.known)
    chosen = [name for bit, name in enumerate(names) if mask >> (bit % 4) & 1]
    report = trial.switch(chosen)
    assert set(report.ranks) == set(chosen) and set(report.waiting) == set(names) - set(chosen)
    assert report.drift <= 1e-5
    before = weights(trial)
    trial.train(2)
    moved = weights(trial)
    assert all(not torch.equal(moved[n], before[n]) for n in names)
    for name in names:
        weight = trial.model.get_submodule(name).weight
        assert weight.requires_grad == (name not in chosen)
    trial.monitor.watch(report.waiting, trial.done)
    assert set(trial.monitor.references) == set(report.waiting)
    trial.train(2)
    trial.history = [trial.monitor.measure(trial.done, 2.0)]
    assert trial.switch().drift <= 1e-5
    assert set(adapted_modules(trial.model)) == set(names)
    trial.train(2)


def test_a_restart_merges_and_begins_where_the_adapter_began():
    trial = Trial("switch/init=zero_b", "switch/restart=relora")
    trial.switch()
    trial.monitor.watch(trial.monitor.known, trial.done)
    trial.train(4)
    before, logits = weights(trial), trial.logits()
    old = {n: m.lora_A.detach().clone() for n, m in adapted_modules(trial.model).items()}
    trial.restart()
    after = weights(trial)
    assert torch.allclose(trial.logits(), logits, atol=1e-5)
    for name, module in adapted_modules(trial.model).items():
        assert torch.allclose(after[name], before[name], atol=1e-6)
        assert not module.lora_B.any() and not torch.equal(module.lora_A, old[name])
        assert torch.equal(module.weight, after[name])
    trial.train(2)


def test_restarts_at_different_updates_draw_different_directions():
    trial = Trial("switch/init=zero_b", "switch/restart=relora")
    trial.switch()
    drawn = []
    for _ in range(2):
        trial.train(1)
        trial.restart()
        drawn.append(trial.model.blocks[0].mlp.fc1.lora_A.detach().clone())
    assert not torch.equal(*drawn)


def test_a_restart_from_the_svd_spans_the_updates_since_the_last_merge():
    trial = Trial("switch/init=zero_b", "switch/restart=update_svd")
    trial.switch()
    trial.monitor.watch(trial.monitor.known, trial.done)
    merged = weights(trial)
    trial.train(4)
    moved = weights(trial)
    trial.restart()
    for name, module in adapted_modules(trial.model).items():
        update = moved[name] - merged[name]
        assert torch.allclose(module.lora_B @ module.lora_A, update, atol=1e-6)  # rank 2 as well


def test_of_the_factors_moments_a_restart_prunes_a_share_and_the_others_survive():
    trial = Trial(
        "switch/init=zero_b",
        "switch/restart=relora",
        "switch.restart.prune=magnitude",
        "switch.restart.pruned=0.75",
    )
    trial.switch()
    trial.train(4)
    head = trial.learner.optimizer.state[trial.model.head.weight]["exp_avg"].clone()
    trial.restart()
    state = trial.learner.optimizer.state
    assert torch.equal(state[trial.model.head.weight]["exp_avg"], head)
    moment = state[trial.model.blocks[0].mlp.fc1.lora_B]["exp_avg"]
    assert int((moment == 0).sum()) == int(0.75 * moment.numel())


def gradients(trial):
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(target.weight(trial.model).shape, generator=generator)
        for name, target in trial.monitor.known.items()
    }


@pytest.mark.parametrize("factors", ["[A,B]", "[B]"])
def test_growing_adds_directions_outside_the_old_ones_and_keeps_the_function(factors):
    trial = Trial("switch/scaling=alpha_over_rank", f"switch.train_factors={factors}")
    trial.switch()
    trial.train(3)
    before, logits = weights(trial), trial.logits()
    old = {n: m.lora_A.detach().clone() for n, m in adapted_modules(trial.model).items()}
    moments = copy.deepcopy(moments_of(trial.model, trial.learner.optimizer))
    outcome = trial.grow(gradients(trial))
    grown = moments_of(trial.model, trial.learner.optimizer)
    for name, dim in {"lora_A": 0, "lora_B": 1}.items():
        name = f"blocks.0.mlp.fc1.{name}"
        assert (name in moments) == (name in grown) == (name[-1] in factors)
        if name in grown:
            kept, new = grown[name]["exp_avg"].split(2, dim)
            assert torch.equal(kept, moments[name]["exp_avg"]) and not new.any()
    ranks = outcome.ranks
    assert set(ranks.values()) == {4} and outcome.drift <= 1e-5
    assert applied_ranks(trial.model, trial.monitor.known, ranks) == ranks
    assert torch.allclose(trial.logits(), logits, atol=1e-5)
    for name, module in adapted_modules(trial.model).items():
        assert torch.allclose(weights(trial)[name], before[name], atol=1e-6)
        assert torch.equal(module.lora_A[:2], old[name])
        overlap = module.lora_A[2:] @ old[name].mT
        assert overlap.abs().max() < 1e-4 and not module.lora_B[:, 2:].any()
    trial.train(2)


def test_a_switch_that_is_taken_back_leaves_the_function_and_trains_everything_again():
    trial = Trial()
    trial.switch()
    trial.train(3)
    before, logits = weights(trial), trial.logits()
    surviving = trial.learner.optimizer.state[trial.model.head.weight]["exp_avg"].clone()
    outcome = trial.take_back()
    assert not adapted_modules(trial.model)
    assert trial.trained_now() == set(trial.trained)
    assert outcome.drift <= 1e-5 and torch.allclose(trial.logits(), logits, atol=1e-5)
    assert all(torch.allclose(w, before[n], atol=1e-6) for n, w in weights(trial).items())
    state = trial.learner.optimizer.state
    assert torch.equal(state[trial.model.head.weight]["exp_avg"], surviving)
    assert trial.model.blocks[0].mlp.fc1.weight not in state
    trial.train(2)
    trial.monitor.watch(trial.monitor.known, trial.done)
    trial.train(2)
    trial.switch()
    trial.train(2)


@pytest.mark.parametrize("operation", ["settle", "restart", "take_back"])
def test_what_fails_leaves_everything_as_it_was(operation, monkeypatch):
    trial = Trial("switch/init=zero_b", "switch/restart=relora")
    trial.switch()
    trial.monitor.watch(trial.monitor.known, trial.done)
    trial.train(2)
    state, flags = copy.deepcopy(trial.model.state_dict()), trial.trained_now()
    old = trial.learner

    def failing(model, full=False):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(trial, "rebuild", failing)
    with pytest.raises(SwitchFailed, match="no memory left"):
        getattr(trial, operation)()
    assert trial.learner is old and trial.trained_now() == flags
    assert all(torch.equal(t, state[n]) for n, t in trial.model.state_dict().items())
    trial.train(2)


def test_merging_and_unmerging_many_times_moves_no_bit():
    trial = Trial()
    trial.switch()
    trial.train(2)
    state = copy.deepcopy(trial.model.state_dict())
    for _ in range(300):
        replaced = merge(trial.model)
        assert not adapted_modules(trial.model)
        restore(trial.model, replaced)
    assert all(torch.equal(t, state[n]) for n, t in trial.model.state_dict().items())


def test_factorised_targets_are_the_best_approximation_of_their_rank_and_the_rest_stays_dense():
    trial = Trial()
    trial.policy = build(composed("+method=pufferfish").switch)
    trial.monitor = UpdateMonitor(trial.model, trial.policy.find_targets(trial.model), SWITCH_AT)
    before = weights(trial)
    assert trial.switch().drift > 1e-3
    assert all(name.startswith("blocks.1.") for name in adapted_modules(trial.model))
    for name, weight in weights(trial).items():
        U, S, Vh = scipy.linalg.svd(before[name].double().numpy(), full_matrices=False)
        rank = min(weight.shape) // 4
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert trial.ranks[name] == rank
        assert torch.allclose(weight.double(), torch.from_numpy(best), atol=1e-5)
    trial.train(2)


def test_a_still_front_is_frozen_outright_and_the_backward_pass_ends_behind_it():
    trial = Trial("switch/stages=by_margin", "switch.stages.still=0.4")
    names = list(trial.monitor.known)
    margins = dict.fromkeys(names, 0.5) | {"blocks.1.mlp.fc1": 0.1, "blocks.1.mlp.fc2": -0.1}
    chosen = [name for name in names if margins[name] >= 0]
    trial.policy = with_frozen_front(
        trial.model, trial.policy, trial.monitor.known, margins, chosen, trial.probe
    )
    report = trial.switch(chosen)
    assert report.waiting == ["blocks.1.mlp.fc2"]
    assert {n for n, rank in report.ranks.items() if rank} == {"blocks.1.mlp.fc1"}
    kept = {n.rpartition(".")[0] for n in trial.trained_now()}
    assert kept == {"blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "norm", "head"}
    reached = []
    trial.model.blocks[1].attn.register_full_backward_hook(lambda *_: reached.append("attn"))
    trial.model.blocks[1].mlp.fc2.register_full_backward_hook(lambda *_: reached.append("fc2"))
    trial.train(1)
    assert reached == ["fc2"]


def test_a_front_that_moves_or_that_has_adapters_is_not_frozen():
    trial = Trial("switch/stages=by_margin", "switch.stages.still=0.4")
    names = list(trial.monitor.known)
    arguments = trial.model, trial.policy, trial.monitor.known
    moving = dict.fromkeys(names, 0.5) | {names[0]: 0.3}
    assert with_frozen_front(*arguments, moving, names, trial.probe) == trial.policy
    trial.switch(names[:1])
    still = dict.fromkeys(names[1:], 0.5)
    assert with_frozen_front(*arguments, still, names[1:], trial.probe) == trial.policy


@pytest.mark.parametrize(
    "by,groups", [("target", 8), ("family", 4), ("block", 2)], ids=["target", "family", "block"]
)
def test_a_stage_takes_whole_groups_that_have_converged(by, groups):
    targets = Trial().monitor.known
    stages = Stages(by=by, interval=10, least=1)
    converged = dict.fromkeys(targets, 0.1)
    assert stages.ready(converged, targets, 9) == []
    assert stages.ready(converged, targets, 10) == list(targets)
    one_moves = converged | {"blocks.0.attn.qkv": -0.1}
    waiting = set(targets) - set(stages.ready(one_moves, targets, 10))
    assert len(waiting) == 8 // groups and "blocks.0.attn.qkv" in waiting
    assert Stages(by=by, interval=0, least=8).ready(one_moves, targets, 10) == []


@pytest.mark.parametrize(
    "options", [("switch.stages.still=0.4",), ("switch.freeze=[patch_embed]",)]
)
def test_a_second_stage_goes_on_beside_what_was_frozen_outright(options):
    trial = Trial("switch/stages=by_margin", *options)
    names = list(trial.monitor.known)
    margins = dict.fromkeys(names, 0.5)
    plain = trial.policy
    trial.policy = with_frozen_front(
        trial.model, plain, trial.monitor.known, margins, names[:3], trial.probe
    )
    trial.monitor.watch(trial.switch(names[:3]).waiting, trial.done)
    frozen = {n for n, p in trial.model.named_parameters() if not p.requires_grad}
    trial.train(2)
    trial.policy, trial.history = plain, [trial.monitor.measure(trial.done, 2.0)]
    report = trial.switch(names[3:6])
    assert set(report.ranks) == set(names[3:6]) and report.waiting == names[6:]
    assert not frozen & trial.trained_now()
    trial.train(2)


@pytest.mark.parametrize("factors", ["[A,B]", "[B]"])
def test_a_second_stage_spends_what_the_budget_leaves(factors):
    trial = Trial("switch/stages=by_margin", f"switch.train_factors={factors}")
    trial.policy = dataclasses.replace(trial.policy, rank=Budget(0.5, captured=None))
    names = list(trial.monitor.known)
    trial.monitor.watch(trial.switch(names[:4]).waiting, trial.done)
    trial.train(2)
    trial.history = [trial.monitor.measure(trial.done, 2.0)]
    report = trial.switch(names[4:])
    assert 0.48 * report.parameters < report.trainable_after <= 0.5 * report.parameters


def test_a_stage_whose_rank_would_save_nothing_leaves_its_target_full():
    trial = Trial("switch/stages=by_margin", "switch.rank.rank=20")
    report = trial.switch(["blocks.0.attn.proj"])
    assert report.left_full == ["blocks.0.attn.proj"] and not report.ranks
    assert "blocks.0.attn.proj" not in report.waiting
    assert "blocks.0.attn.proj.weight" in trial.trained_now()


def test_a_failed_end_of_the_joint_phase_leaves_exact_weights_that_train():
    trial = Trial("switch.joint_epochs=1", "switch.residual_dtype=bf16", "switch/init=update_svd")
    trial.switch()
    trial.train(2)
    module = trial.model.blocks[0].mlp.fc1
    weight = module.weight
    trial.rebuild = lambda model, full=False: 1 / 0
    with pytest.raises(SwitchFailed):
        trial.settle()
    assert module.weight is weight and weight.dtype == torch.float32 and weight.requires_grad
    trial.train(1)


def test_ranks_grow_only_as_long_as_that_saves_parameters():
    trial = Trial("switch.rank.rank=8")
    trial.switch()
    ranks = trial.grow(gradients(trial), growth=4).ranks
    shapes = {n: t.weight(trial.model).shape for n, t in trial.monitor.known.items()}
    assert ranks == {n: min(32, largest_saving_rank(shapes[n])) for n in shapes}
    with pytest.raises(SwitchFailed, match="no rank can grow"):
        for _ in range(3):
            trial.grow(gradients(trial))


FACTORIZED = ("switch/adapter=factorized", "switch/init=weight_svd")
GUIDED = ("switch/adapter=guided", "switch/init=weight_svd", "switch.joint_epochs=1")


@pytest.mark.parametrize(
    "options,says",
    [
        (("switch/adapter=guided", "switch/init=weight_svd"), "give switch.joint_epochs"),
        ((*FACTORIZED, "switch/restart=relora"), "does not go with switch.restart"),
        ((*FACTORIZED, "switch.joint_epochs=1"), "does not go with switch.joint_epochs"),
        ((*GUIDED, "switch.split_qkv=true"), "does not go with switch.split_qkv"),
        (
            (*FACTORIZED, "switch.split_qkv=true", "switch/stages=by_margin"),
            "leave out switch.split_qkv or switch.stages",
        ),
        ((*FACTORIZED, "switch.residual_dtype=bf16"), "does not go with switch.residual_dtype"),
        ((*FACTORIZED, "switch/guard=ranks"), "does not go with switch.guard"),
        (("switch.least_gain=1.5",), "use switch/adapter=factorized"),
        (("switch/stages=by_margin", "switch/restart=relora"), "leave one out"),
        (("switch/restart=relora", "switch.restart.every_epochs=0"), "every_epochs is 0"),
        (("switch.dropout=1",), "switch.dropout is 1"),
    ],
)
def test_options_that_fight_each_other_are_refused(options, says):
    with pytest.raises(InstantiationException, match=says):
        build(composed(*BASE, *options).switch)


@pytest.mark.parametrize(
    "options,says",
    [
        (("switch/adapter=factorized",), "use switch/init=weight_svd with gain 1"),
        ((*FACTORIZED, "switch.init.gain=2"), "use switch/init=weight_svd with gain 1"),
        (("switch/stages=by_margin", "switch/criterion=at_epoch"), "a margin for each target"),
        (("switch/guard=warn", "switch/criterion=at_start"), "criterion=at_start does not have"),
        (
            ("switch/guard=full", "switch/criterion=at_epoch", "switch.guard.criterion=null"),
            "give switch.guard.criterion",
        ),
        (("switch/criterion=oialr",), "monitor.bases=true"),
        (("switch.residual_dtype=bf16",), "does not go with a start at B = 0"),
        (("switch.residual_dtype=bf16", "switch/rank=energy"), "a start at B = 0"),
        (
            ("adapter/refactoring=reflora", "switch.train_factors=[B]"),
            "adapter.refactoring needs both factors",
        ),
        (
            ("adapter/refactoring=reflora", "switch/restart=relora", BOTH),
            "warmup_updates=100 is no shorter than a cycle",
        ),
        (
            (
                "switch/guard=warn",
                "+switch.guard.criterion={_target_: switchlora.criteria.BasisStability}",
            ),
            "bases=true",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_update(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        make_run(tmp_path, *options)
