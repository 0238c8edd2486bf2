"""What comes after the first adapters in a loop: further stages, a joint phase, restarts."""

import copy

import pytest
import torch
from torch import nn

from conftest import tiny_vit
from switchlora import LowRankSwitch
from switchlora.adapters import Factors, adapted_modules, is_factor, merge
from switchlora.criteria import Verdict
from switchlora.initializers import gaussian
from switchlora.policy import InRank, Restart, Stages
from test_loop import LOSS, SCHEDULERS, SOON, UPDATES, Loop, at, batch, trained

FIRST, SECOND = 6, 12
EARLY = ("fc1", ".k", "query")


def in_two(history):
    """A criterion for which a part converges at the first update; it fires at the second."""
    now = history[-1]
    margins = {}
    for name in now.layers:
        margins[name] = now.num_updates - (FIRST if name.endswith(EARLY) else SECOND)
    return Verdict(now.num_updates >= SECOND, margins, "it is time")


TWO = {"criterion": in_two, "stages": Stages(interval=1)}


def held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_a_second_stage_leaves_the_factors_of_the_first_in_their_groups_with_their_moments():
    seen = []
    loop = Loop(**TWO, on_switch=seen.append).run(SECOND - 1)
    assert loop.fired == [FIRST] and loop.switch.switched
    assert set(loop.switch.ranks) == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}
    places = {p: n for n, group in enumerate(loop.optimizer.param_groups) for p in group["params"]}
    first = loop.trained_factors()
    loop.optimizer.param_groups[places[next(iter(first.values()))]]["weight_decay"] = 0.3
    loop.run(SECOND)
    assert loop.fired == [FIRST, SECOND] and loop.switch.switched_at == FIRST
    assert len(loop.switch.ranks) == len(adapted_modules(loop.model)) == 8
    assert sorted(map(id, held(loop.optimizer))) == sorted(
        id(p) for p in loop.model.parameters() if p.requires_grad
    )
    for factor in first.values():
        assert factor in set(loop.optimizer.param_groups[places[factor]]["params"])
        assert loop.optimizer.state[factor]["step"] == SECOND - FIRST
    assert loop.optimizer.param_groups[places[next(iter(first.values()))]]["weight_decay"] == 0.3
    assert [len(report.ranks) for report in seen] == [2, 6] and len(loop.switch.report.ranks) == 8
    assert [len(measured.layers) for measured in loop.switch.history] == [8, 6]
    loop.run()
    assert loop.switch.num_updates == 24 and len(loop.switch.history) == 2


def of_two_sizes(context):
    """Ranks whose matched rates differ by a factor of 2."""
    return {name: 2 if name.endswith("fc1") else 8 for name in context.updates}


@pytest.mark.parametrize("kind", ["lambda", "one cycle", "sequence", "timm"])
def test_schedulers_go_on_after_each_stage(kind):
    loop = Loop(SCHEDULERS[kind], rank=of_two_sizes, train_factors=["A", "B"], **TWO).run(20)
    weights, of_A, first, second = [group["lr"] for group in loop.optimizer.param_groups]
    assert loop.fired == [FIRST, SECOND] and of_A == pytest.approx(weights)
    assert second / weights == pytest.approx(2**3.5) and first == pytest.approx(2 * second)
    alone = Loop(SCHEDULERS[kind], criterion=at(99)).run(20)
    assert weights == pytest.approx(alone.optimizer.param_groups[0]["lr"], rel=1e-6)


def sliced():
    return Loop(SCHEDULERS["timm"], **TWO, split_qkv=True, rank=of_two_sizes)


@pytest.fixture(scope="module")
def whole():
    return sliced().run()


@pytest.mark.parametrize("stop", [FIRST, 9, 15])
def test_a_loop_that_stops_between_two_stages_ends_the_same(whole, stop):
    first, again = sliced().run(stop), sliced()
    for part in ("switch", "model", "optimizer", "scheduler"):
        saved = copy.deepcopy(getattr(first, part).state_dict())
        getattr(again, part).load_state_dict(saved)
    again.run()
    assert first.fired + again.fired == whole.fired == [FIRST, SECOND]
    assert again.switch.ranks == whole.switch.ranks and len(whole.switch.ranks) == 12
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_second_stage_that_fails_leaves_the_first_as_it_was_and_is_tried_again():
    loop = Loop(SCHEDULERS["cosine"], **TWO).run(SECOND - 1)
    names, layout = trained(loop.model), set(adapted_modules(loop.model))

    def broken(model, batch):
        return model(batch) + len(adapted_modules(model))

    loop.switch._inputs._given = broken
    loop.optimizer.step()
    before = copy.deepcopy(
        (loop.model.state_dict(), loop.optimizer.state_dict(), loop.scheduler.state_dict())
    )
    with pytest.warns(UserWarning, match="the switch failed and was undone"):
        assert not loop.switch.step(1.0)
    after = (loop.model.state_dict(), loop.optimizer.state_dict(), loop.scheduler.state_dict())
    assert trained(loop.model) == names and set(adapted_modules(loop.model)) == layout
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    loop.switch._inputs._given = None
    loop.run()
    assert loop.fired == [FIRST, 18] and len(loop.switch.ranks) == 8


RESTARTS = {"criterion": at(FIRST), "restart": Restart(every_epochs=4), "ramp_updates": 2}
JOINT = {"criterion": at(FIRST), "joint_epochs": 5, "ramp_updates": 2}

GROWTH = {
    "criterion": at(FIRST),
    "ramp_updates": 2,
    "rank": 3,
    "growth": InRank(every_updates=4, earliest=7, threshold=0.999, buffer=2, most=0.5),
}


@pytest.mark.parametrize("kind", ["one cycle", "timm"])
def test_restarts_keep_the_number_of_groups_and_each_factors_multiple_of_the_rate(kind):
    def uneven(weight, update, rank):
        """A start whose size, and so its matched rate, differs from draw to draw."""
        A, B = gaussian(weight, update, rank)
        return Factors(A * 2 ** float(torch.randint(-4, 5, ())), B)

    loop = Loop(SCHEDULERS[kind], **RESTARTS, init=uneven)
    scales, most = set(), 0
    while loop.switch.num_updates < UPDATES - 1:
        loop.run(loop.switch.num_updates + 1)
        weights, *groups = loop.optimizer.param_groups
        places = {p: n for n, group in enumerate(groups) for p in group["params"]}
        assert set(places) == set(loop.factors().values())
        for module in adapted_modules(loop.model).values():
            for factor, scale in loop.switch.rates(module, loop.optimizer):
                assert groups[places[factor]]["lr"] == pytest.approx(scale * weights["lr"])
                scales.add(scale)
        most = max(most, sum(bool(group["params"]) for group in groups))
    assert loop.fired == [6, 10, 14, 18, 22]
    assert len(groups) == most < len(scales)


def test_a_restart_gives_the_model_new_factors_and_leaves_what_it_computes():
    loop = Loop(**RESTARTS).run(9)
    old = set(loop.factors().values())
    loop.run(10)
    assert loop.fired == [6, 10] and not old & {*held(loop.optimizer), *loop.optimizer.state}
    assert all(loop.optimizer.state[p]["step"] == 4 for p in loop.trained_factors().values())
    assert loop.switch.switched_at == 6 and loop.switch.report.drift < 1e-5


def test_weights_and_factors_train_together_in_the_joint_phase_and_then_factors_alone():
    loop = Loop(**JOINT).run(10)
    names = {f"{name}.weight" for name in adapted_modules(loop.model)}
    assert loop.fired == [6] and len(names) == 8
    assert names | {f"{name}.lora_B" for name in adapted_modules(loop.model)} <= trained(
        loop.model
    )
    moments = [loop.optimizer.state[loop.model.get_parameter(name)] for name in names]
    assert all(state["step"] == 10 for state in moments)
    loop.run(11)
    frozen = {name: loop.model.get_parameter(name).detach().clone() for name in names}
    assert loop.fired == [6, 11] and not names & trained(loop.model)
    loop.run()
    assert loop.fired == [6, 11]
    for name, weight in frozen.items():
        assert torch.equal(loop.model.get_parameter(name), weight)


@pytest.mark.parametrize(
    "options, stops", [(RESTARTS, (10, 12)), (JOINT, (6, 9, 11, 13)), (GROWTH, (8, 10, 12))]
)
def test_a_loop_that_stops_between_two_changes_ends_the_same(options, stops):
    def loop():
        return Loop(SCHEDULERS["lambda"], **options)

    ends = loop().run(16)
    for stop in stops:
        first, again = loop().run(stop), loop()
        for part in ("switch", "model", "optimizer", "scheduler"):
            saved = copy.deepcopy(getattr(first, part).state_dict())
            getattr(again, part).load_state_dict(saved)
        again.run(16)
        assert first.fired + again.fired == ends.fired and len(ends.fired) > 1
        ours, theirs = again.model.state_dict(), ends.model.state_dict()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, update, what, changes",
    [(RESTARTS, 10, "restart", [6, 14, 18, 22]), (JOINT, 11, "end of the joint phase", [6])],
)
def test_a_change_that_fails_leaves_all_as_it_was(options, update, what, changes):
    loop = Loop(SCHEDULERS["cosine"], **options).run(update - 1)
    factors, names = set(loop.factors().values()), trained(loop.model)
    seen = []

    def broken(model, batch):
        seen.append(batch)
        return model(batch) + len(seen)

    loop.switch._inputs._given = broken
    loop.optimizer.step()
    before = copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict()))
    with pytest.warns(UserWarning, match=f"the {what} failed and was undone"):
        assert not loop.switch.step(1.0)
    after = (loop.model.state_dict(), loop.optimizer.state_dict())
    assert factors == set(loop.factors().values()) and names == trained(loop.model)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    loop.switch._inputs._given = None
    assert loop.run().fired == changes


def test_ranks_grow_by_a_rule_into_the_directions_of_the_weights_gradient():
    loop = Loop(SCHEDULERS["one cycle"], **GROWTH).run(10)
    assert loop.fired == [6] and len(loop.switch._larger) == 8
    name = "blocks.1.mlp.fc1"
    merged = copy.deepcopy(loop.model)
    merge(merged)
    images, labels = batch(10)
    LOSS(merged(images), labels).backward()
    gradient = merged.get_submodule(name).weight.grad
    places = {factor: loop.optimizer.state[factor] for factor in loop.trained_factors().values()}
    loop.run(11)
    assert loop.fired == [6, 11] and set(loop.switch.ranks.values()) == {4}
    A, B = (loop.factors()[f"{name}.lora_{factor}"] for factor in "AB")
    outside = gradient - gradient @ torch.linalg.pinv(A[:3]) @ A[:3]
    wanted = torch.linalg.svd(outside).Vh[0]
    cosine = torch.nn.functional.cosine_similarity(wanted, A[3], dim=0)
    assert abs(cosine) > 0.999 and not B[:, 3].any() and B[:, :3].any()
    assert not set(places) & {*loop.optimizer.state, *held(loop.optimizer)}
    moments = loop.optimizer.state[B]
    assert moments["step"] == 5
    assert moments["exp_avg"][:, :3].any() and not moments["exp_avg"][:, 3].any()


def test_a_state_that_was_taken_between_two_stages_stays_as_it_was():
    loop = Loop(**TWO).run(FIRST)
    state = loop.switch.state_dict()
    loop.run(SECOND)
    assert len(state["ranks"]) == 2 and len(loop.switch.ranks) == 8


def test_a_still_front_is_frozen_outright():
    loop = Loop(criterion=in_two, stages=Stages(interval=1, by="block", still=0.0)).run()
    assert loop.fired == [SECOND] and set(loop.switch.ranks.values()) == {0}
    assert not adapted_modules(loop.model)
    assert trained(loop.model) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_parameters_of_another_model_stay_in_the_optimizer_with_their_state():
    torch.manual_seed(0)
    model, other = tiny_vit(), nn.Linear(5, 5)
    optimizer = torch.optim.AdamW([*model.parameters(), *other.parameters()], lr=1e-3)
    switch = LowRankSwitch(model, optimizer, **SOON)
    for number in range(4):
        images, labels = batch(number)
        optimizer.zero_grad()
        LOSS(other(model(images)), labels).backward()
        optimizer.step()
        switch.step()
    assert switch.switched and any(map(is_factor, trained(model)))
    assert optimizer.state[other.weight]["step"] == 4
    assert set(other.parameters()) <= set(held(optimizer))


PARTS = ("switch", "model", "optimizer", "scheduler")


def states_of(loop):
    return copy.deepcopy({part: getattr(loop, part).state_dict() for part in PARTS})


def rates_until(loop, update):
    """The rates inside of each step of the optimizer."""
    rates = []
    hook = loop.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    loop.run(update)
    hook.remove()
    return rates


def test_a_state_that_is_loaded_in_place_has_the_ramp_that_it_had():
    loop = Loop(SCHEDULERS["lambda"], criterion=at(FIRST), ramp_updates=9).run(8)
    saved = states_of(loop)
    first = rates_until(loop, 12)
    for part in PARTS:
        getattr(loop, part).load_state_dict(saved[part])
    assert len(first) == 4 and rates_until(loop, 12) == first


@pytest.mark.parametrize(
    "options, stops",
    [
        ({"criterion": at(FIRST)}, (5, 8)),
        (JOINT, (8, 14)),
        (TWO, (8, 14)),
    ],
    ids=["before the switch", "joint phase", "first stage"],
)
def test_a_state_from_before_a_change_of_the_phase_is_refused_in_place(options, stops):
    loop = Loop(SCHEDULERS["lambda"], **options).run(stops[0])
    saved = states_of(loop)["switch"]
    loop.run(stops[1])
    now = states_of(loop)
    with pytest.raises(ValueError, match="into a new LowRankSwitch over a new model"):
        loop.switch.load_state_dict(saved)
    assert str(states_of(loop)) == str(now)
