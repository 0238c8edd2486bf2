"""Criteria that read spectra, on histories whose answer is known by hand."""

from dataclasses import replace

import numpy as np
import pytest

from conf_yamls import build_yaml
from conftest import history, stats
from switchlora.criteria import BasisStability, StableRank


def of_ranks(**series):
    """A history of stable ranks, one list a target."""
    return history({n: [stats(weight_rank=r) for r in ranks] for n, ranks in series.items()})


def of_cosines(**series):
    """A history of basis stabilities, one list a target."""
    rows = {n: [replace(stats(), basis_stability=c) for c in cs] for n, cs in series.items()}
    return history(rows)


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


def test_epsilon_is_relaxed_for_the_last_targets():
    """With P = 1 the derivative is |rho_t - rho_(t-1)|: 0, 2.5 and 4 here."""
    measured = of_ranks(a=[5, 5, 5, 5], b=[5, 7.5, 10, 12.5], c=[10, 14, 18, 22])
    twice = StableRank(epsilon=1, patience=1, relaxed=[[0.7, 3], [0.4, 5]])
    assert [twice(measured[:n]).fires for n in range(1, 5)] == [False, False, False, True]
    assert twice(measured[:3]).margins == {"a": 3, "b": 0.5, "c": -1}
    assert "derivative of the weight stable rank <= 5" in twice(measured).reason
    assert StableRank(epsilon=1, patience=1, relaxed=[[0.7, 3]])(measured).margins["c"] == -1
    assert StableRank(epsilon=1, patience=1)(measured).margins["b"] == -1.5


@pytest.mark.parametrize(
    "targets, left, slope, fires",
    [
        *((48, 10, 1, False), (48, 9, 1, True), (48, 5, 2, False), (48, 4, 2, True)),
        *((12, 3, 1, False), (12, 2, 1, True), (12, 2, 2, False), (12, 1, 2, True)),
    ],
)
def test_cuttlefishs_yaml_relaxes_for_the_shares_that_its_code_has_of_deit(
    targets, left, slope, fires
):
    """Derivatives of ramps come near the slope: 0.411 < 1 < 2.5 * 0.411 < 2 < 5 * 0.411."""
    moving = {f"moving{i}": [10 + slope * t for t in range(30)] for i in range(left)}
    still = {f"still{i}": [10] * 30 for i in range(targets - left)}
    assert build_yaml("switch/criterion", "cuttlefish")(of_ranks(**moving, **still)).fires == fires


def test_whole_stable_ranks_move_in_steps_only():
    wavering, stepping = of_ranks(a=[4.1, 4.9, 4.2]), of_ranks(a=[4.9, 5.1, 6.1])
    assert StableRank(patience=1, integer=True)(wavering).fires
    assert not StableRank(patience=1)(wavering).fires
    assert StableRank(patience=1, integer=True)(stepping).margins["a"] == pytest.approx(0.1 - 1)


def test_bases_are_stable_from_the_threshold_on_and_not_before_the_delay():
    measured = of_cosines(a=[0.5, 0.99, 0.999], b=[0.9, 0.98, 0.99])
    criterion = BasisStability(threshold=0.99, delay=0)
    assert [criterion(measured[:n]).fires for n in range(1, 4)] == [False, False, True]
    assert BasisStability(threshold=0.99, quorum=0.5, delay=2)(measured[:2]).fires
    assert criterion(measured[:2]).margins == pytest.approx({"a": 0.0, "b": -0.01})
    late = BasisStability(threshold=0.99, delay=4)(measured)
    assert not late.fires and late.reason == "window 3 of a delay of 4"


def test_bases_that_were_not_measured_are_asked_for():
    with pytest.raises(ValueError, match=r"not measured of fc1: set monitor\.bases=true"):
        BasisStability()(history({"fc1": [stats()]}))
