"""One object decides when a model changes, for our trainer and for anyone's loop."""

import copy
import itertools

import pytest
import torch

from conf_yamls import composed
from runs import SHORT
from switchlora.adapters import adapted_modules
from switchlora.criteria import Verdict
from switchlora.policy import Decision
from switchlora.run import prepare
from switchlora.switching import Controller
from switchlora.train import train_and_finish
from test_loop import SCHEDULERS, TEN, Loop, at, plain_loop
from test_loop_again import FIRST, GROWTH, RESTARTS

PARTS = ("switch", "model", "optimizer", "scheduler")
PLAIN = {"criterion": at(FIRST), "ramp_updates": 2, "rank": 3}


def test_what_the_controller_decides_a_run_and_a_plain_loop_do(monkeypatch, tmp_path):
    def half(self):
        """Switch every other target in the second window, whatever the policy says."""
        now = self.state.num_updates
        self.state.verdict = Verdict(True, {}, "half of them")
        chosen = list(self.monitor.targets)[::2] if now == 10 else []
        return Decision(now, self.state.verdict, chosen)

    monkeypatch.setattr(Controller, "decide", half)
    config = composed(*SHORT, *TEN, "epochs=2", "switch/criterion=never")
    run = prepare(config, tmp_path / "ours")
    ours = train_and_finish(run)
    switch, _, changes = plain_loop(config, tmp_path / "theirs")
    assert changes == [each["num_updates"] for each in ours["transitions"]] == [10]
    assert switch.ranks == ours["switch"]["ranks"] and len(switch.ranks) == 2
    assert switch.verdict == run.state.verdict == Verdict(True, {}, "half of them")
    assert set(switch.watch.monitor.targets) == set(run.monitor.targets)
    assert len(run.monitor.targets) == 2


def gone_on(before, after, stop):
    """A loop that loads what another one with other arguments saved."""
    first, again = (Loop(SCHEDULERS["lambda"], **{**PLAIN, **each}) for each in (before, after))
    first.run(stop)
    for part in PARTS:
        saved = copy.deepcopy(getattr(first, part).state_dict())
        getattr(again, part).load_state_dict(saved)
    return first, again


def test_a_loop_restarts_as_its_arguments_say_also_when_the_state_knew_no_restarts():
    first, again = gone_on({}, RESTARTS, 9)
    targets = first.switch.watch.monitor.known.items()
    weights = {name: target.weight(first.model).clone() for name, target in targets}
    again.run(10)
    torch.testing.assert_close(again.switch.watch.monitor.references, weights, rtol=0, atol=0)
    assert again.run().fired == [13, 17, 21]  # 4 updates, from the update at which it was loaded


def test_a_loop_without_restarts_ends_those_of_a_state():
    _, again = gone_on(RESTARTS, {}, 9)
    assert not again.run().fired and not again.switch.watch.monitor.targets


def test_a_loop_lets_ranks_grow_also_when_the_state_knew_no_growth():
    _, again = gone_on({}, GROWTH, 9)
    assert again.run(16).fired == Loop(SCHEDULERS["lambda"], **GROWTH).run(16).fired[1:]


def test_what_failed_three_times_in_the_same_way_is_not_tried_again():
    loop = Loop(window=2, criterion=at(2)).run(1)
    drifts = itertools.count(100, 100)

    def broken(model, batch):
        return model(batch) + (next(drifts) if adapted_modules(model) else 0)

    loop.switch._inputs._given = broken
    with pytest.warns(UserWarning, match="the switch failed and was undone"):
        loop.run(16)
    assert len(loop.switch.failures) == 3 and not loop.switch.switched
