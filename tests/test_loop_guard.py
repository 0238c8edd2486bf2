"""A guard in a loop: an adapter that falls behind gets more ranks, or full training comes back."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from conftest import tiny_vit
from switchlora import LowRankSwitch
from switchlora.adapters import adapted_modules
from switchlora.policy import Guard, Standing
from test_loop import LOSS, SCHEDULERS, Loop, at, batch, trained
from test_loop_again import FIRST, SECOND, TWO

SWITCH = 8
PARTS = ("switch", "model", "optimizer", "scheduler")
BACK = 10
EARLY = {"criterion": at(SWITCH), "window": 2, "rank": 3, "ramp_updates": 2}
"""four windows of full training, then the switch"""


def guarded(kind="cosine", **options):
    """A loop whose adapters are told to have a loss that is higher by 1 than the one they have."""
    guard = Guard(**{"patience": 1, "rewarmup_updates": 2, "most": 1, **options})
    loop = Loop(SCHEDULERS[kind], **EARLY, guard=guard)
    step = loop.switch.step
    loop.switch.step = lambda loss: step(loss + loop.switch.switched)
    return loop


@dataclass(frozen=True)
class Behind(Guard):
    """Finds any adapter behind, at the end of its first window."""

    def __call__(self, losses, since):
        after = [loss for loss in losses if loss.phase != "full" and loss.num_updates > since]
        return Standing(bool(after), 1.0, "it is said to be")


def groups_of(loop):
    """The names of what each group of the optimizer trains."""
    names = {p: n for n, p in loop.model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in loop.optimizer.param_groups]


def logits(model):
    with torch.no_grad():
        return model.eval()(batch(99)[0])


def test_full_training_comes_back_in_the_same_optimizer_and_changes_no_logit():
    loop = guarded(criterion=at(99))
    all_of_it, groups = trained(loop.model), groups_of(loop)
    loop.run(BACK - 1)
    before, scheduled = {}, Loop(SCHEDULERS["cosine"], criterion=at(99)).run(BACK)

    def note(*_):
        before["logits"] = logits(loop.model)

    loop.optimizer.register_step_post_hook(note)
    with pytest.warns(UserWarning, match="the adapter is behind: train loss .* above what full"):
        loop.run(BACK)
    assert loop.fired == [SWITCH, BACK] and not loop.switch.switched
    assert not adapted_modules(loop.model) and trained(loop.model) == all_of_it
    torch.testing.assert_close(logits(loop.model), before["logits"])
    factors_were_in = len(groups_of(loop)) - len(groups)
    assert groups_of(loop) == [*groups, *[[]] * factors_were_in] and factors_were_in > 0
    assert loop.optimizer.state[loop.model.head.weight]["step"] == BACK, "it goes on"
    assert not loop.optimizer.state.get(loop.model.blocks[0].mlp.fc1.weight), "it begins anew"
    lrs = [each.scheduler.get_last_lr()[0] for each in (loop, scheduled)]
    assert lrs[0] == pytest.approx(lrs[1])
    loop.run(BACK + 4)
    measured = [each.num_updates for each in loop.switch.history]
    assert measured == [2, 4, 6, 8, 12, 14], "it is measured again"


def test_the_return_is_checked_on_the_models_inputs():
    loop = guarded(criterion=at(99)).run(SWITCH)
    changes = []

    def watched(model, inputs):
        changes.append(len(adapted_modules(model)))
        return model(inputs)

    loop.switch._inputs._given = watched
    with pytest.warns(UserWarning, match="the adapter is behind"):
        loop.run(BACK)
    assert changes == [8, 0]


@pytest.mark.filterwarnings("ignore:the adapter is behind")
def test_it_may_switch_again_and_after_the_most_returns_the_guard_only_tells():
    loop = guarded(criterion=at(16)).run(24)
    assert loop.fired == [SWITCH, BACK, 16] and loop.switch.switched_at == 16
    assert loop.switch._state.taken_back == 1
    assert {p for group in loop.optimizer.param_groups for p in group["params"]} == {
        p for p in loop.model.parameters() if p.requires_grad
    }


@pytest.mark.filterwarnings("ignore:the adapter is behind")
@pytest.mark.parametrize("kind", ["cosine", "one cycle", "timm"])
@pytest.mark.parametrize("stop", [9, 13, 17])
def test_a_loop_that_stops_before_or_after_the_return_ends_the_same(kind, stop):
    whole = guarded(kind, criterion=at(16)).run(20)
    first = guarded(kind, criterion=at(16)).run(stop)
    again = guarded(kind, criterion=at(16))
    for part in PARTS:
        saved = copy.deepcopy(getattr(first, part).state_dict())
        getattr(again, part).load_state_dict(saved)
    again.run(20)
    assert first.fired + again.fired == whole.fired == [SWITCH, BACK, 16]
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_it_gives_more_ranks_after_the_next_update_and_then_full_training():
    loop = guarded(act="ranks", growth=2, most=2, criterion=at(99))
    with pytest.warns(UserWarning, match="the adapter is behind"):
        loop.run(BACK + 1)
    assert loop.fired == [SWITCH, BACK + 1] and set(loop.switch.ranks.values()) == {6}
    with pytest.warns(UserWarning, match="the adapter is behind"):
        loop.run(24)
    assert not adapted_modules(loop.model), "ranks that save nothing do not grow"


@pytest.mark.filterwarnings("ignore:the adapter is behind")
def test_ranks_grow_between_two_stages_too():
    guard = Behind(act="ranks", growth=2)
    loop = Loop(**TWO, window=2, guard=guard).run(FIRST + 3)
    assert loop.fired == [FIRST, FIRST + 3] and loop.switch._control.measures
    assert loop.switch.ranks == {f"blocks.{n}.mlp.fc1": 4 for n in (0, 1)}
    loop.run(SECOND)
    assert len(loop.switch.ranks) == 8, "the others switch when it is time"


def test_a_guard_that_warns_changes_nothing():
    loop = guarded(act="warn")
    with pytest.warns(UserWarning, match="the adapter is behind"):
        loop.run(16)
    assert loop.fired == [SWITCH] and len(adapted_modules(loop.model)) == 8


def test_an_adapter_that_keeps_up_is_left_alone(recwarn):
    loop = Loop(**EARLY, guard=Guard(tolerance=0.5)).run(24)
    assert loop.fired == [SWITCH] and not [w for w in recwarn if "behind" in str(w.message)]


@pytest.mark.parametrize(
    "guard, says", [("full", "guard is 'full': give a Guard"), (True, "guard is True")]
)
def test_what_is_no_guard_is_refused(guard, says):
    with pytest.raises(ValueError, match=says):
        Loop(guard=guard)


class Grown(nn.Module):
    """A model that gets a further layer behind, in the middle of its training."""

    def __init__(self):
        super().__init__()
        self.vit, self.behind = tiny_vit(depth=1), nn.Identity()

    def forward(self, images):
        return self.behind(self.vit(images))


@pytest.mark.filterwarnings("ignore:the adapter is behind")
def test_what_was_added_or_let_train_before_the_switch_trains_again_when_full_training_is_back():
    torch.manual_seed(0)
    model = Grown()
    model.vit.norm.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = Behind(patience=1, most=1)
    options = {"criterion": at(4), "window": 2, "rank": 2, "updates_per_epoch": 1}
    switch = LowRankSwitch(model, optimizer, guard=guard, **options)
    fired = []
    for number in range(6):
        if number == 2:
            model.behind = nn.Linear(5, 5)
            optimizer.add_param_group({"params": model.behind.parameters()})
            model.vit.norm.requires_grad_(True)
        images, labels = batch(number)
        optimizer.zero_grad()
        loss = LOSS(model(images), labels)
        loss.backward()
        optimizer.step()
        fired.append(switch.step(loss))
    assert fired == [False, False, False, True, False, True]
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert set(model.behind.parameters()) == set(optimizer.param_groups[1]["params"])
