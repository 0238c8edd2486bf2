"""Rank policies against SciPy's spectra and hand calculations."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import scipy.linalg
import torch

from conf_yamls import build_yaml, names
from conftest import history, stats, tiny_vit
from switchlora.adapters import find_targets
from switchlora.errors import NothingMeasured
from switchlora.ranks import (
    Budget,
    Energy,
    Fixed,
    ParameterRatio,
    PreLoRARanks,
    RankRatio,
    StableRankRanks,
    SwitchContext,
    Weights,
    saves_parameters,
)

SHAPES = {"blocks.0.fc1": (48, 24), "blocks.1.fc1": (48, 24), "blocks.0.fc2": (24, 48)}


def context(updates=None, measured=None, total=20_000, other=500):
    """A switch with random updates of known shapes."""
    generator = torch.Generator().manual_seed(0)
    updates = updates or {
        n: (i + 1) * torch.randn(shape, generator=generator)
        for i, (n, shape) in enumerate(SHAPES.items())
    }
    if measured is None:
        measured = history(
            {n: [stats(grad_norm=1.0), stats(grad_norm=1.0 + i)] for i, n in enumerate(updates)}
        )
    return SwitchContext(measured, updates, dict.fromkeys(updates, 12.0), total, other)


@pytest.mark.parametrize("name", names("switch/rank"))
def test_every_yaml_gives_each_target_one_possible_rank(name):
    given = context()
    ranks = build_yaml("switch/rank", name)(given)
    assert set(ranks) == set(given.updates)
    assert all(0 <= r <= 48 and isinstance(r, int) for r in ranks.values())


def test_fixed_refuses_a_rank_above_the_matrix_by_name():
    with pytest.raises(ValueError, match=r"rank=25 does not fit blocks\.0\.fc1"):
        Fixed(25)(context())


def test_prelora_by_hand():
    changes = [0.0, 0.1, 0.5, 0.51, 1.0]
    measured = history(
        {f"blocks.{i}.fc1": [stats(), stats(grad_norm=1 + c)] for i, c in enumerate(changes)}
    )
    updates = {f"blocks.{i}.fc1": torch.ones(64, 64) for i in range(5)}
    ranks = PreLoRARanks(r_min=4, r_max=32)(context(updates, measured))
    assert list(ranks.values()) == [4, 4, 8, 16, 32]


def test_prelora_with_equal_changes_gives_the_least_rank_not_nan():
    measured = history({n: [stats(), stats()] for n in SHAPES})
    ranks = PreLoRARanks(r_min=4, r_max=32)(context(measured=measured))
    assert set(ranks.values()) == {4}


@pytest.mark.parametrize("lost", SHAPES)
def test_prelora_names_the_target_whose_signal_is_not_finite(lost):
    changed = {n: stats(grad_norm=math.nan if n == lost else 2.0) for n in SHAPES}
    measured = history({n: [stats(), changed[n]] for n in SHAPES})
    with pytest.raises(ValueError, match=f"that of {re.escape(lost)} is not finite"):
        PreLoRARanks(r_min=4, r_max=32)(context(measured=measured))


def test_prelora_compares_within_a_family_or_over_all():
    grads = {"b.0.fc1": 1.1, "b.1.fc1": 1.2, "b.0.fc2": 2.0, "b.1.fc2": 3.0}
    measured = history({n: [stats(), stats(grad_norm=g)] for n, g in grads.items()})
    given = context({n: torch.ones(64, 64) for n in grads}, measured)
    assert list(PreLoRARanks(4, 32)(given).values()) == [4, 32, 4, 32]
    assert list(PreLoRARanks(4, 32, mode="all")(given).values()) == [4, 4, 8, 32]


def test_stable_rank_rounds_up_and_scales_as_cuttlefish_does():
    measured = history({n: [stats(weight_rank=4.2, update_rank=2.1)] for n in SHAPES})
    assert set(StableRankRanks()(context(measured=measured)).values()) == {3}
    scaled = StableRankRanks(of="weight", scaled=True)
    assert set(scaled(context(measured=measured)).values()) == {int(np.ceil(4.2 * 24 / 12))}
    floor = StableRankRanks(of="weight", lowest=0.5)
    assert set(floor(context(measured=measured)).values()) == {12}


def test_cuttlefishs_floors_are_a_share_of_the_full_rank_and_the_accumulative_rank():
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    measured = history({n: [stats(weight_rank=1.5)] for n in SHAPES})  # 1.5 * 24 / 12 = 3
    given = dataclasses.replace(context(measured=measured), weights=weights)
    assert set(build_yaml("switch/rank", "cuttlefish")(given).values()) == {12}
    assert set(StableRankRanks(of="weight", scaled=True)(given).values()) == {3}
    floor = StableRankRanks(of="weight", scaled=True, accumulative=0.8)
    for name, rank in floor(given).items():
        values = scipy.linalg.svdvals(weights[name].double().numpy())
        held = values.cumsum() / values.sum()
        assert held[rank - 1] >= 0.8 > held[rank - 2]


def test_weights_are_those_of_the_model_now():
    model = tiny_vit()
    targets = find_targets(model, [r"attn\.qkv"], split_qkv=True)
    weights = Weights(model, targets)
    assert list(weights) == list(targets) and len(weights) == 6
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.fill_(2)
    assert torch.equal(weights["blocks.1.attn.qkv.k"], torch.full((32, 32), 2.0))


def test_a_rank_ratio_is_of_the_smaller_side():
    updates = {"fc1": torch.ones(384, 96), "proj": torch.ones(96, 96), "thin": torch.ones(1, 9)}
    assert RankRatio(0.25)(context(updates)) == {"fc1": 24, "proj": 24, "thin": 1}


@pytest.mark.parametrize("ratio, divisor", [(0.625, 2), (0.3125, 4)])
def test_a_parameter_ratio_gives_the_ranks_of_low_rank_ffn_training(ratio, divisor):
    d = 96
    updates = {"fc1": torch.ones(4 * d, d), "fc2": torch.ones(d, 4 * d)}
    ranks = ParameterRatio(ratio)(context(updates))
    assert ranks == {"fc1": d // divisor, "fc2": d // divisor}
    assert ranks["fc1"] * (d + 4 * d) == ratio * d * 4 * d


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_energy_is_the_smallest_rank_that_captures_the_share(share):
    given = context()
    for name, rank in Energy(share)(given).items():
        squares = scipy.linalg.svdvals(given.updates[name].double().numpy()) ** 2
        captured = squares.cumsum() / squares.sum()
        assert captured[rank - 1] >= share * (1 - 1e-9)
        assert rank == 1 or captured[rank - 2] < share


def test_energy_rounds_up_to_powers_of_two():
    assert all(r & (r - 1) == 0 for r in Energy(0.5, power_of_two=True)(context()).values())


def test_budget_counts_everything_that_trains():
    given = context()
    ranks = Budget(share=0.1)(given)
    factors = sum(r * sum(SHAPES[n]) for n, r in ranks.items())
    assert factors + given.other_trainable <= 0.1 * given.total_parameters
    spare = 0.1 * given.total_parameters - factors - given.other_trainable
    assert spare < 72  # not even one more rank fits


def test_budget_is_optimal_among_all_rank_choices_of_its_cost():
    small = {n: u[:8, :8] for n, u in context().updates.items()}
    given = context(small, total=1160, other=20)
    ranks = Budget(share=0.1, r_min=0)(given)
    squares = {n: scipy.linalg.svdvals(u.double().numpy()) ** 2 for n, u in small.items()}

    def energy(choice):
        return sum(squares[n][:r].sum() for n, r in zip(small, choice, strict=True))

    useful = range(4)  # rank 4 of an 8 x 8 weight saves nothing
    affordable = [c for c in itertools.product(useful, repeat=3) if 16 * sum(c) + 20 <= 116]
    assert energy(ranks.values()) == pytest.approx(max(map(energy, affordable)), rel=1e-9)


@pytest.mark.parametrize("captured", [0.3, 0.6])
def test_a_budget_that_is_large_enough_buys_what_energy_asks_for(captured):
    given = context()
    wanted = Energy(captured)(given)
    assert all(saves_parameters(rank, SHAPES[name]) for name, rank in wanted.items())
    assert Budget(share=1.0, captured=captured)(given) == wanted


def test_a_budget_that_is_too_small_is_spent_as_if_nothing_had_to_be_captured():
    given = context()
    assert Budget(share=0.1, captured=0.999)(given) == Budget(share=0.1)(given)


def test_budget_that_cannot_be_met_says_by_how_much():
    with pytest.raises(ValueError, match=r"rank\.share=0\.01 is too small.*parameters more"):
        Budget(share=0.01)(context())


def test_budget_that_cannot_be_met_names_the_smallest_share_that_can():
    given = context()
    with pytest.raises(ValueError, match=r"; give 0\.\d\d or more$") as caught:
        Budget(share=0.01)(given)
    smallest = float(str(caught.value).split()[-3])
    assert Budget(share=smallest)(given)
    with pytest.raises(ValueError, match="too small"):
        Budget(share=smallest - 0.01)(given)
    crowded = dataclasses.replace(given, other_trainable=given.total_parameters)
    with pytest.raises(ValueError, match="no share is enough: choose another switch/rank"):
        Budget(share=0.5)(crowded)


@pytest.mark.parametrize("policy", [Energy(), Budget()])
def test_policies_that_read_updates_say_when_there_are_none(policy):
    still = {n: torch.zeros(shape) for n, shape in SHAPES.items()}
    with pytest.raises(NothingMeasured, match="switch/rank=fixed"):
        policy(context(still))


def test_a_rank_saves_parameters_only_below_the_break_even():
    assert saves_parameters(15, (48, 24))
    assert not saves_parameters(16, (48, 24))  # 16 * 72 = 48 * 24


@pytest.mark.parametrize("make", [RankRatio, ParameterRatio, Energy])
@pytest.mark.parametrize("share", [0, 1.5])
def test_shares_are_above_0_and_at_most_1(make, share):
    with pytest.raises(ValueError, match="give a share above 0, at most 1"):
        make(share)


@pytest.mark.parametrize("bounds", [(4, 4), (3, 8), (8, 4)])
def test_prelora_bounds_must_be_ordered_powers_of_two(bounds):
    with pytest.raises(ValueError):
        PreLoRARanks(*bounds)
