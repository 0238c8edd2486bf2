"""Timing in turns, with a clock that moves only when a step works."""

from collections import Counter
from itertools import islice, pairwise

import pytest
import torch

from switchlora.cost import (
    by_name,
    clock_of,
    interleaved_seconds,
    seconds_of,
    take_turns,
    timing,
    work_clock_of,
)


class Workshop:
    """Steps that take known seconds, the clock that tells them, and the order of their calls."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def clock(self):
        return self.now

    def step(self, name, *seconds):
        """A step that takes these seconds in turn, and the last ones from then on."""
        left = list(seconds)

        def work():
            self.calls.append(name)
            self.now += left.pop(0) if left[1:] else left[0]

        return work

    def laps(self, **seconds):
        """A lap of each step, timed with the clock."""
        steps = {name: self.step(name, length) for name, length in seconds.items()}
        return {
            name: lambda step=step: seconds_of(step, self.clock) for name, step in steps.items()
        }


@pytest.fixture
def workshop():
    return Workshop()


def test_in_a_round_each_lap_is_made_once_in_the_order_given(workshop):
    rounds = list(islice(take_turns(workshop.laps(a=1, b=2, c=3), warmup=0), 3))
    assert workshop.calls == list("abcabcabc")
    assert rounds == [{"a": 1.0, "b": 2.0, "c": 3.0}] * 3


def test_rounds_of_the_warm_up_are_made_and_not_counted(workshop):
    laps = {"a": lambda: seconds_of(step, workshop.clock)}
    step = workshop.step("a", 100, 50, 1)  # the first two calls settle
    rounds = take_turns(laps, warmup=2)
    assert by_name(islice(rounds, 3)) == {"a": [1.0, 1.0, 1.0]}
    assert len(workshop.calls) == 5


def test_no_round_is_begun_that_nobody_asked_for(workshop):
    rounds = take_turns(workshop.laps(a=1, b=1), warmup=1)
    assert workshop.calls == []
    next(rounds)
    assert workshop.calls == list("abab")


def test_a_shuffled_order_is_new_in_each_round_and_the_same_on_each_rank(workshop):
    laps = workshop.laps(a=1, b=1, c=1, d=1, e=1, f=1)
    orders = [tuple(found) for found in islice(take_turns(laps, 0, shuffle=True), 6)]
    assert all(Counter(order) == Counter("abcdef") for order in orders)
    assert len(set(orders)) == 6
    again = [tuple(found) for found in islice(take_turns(laps, 0, shuffle=True), 6)]
    later = [tuple(found) for found in islice(take_turns(laps, 2, shuffle=True), 4)]
    assert again == orders and later == orders[2:]


@pytest.mark.parametrize("slow", [1e-3, 1e3])
def test_a_slow_step_does_not_change_the_figures_of_another(workshop, slow):
    steps = {"other": workshop.step("other", 0.5), "slow": workshop.step("slow", slow)}
    found = interleaved_seconds(steps, 4, workshop.clock)
    assert found["other"] == [0.5] * 4
    assert found["slow"] == pytest.approx([slow] * 4)


def test_a_slow_hour_of_the_machine_slows_one_round_of_all_steps(workshop):
    steps = {name: workshop.step(name, 1, 1, 1, 7, 1) for name in "ab"}  # the first two warm up
    assert interleaved_seconds(steps, 3, workshop.clock) == dict.fromkeys("ab", [1, 7, 1])


def test_short_steps_are_repeated_in_blocks_and_told_by_the_call(workshop):
    steps = {"short": workshop.step("short", 2**-11), "long": workshop.step("long", 1)}
    found = interleaved_seconds(steps, 3, workshop.clock)
    assert found == {"short": [2**-11] * 3, "long": [1.0] * 3}
    blocks = workshop.calls[4:]  # two calls of each step come before
    assert blocks == [*["short"] * 4, "long"] * 3
    changes = sum(one != other for one, other in pairwise(workshop.calls))
    assert changes == 7


def test_a_clock_waits_for_the_queued_work_of_its_device(workshop, monkeypatch):
    queued = []

    def synchronise(device):
        assert device == torch.device("cuda", 1)
        workshop.now += sum(queued)
        queued.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronise)
    monkeypatch.setattr(timing, "perf_counter", workshop.clock)
    clock = clock_of(torch.device("cuda", 1))
    queued.append(5.0)  # is nobody's
    assert seconds_of(lambda: queued.append(2.0), clock) == 2.0
    assert not queued


def test_a_processor_is_timed_by_its_own_work_and_a_gpu_by_the_wall(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    name, clock = work_clock_of(torch.device("cpu"))
    assert (name, clock) == ("processor", timing.process_time)
    name, clock = work_clock_of(torch.device("cuda"))
    assert name == "wall" and clock() > 0
