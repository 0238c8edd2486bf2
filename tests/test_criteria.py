"""Criteria on histories whose answer is known by hand."""

import dataclasses
import math

import numpy as np
import pytest

from conf_yamls import build, composed, names
from conftest import history, stats
from switchlora.criteria import (
    LOSS,
    AllOf,
    AnyOf,
    AtEpoch,
    LossPlateau,
    PredictedCost,
    PreLoRA,
    PublishedPreLoRA,
    StableRank,
    UpdateNorm,
    at_start,
    never,
)
from switchlora.policy.policy import with_share
from switchlora.ranks import Budget, Energy
from switchlora.run.checks import check_criterion
from switchlora.storage import measurement_of

CRITERIA = names("switch/criterion")


def policys_own(name):
    """The criterion of a yaml, as a policy has it."""
    return build(composed(f"switch/criterion={name}").switch).criterion


def settled(length=30):
    """Two targets that moved early and have been still since."""
    moves = [0.2] * 4 + [0.01] * (length - 4)
    still = [dataclasses.replace(stats(update_norm=u), basis_stability=1 - u / 2) for u in moves]
    series = {f"blocks.{i}.attn.qkv": still for i in range(2)}
    return history(series, losses=[2.0, 1.5, 1.2] + [1.0] * (length - 3))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_yaml_is_a_pure_function_that_explains_itself(name):
    criterion = policys_own(name)
    measured = settled()
    for length in range(len(measured) + 1):
        verdict = criterion(measured[:length])
        assert verdict == criterion(list(measured[:length]))
        assert verdict.reason and "\n" not in verdict.reason
        assert set(verdict.margins) <= {*measured[0].layers, LOSS}


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"at_start"}))
def test_nothing_measured_never_fires(name):
    assert not policys_own(name)([]).fires


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"never"}))
def test_every_yaml_fires_once_everything_is_still(name):
    assert policys_own(name)(settled(60)).fires


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


RECORDED = {  # ||W||_F at updates 1000, 2000, 3000 and 4000
    "blocks.0.attn.qkv": (40.0, 41.0, 41.205, 41.205),  # changes of 2.5, 0.5, 0 %
    "blocks.1.attn.qkv": (50.0, 51.0, 51.51, 51.51),  # 2, 1, 0 %
    "blocks.0.mlp.fc1": (80.0, 80.8, 82.012, 82.012),  # 1, 1.5, 0 %
    "blocks.1.mlp.fc1": (60.0, 60.6, 60.903, 60.903),  # 1, 0.5, 0 %
}
LOSSES = (3.0, 2.8, 2.66, 2.6)  # changes of 6.67, 5.0, 2.26 %


def recorded():
    """What metrics.jsonl tells of four windows of two families."""
    events = []
    for t in range(4):
        event = {"num_updates": 1000 * (t + 1), "epoch": t / 2, "train/window_loss": LOSSES[t]}
        for name, norms in RECORDED.items():
            others = ("update_norm", "weight_stable_rank", "update_stable_rank", "grad_norm")
            event |= {f"weight_norm/{name}": norms[t], **{f"{key}/{name}": 1.0 for key in others}}
        events.append(event)
    return [measurement_of(event) for event in events]


def test_prelora_fires_on_a_recorded_history_where_the_hand_calculation_says():
    """D_qkv = (2.5 + 2) / 2, (0.5 + 1) / 2, 0 = 2.25, 0.75, 0; D_fc1 = 1, 1, 0.

    With three windows, the test at update 3000 sees the pairs 1 and 2, and at 4000 the pairs 2
    and 3: D_qkv <= 0.75, D_fc1 <= 1 and loss changes <= 5 %.
    """
    measured = recorded()
    fired = [PreLoRA(tau=1.01, zeta=5.01)(measured[:n]).fires for n in range(1, 5)]
    assert fired == [False, False, False, True]
    assert not PreLoRA(tau=1.01, zeta=4.99)(measured).fires
    assert not PreLoRA(tau=0.99, zeta=5.01)(measured).fires
    assert PreLoRA(tau=2.26, zeta=6.67)(measured[:3]).fires
    assert not PreLoRA(tau=2.24, zeta=6.67)(measured[:3]).fires
    margins = PreLoRA(tau=1.01, zeta=5.01)(measured).margins
    expected = dict(zip(RECORDED, (0.51, 0.01, -0.49, 0.51), strict=True)) | {LOSS: 0.01}
    assert margins == pytest.approx(expected)


@pytest.mark.parametrize(
    "accumulation, per_epoch, tests", [(2, 2502, 0), (2, 2503, 15), (1, 2502, 51), (1, 2503, 51)]
)
def test_preloras_published_counter_tests_as_often_as_its_code(accumulation, per_epoch, tests):
    """In 20 epochs with a window of 1000 updates, counted from micro-batch 0."""
    criterion = PublishedPreLoRA(counter=[accumulation, per_epoch])
    updates = range(0, 20 * per_epoch // accumulation + 1, 1000)
    assert sum(criterion.checks_at(num_updates) for num_updates in updates) == tests


def test_preloras_published_counter_measures_where_it_does_not_test():
    measured = recorded()
    blind = PublishedPreLoRA(tau=2.26, zeta=6.67, counter=[2, 2502])
    late = PublishedPreLoRA(tau=2.26, zeta=6.67, counter=[2, 2503])
    assert [blind(measured[:n]).fires for n in (3, 4)] == [False, False]
    assert "the counter is blind at update 3000" in blind(measured[:3]).reason
    assert [late(measured[:n]).fires for n in (3, 4)] == [False, True]  # 6000 and 8000 of 2503
    assert blind(measured).margins == PreLoRA(tau=2.26, zeta=6.67)(measured).margins


def test_preloras_shared_output_hides_attn_proj_behind_fc2():
    norms = {"attn.proj": (1.0, 2.0, 4.0), "mlp.fc2": (1.0, 1.0, 1.0), "mlp.fc1": (1.0, 1.0, 1.0)}
    series = {f"blocks.0.{n}": [stats(weight_norm=w) for w in ws] for n, ws in norms.items()}
    assert not PreLoRA()(history(series)).fires
    hidden = PublishedPreLoRA(shared_output=True)(history(series))
    assert hidden.fires and hidden.margins["blocks.0.attn.proj"] == 5 - 100
    del series["blocks.0.mlp.fc2"]
    alone = PublishedPreLoRA(shared_output=True)(history(series))
    assert not alone.fires and "family output changed most, 100 %" in alone.reason


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


def with_last(measured, **changes):
    """The history with other statistics of one target in its last window."""
    last = measured[-1]
    name = next(iter(last.layers))
    layers = {**last.layers, name: dataclasses.replace(last.layers[name], **changes)}
    return [*measured[:-1], dataclasses.replace(last, layers=layers)]


BY_NUMBERS = sorted(set(CRITERIA) - {"never", "at_start", "at_epoch"})
READ = ("weight_norm", "update_norm", "weight_stable_rank", "update_stable_rank")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", sorted(set(BY_NUMBERS) - {"any_of"}))  # one of its is a date
def test_no_criterion_fires_on_what_is_not_finite(name, value):
    criterion, measured = policys_own(name), settled(60)
    assert criterion(measured).fires
    lost = with_last(measured, **dict.fromkeys(READ, value), basis_stability=value)
    lost[-1] = dataclasses.replace(lost[-1], train_loss=value)
    verdict = criterion(lost)
    assert not verdict.fires and "not finite" in verdict.reason


@pytest.mark.parametrize("key", READ)
@pytest.mark.parametrize("name", names("switch/criterion"))
def test_no_policy_switches_on_a_measurement_that_is_not_finite(name, key):
    policy = build(composed(f"switch/criterion={name}").switch)
    verdict = policy.decide(with_last(settled(60), **{key: np.nan}))
    assert not verdict.fires and not verdict.margins


@pytest.mark.parametrize("losses", [(0.0,) * 4, (1.0, 0.5, 0.0, 0.0), (0.0, 1.0, 0.0, 1.0)])
@pytest.mark.parametrize("name", BY_NUMBERS)
def test_losses_and_norms_of_zero_end_in_a_verdict(name, losses):
    nothing = dataclasses.replace(stats(0.0, 0.0, 0.0, 0.0, 0.0), basis_stability=0.0)
    measured = history({"fc1": [nothing] * 12}, losses=[*losses] * 3)
    assert policys_own(name)(measured).reason


def test_a_loss_that_stays_zero_is_a_plateau_and_one_that_falls_below_zero_is_none():
    layer = [stats()] * 4
    assert LossPlateau()(history({"fc1": layer}, losses=[1.0, 0.0, 0.0, 0.0])[1:] * 2).fires
    assert not LossPlateau()(history({"fc1": layer}, losses=[-1.0, -2.0, -4.0, -8.0])).fires


def test_a_target_that_was_zero_for_a_window_is_judged_by_its_later_peak():
    moves = [stats(weight_norm=0.0, update_norm=1.0), *[stats(update_norm=0.2)] * 4]
    assert not UpdateNorm(fraction=0.5)(history({"fc1": moves})).fires


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
        lambda: PublishedPreLoRA(counter=[2]),
        lambda: StableRank(relaxed=[0.2, 2.5]),
        lambda: StableRank(relaxed=[[9, 2.5]]),  # of targets, not a share
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_criteria_hold_no_state():
    for name in CRITERIA:
        criterion = policys_own(name)
        if dataclasses.is_dataclass(criterion):
            assert criterion.__dataclass_params__.frozen


def falling(*heights):
    """Norms of two targets around these heights, behind a rise to the peak."""
    moves = (0.1, 0.2, *(0.2 * height for height in heights))
    one = [stats(update_norm=u * 1.1) for u in moves]
    other = [stats(update_norm=u * 0.9) for u in moves]
    return history({"fc1": one, "fc2": other})


def test_the_predicted_cost_falls_with_the_norms_and_with_the_share_that_trains():
    at_peak = {share: PredictedCost().points(share) for share in (0.05, 0.1, 0.2)}
    assert at_peak[0.05] == pytest.approx(1.15 * math.log(0.176 / 0.05))
    assert at_peak[0.05] > at_peak[0.1] > at_peak[0.2] == 0.3
    verdict = PredictedCost(tolerance=0.3, share=0.1)(falling(0.8, 0.5, 0.4))
    assert not verdict.fires and "cost 0.33 points at 10% trained" in verdict.reason
    assert PredictedCost(tolerance=0.34, share=0.1)(falling(0.8, 0.5, 0.4)).fires
    assert PredictedCost(tolerance=0.3, share=0.1)(falling(0.8, 0.5, 0.4, 0.4)).fires
    assert not PredictedCost(tolerance=0.3, share=0.05)(falling(0.8, 0.5, 0.4, 0.4)).fires


def test_no_cost_is_predicted_low_before_the_peak_is_past():
    rising = history({"fc1": [stats(update_norm=u) for u in (0.1, 0.2, 0.3, 0.4)]})
    assert not PredictedCost(tolerance=9.0, share=0.2)(rising).fires
    assert PredictedCost(tolerance=9.0, share=0.2)(falling(0.9, 0.8)).fires


def test_a_policy_gives_the_share_of_its_ranks_to_the_criterion_that_needs_it():
    words = ("switch/criterion=predicted_cost", "switch.rank.share=0.1")
    assert build(composed(*words).switch).criterion.share == 0.1
    none = build(composed("switch/criterion=predicted_cost", "switch/rank=fixed").switch)
    verdict = none.criterion(falling(0.1, 0.1))
    assert not verdict.fires and "give the share" in verdict.reason


def test_a_share_of_energy_is_no_share_of_parameters_and_joined_criteria_get_theirs_too():
    within = AllOf([AnyOf([PredictedCost()]), UpdateNorm()])
    assert with_share(PredictedCost(), Energy(0.9)).share is None
    found = with_share(within, Budget(share=0.1)).criteria[0].criteria[0]
    assert found.share == 0.1 and with_share(PredictedCost(share=0.2), Budget()).share == 0.2
    policy = build(composed("switch/rank=energy").switch)
    with pytest.raises(ValueError, match="give the share"):
        check_criterion(dataclasses.replace(policy, criterion=within))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "criterion", [PredictedCost(tolerance=9.0, share=0.2), StableRank(epsilon=9.0, patience=2)]
)
def test_a_window_that_could_not_be_measured_holds_a_criterion_back_only_while_it_is_recent(
    criterion, value
):
    moves = [0.4, 0.3, value, 0.3, 0.2, 0.2, 0.2]
    windows = [stats(update_norm=move, weight_rank=10 * move) for move in moves]
    fired = [criterion(history({"fc1": windows[:n]})).fires for n in range(3, 8)]
    assert not any(fired[:2]) and all(fired[2:])
