"""The guard: what full training was heading for, and when an adapter is behind it."""

import numpy as np
import pytest
import torch

from conf_yamls import build, composed, names
from runs import make_run
from switchlora.learner import module_gradients
from switchlora.policy import Guard, Loss, extrapolate
from switchlora.storage import read_events


def curve(law, updates, split, phase):
    return [Loss(n, split, phase, law(n)) for n in updates]


def power(n):
    return 3.0 * n**-0.25


FULL = [
    *curve(power, range(10, 110, 10), "train", "full"),
    *curve(lambda n: 1.2 * power(n), (50, 100), "val", "full"),
]


def test_a_power_law_is_carried_on_exactly_each_split_from_its_own_level():
    assert extrapolate(FULL, "train")(800) == pytest.approx(power(800), rel=1e-9)
    assert extrapolate(FULL, "val")(800) == pytest.approx(1.2 * power(800), rel=1e-9)


def test_of_noisy_windows_the_flattest_slope_they_allow_is_taken():
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    noisy = [
        Loss(10 * n, "train", "full", power(10 * n) * float(np.exp(noise[n - 1])))
        for n in range(1, 41)
    ]
    assert extrapolate(noisy, "train")(1600) > power(1600)
    assert extrapolate(noisy, "train")(1600) == pytest.approx(power(1600), rel=0.1)


def test_a_loss_that_rises_is_not_carried_on_upwards():
    rising = curve(lambda n: 0.1 * n, range(10, 60, 10), "train", "full")
    assert extrapolate(rising, "train")(500) <= 5.0


@pytest.mark.parametrize("length", range(3))
def test_too_short_a_full_phase_is_no_yardstick(length):
    assert extrapolate(FULL[:length], "train") is None
    standing = Guard()(FULL[:length] + curve(lambda n: 9.0, (200,), "train", "adapter"), 100)
    assert not standing.behind


def standing(*excesses, split="val", **options):
    after = [
        Loss(110 + 10 * i, split, "adapter", excess * (1.2 if split == "val" else 1.0))
        for i, excess in enumerate(excesses)
    ]
    after = [loss._replace(value=loss.value * power(loss.num_updates)) for loss in after]
    return Guard(tolerance=0.1, patience=2, **options)(FULL + after, since=100)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_adapter_is_behind_only_when_it_is_so_for_the_patience(split):
    assert not standing(1.05, 1.09, split=split).behind
    assert not standing(1.2, split=split).behind
    assert not standing(1.2, 1.05, split=split).behind
    assert standing(1.05, 1.2, 1.15, split=split).behind


def test_a_validation_right_after_the_switch_is_still_full_trainings():
    at_switch = Loss(100, "val", "adapter", 1.2 * power(100))
    full = [loss for loss in FULL if loss.split == "train"]
    behind = [Loss(n, "val", "adapter", 2.0) for n in (110, 120)]
    assert Guard()([*full, at_switch, *behind], since=100).behind
    assert not Guard()([*full, *behind], since=100).behind


def test_a_loss_that_is_no_number_is_behind():
    lost = [Loss(n, "val", "adapter", float("nan")) for n in (110, 120)]
    assert Guard()(FULL + lost, since=100).behind


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_losses_without_a_logarithm_are_left_out_of_the_power_law(value):
    odd = [Loss(n, split, "full", value) for n in (0, 55, 105) for split in ("train", "val")]
    assert extrapolate(FULL + odd, "train")(800) == pytest.approx(power(800), rel=1e-9)
    alone = [loss._replace(value=value) for loss in FULL]
    after = [Loss(n, split, "adapter", 0.0) for n in (110, 120) for split in ("train", "val")]
    for full in (FULL, FULL + odd, alone):
        assert not Guard()(full + after, since=105).behind


def test_the_reason_names_loss_expectation_and_tolerance():
    reason = standing(1.2, 1.2).reason
    assert "validation loss" in reason and "20.0% above" in reason and "tolerance 10%" in reason


def test_what_lies_before_the_last_act_does_not_count():
    behind = [Loss(n, "val", "adapter", 2.0) for n in (110, 120)]
    assert Guard()(FULL + behind, since=100).behind
    assert not Guard()(FULL + behind, since=120).behind


@pytest.mark.parametrize("choice", names("switch/guard"))
def test_every_guard_builds(choice):
    guard = build(composed(f"switch/guard={choice}").switch).guard
    assert guard.act == choice


@pytest.mark.parametrize(
    "option", ["act=sing", "tolerance=-1", "patience=0", "growth=1", "rewarmup_updates=-1"]
)
def test_impossible_guards_are_refused(option):
    with pytest.raises(Exception, match=option.split("=")[0]):
        build(composed("switch/guard=full", f"switch.guard.{option}").switch)


def test_gradients_by_effective_weights_are_those_of_the_plain_model(vit, images):
    labels = torch.arange(8) % 5
    loss = torch.nn.CrossEntropyLoss()
    names = ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"]
    found = module_gradients(vit, names, loss, "fp32", images, labels)
    loss(vit(images), labels).backward()
    for name in names:
        weight = vit.get_submodule(name).weight
        assert torch.allclose(found[name], weight.grad, atol=1e-6)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    summary = make_run(
        folder,
        *(
            "model.embed_dim=64",
            "switch/guard=ranks",
            "switch.guard.patience=1",
            "adapter.lr_scale=100",
            "adapter.factor_lr=3",
        ),
        *("switch/criterion=at_epoch", "switch.criterion.epoch=0.4", "monitor.window=3"),
        *("switch/rank=fixed", "switch.rank.rank=2", "max_updates=30"),
        "full.scheduler.warmup_t=2",
    )
    return folder, summary


def test_a_guard_that_gives_ranks_says_why_and_the_run_goes_on_with_more(grown):
    folder, summary = grown
    assert [each["kind"] for each in summary["transitions"]] == ["switch", "grow"]
    assert set(summary["switch"]["ranks"].values()) == {4}
    (event,) = read_events(folder, "guard")
    assert event["guard/reason"] == summary["transitions"][1]["reason"]
    assert [segment["phase"] for segment in summary["segments"]] == ["full", "adapter", "adapter"]
    updates = [segment["num_updates"] for segment in summary["segments"]]
    assert sum(updates) == 30 and summary["phases"]["adapter"]["num_updates"] == sum(updates[1:])
