"""Criteria on histories whose answer is known by hand."""

import dataclasses

import numpy as np
import pytest

from conf_yamls import build_yaml, names
from conftest import history, stats
from switchlora.criteria import (
    LOSS,
    AllOf,
    AnyOf,
    AtEpoch,
    LossPlateau,
    PreLoRA,
    UpdateNorm,
    at_start,
    never,
)
from switchlora.stability import BasisStability, StableRank

CRITERIA = names("switch/criterion")


def settled(length=30):
    """Two targets that moved early and have been still since."""
    moves = [0.2] * 4 + [0.01] * (length - 4)
    still = [dataclasses.replace(stats(update_norm=u), basis_stability=1 - u / 2) for u in moves]
    series = {f"blocks.{i}.attn.qkv": still for i in range(2)}
    return history(series, losses=[2.0, 1.5, 1.2] + [1.0] * (length - 3))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_yaml_is_a_pure_function_that_explains_itself(name):
    criterion = build_yaml("switch/criterion", name)
    measured = settled()
    for length in range(len(measured) + 1):
        verdict = criterion(measured[:length])
        assert verdict == criterion(list(measured[:length]))
        assert verdict.reason and "\n" not in verdict.reason
        assert set(verdict.margins) <= {*measured[0].layers, LOSS}


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"at_start"}))
def test_nothing_measured_never_fires(name):
    assert not build_yaml("switch/criterion", name)([]).fires


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"never"}))
def test_every_yaml_fires_once_everything_is_still(name):
    assert build_yaml("switch/criterion", name)(settled(60)).fires


def test_never_and_at_start():
    assert not never(settled()).fires
    assert at_start([]).fires


def test_at_epoch_fires_at_the_first_measurement_on_or_after_it():
    fired = [AtEpoch(3.5)(settled()[:n]).fires for n in range(1, 7)]
    assert fired == [False, False, False, True, True, True]


def test_update_norm_waits_for_every_window_of_its_patience():
    moves = [0.1, 0.2, 0.09, 0.11, 0.09, 0.08]
    series = history({"fc1": [stats(update_norm=u) for u in moves]})
    criterion = UpdateNorm(fraction=0.5, patience=2)
    assert [criterion(series[:n]).fires for n in range(1, 7)] == [False] * 5 + [True]
    assert criterion(series).margins["fc1"] == pytest.approx(0.5 - 0.09 / 0.2)


def test_a_quorum_lets_one_moving_target_be_outvoted_and_names_it():
    still = [stats(update_norm=u) for u in (0.2, 0.02, 0.02)]
    moving = [stats(update_norm=0.2)] * 3
    series = history({"a.1.fc1": still, "a.2.fc1": still, "a.3.fc1": still, "a.4.fc1": moving})
    unanimous = UpdateNorm(patience=1)(series)
    assert not unanimous.fires and "a.4.fc1" in unanimous.reason
    assert UpdateNorm(patience=1, quorum=0.75)(series).fires


def test_stable_rank_derivative_is_numpys_gradient_as_seen_at_each_time():
    ranks = np.random.default_rng(0).uniform(3, 9, size=20)
    criterion = StableRank(patience=4)
    average = [ranks[0]]
    for value in ranks[1:]:
        average.append(2 / 5 * value + 3 / 5 * average[-1])
    seen = [np.abs(np.gradient(average[: t + 1]))[-4:].mean() for t in range(4, 20)]
    assert np.allclose(criterion.derivatives(ranks), seen)


def test_a_target_that_was_stable_once_stays_stable():
    ranks = [5.0] * 10 + [5.0, 9.0, 3.0, 12.0]
    series = history({"fc1": [stats(weight_rank=r) for r in ranks]})
    assert StableRank(epsilon=0.1, patience=5)(series).fires


def test_prelora_by_hand():
    norms = {"b.0.fc1": (100, 101, 101.5), "b.1.fc1": (100, 103, 104), "b.0.qkv": (50, 50, 50)}
    series = history(
        {name: [stats(weight_norm=n) for n in values] for name, values in norms.items()},
        losses=[2.0, 1.9, 1.85],
    )
    mean_change = (1 + 3) / 2
    assert PreLoRA(tau=mean_change + 0.01, zeta=5.01)(series).fires
    assert not PreLoRA(tau=mean_change, zeta=5.01)(series).fires  # strictly below tau
    assert not PreLoRA(tau=mean_change + 0.01, zeta=4.99)(series).fires
    assert not PreLoRA(tau=9, zeta=9)(series[:2]).fires
    verdict = PreLoRA(tau=2.5, zeta=6)(series)
    assert verdict.margins["b.1.fc1"] == pytest.approx(2.5 - 3)
    assert verdict.margins[LOSS] == pytest.approx(6 - 5)
    assert "fc1" in verdict.reason


def test_a_rotation_at_constant_norm_counts_only_for_true_update_norms():
    series = history({"fc1": [stats(weight_norm=1.0, update_norm=1.4)] * 3})
    assert PreLoRA(signal="weight_norm")(series).fires
    assert not PreLoRA(signal="update_norm")(series).fires


def test_a_family_mean_that_hides_one_moving_layer_says_so():
    still = {f"blocks.{i}.fc1": [stats(weight_norm=1.0)] * 3 for i in range(23)}
    moving = {"blocks.23.fc1": [stats(weight_norm=n) for n in (1.0, 1.5, 2.0)]}
    verdict = PreLoRA(tau=5)(history(still | moving))
    assert verdict.fires
    assert verdict.margins["blocks.23.fc1"] < 0
    assert "1 target(s) alone move by more" in verdict.reason


def test_weights_and_losses_of_zero_give_no_nan():
    verdict = PreLoRA()(history({"fc1": [stats(weight_norm=0.0)] * 3}, losses=[1.0] * 3))
    assert verdict.fires and all(np.isfinite(m) for m in verdict.margins.values())


def test_loss_plateau_measures_improvement_not_noise():
    layer = [stats()] * 4
    falling = history({"fc1": layer}, losses=[2.0, 1.8, 1.6, 1.4])
    rising = history({"fc1": layer}, losses=[1.0, 1.1, 1.2, 1.3])
    assert not LossPlateau(tolerance=1.0)(falling).fires
    assert LossPlateau(tolerance=1.0)(rising).fires


def test_all_of_needs_all_and_any_of_needs_one():
    late, soon = AtEpoch(100), AtEpoch(1)
    measured = settled()
    assert not AllOf([late, soon])(measured).fires
    assert AnyOf([late, soon])(measured).fires
    margins = AllOf([UpdateNorm(fraction=0.5), UpdateNorm(fraction=0.3)])(measured).margins
    assert margins == UpdateNorm(fraction=0.3)(measured).margins


@pytest.mark.parametrize(
    "make",
    [
        lambda: UpdateNorm(quorum=0),
        lambda: StableRank(of="grad"),
        lambda: PreLoRA(windows=1),
        lambda: PreLoRA(signal="loss"),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_criteria_hold_no_state():
    for name in CRITERIA:
        criterion = build_yaml("switch/criterion", name)
        if dataclasses.is_dataclass(criterion):
            assert criterion.__dataclass_params__.frozen
