"""Scaling curves: a power law in run folders is found again, and what cannot be fitted is said."""

import json
import sys

import numpy as np
import pytest
from omegaconf import OmegaConf

from conf_yamls import composed
from switchlora.analysis import scaling
from switchlora.analysis.scaling_fit import fit_power_law
from switchlora.storage import find_records

NEVER = ("switch/criterion=never",)
WIDTHS = (32, 48, 64, 96)


def low_rank(ratio=0.63, adapter="factorized"):
    return (
        *("switch/criterion=at_start", f"switch/adapter={adapter}", "switch/init=weight_svd"),
        *("switch/rank=parameter_ratio", f"switch.rank.ratio={ratio}"),
    )


def write_run(folder, words, width, loss, flops=1e9, updates=40, seed=0):
    """The files of a finished run, of half its updates in the full phase at twice the work."""
    folder.mkdir(parents=True)
    config = composed("model=bytes", "data=bytes", *words)
    own = {"seed": seed, "model": {"embed_dim": width}}
    read = {key: config[key] for key in ("data", "epochs", "switch")}
    OmegaConf.save({**read, **own}, folder / "config.yaml")
    half = updates // 2
    each = flops / (3 * half)
    summary = {
        "status": "finished",
        "val": {"loss": loss},
        "cost": {"train_flops": flops},
        "segments": [{"phase": "adapter"}],
        "phases": {
            "full": {"num_updates": half, "flops_per_update": 2 * each},
            "adapter": {"num_updates": half, "flops_per_update": each},
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    events = [
        {"event": "train", "num_updates": n, "epoch": 0.0, "train/loss": loss + 1 / n}
        for n in range(1, updates + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def write_law(folder, words, exponent, noise=0.003, seeds=(0, 1)):
    """Runs whose losses follow 20 C^-exponent but for a little noise."""
    generator = np.random.default_rng(0)
    for width in WIDTHS:
        for seed in seeds:
            flops = 1e6 * width**2
            loss = 20 * flops**-exponent * np.exp(noise * generator.standard_normal())
            name = f"{'-'.join(words).replace('/', '')}-{width}-{seed}"
            write_run(folder / name, words, width, loss, flops, seed=seed)


def test_a_power_law_without_noise_is_found_exactly():
    flops = np.array([1e9, 1e10, 1e11])
    law = fit_power_law(flops, 7 * flops**-0.05)
    assert law.exponent == pytest.approx(0.05) and law.amplitude == pytest.approx(7)
    assert law.high - law.low < 1e-6 and law(1e12) == pytest.approx(7 * 1e12**-0.05)


def test_the_true_exponent_lies_in_19_of_20_intervals():
    generator, flops = np.random.default_rng(1), np.geomspace(1e9, 1e11, 8)
    noise = np.exp(0.01 * generator.standard_normal((800, len(flops))))
    laws = [fit_power_law(flops, 7 * flops**-0.05 * row) for row in noise]
    assert np.mean([law.low < 0.05 < law.high for law in laws]) == pytest.approx(0.95, abs=0.02)


def test_the_true_difference_of_two_exponents_lies_in_19_of_20_intervals():
    generator, flops = np.random.default_rng(2), np.geomspace(1e9, 1e11, 8)
    covered = []
    for _ in range(800):
        noisy, quiet = np.exp([[0.03], [0.01]] * generator.standard_normal((2, len(flops))))
        steep = fit_power_law(flops, 7 * flops**-0.08 * noisy)
        flat = fit_power_law(flops, 7 * flops**-0.05 * quiet)
        _, low, high = steep.steeper_by(flat)
        covered.append(low < 0.03 < high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_runs_give_back_the_exponents_they_were_made_with_and_a_plain_verdict(tmp_path):
    made = {"dense": 0.05, "low rank, 63 %": 0.05, "low rank, 32 %": 0.08}
    words = (NEVER, low_rank(), low_rank(0.32))
    for arm, exponent in zip(words, made.values(), strict=True):
        write_law(tmp_path / "sweep", arm, exponent)
    points = scaling.read_points(find_records([tmp_path / "sweep"]))
    laws = scaling.fit(points)
    assert list(laws) == ["dense", "low rank, 32 %", "low rank, 63 %"]
    for label, exponent in made.items():
        assert laws[label].low < exponent < laws[label].high and laws[label].runs == 8
    steeper, same = scaling.sentences(laws)
    assert "low rank, 32 % is steeper than dense: exponents 0.079 and 0.049" in steeper
    assert "low rank, 63 % is not seen to be steeper than dense" in same
    scaling.write(points, laws, tmp_path / "out")
    found = json.loads((tmp_path / "out/scaling.json").read_text())
    assert found["fits"]["dense"]["runs"] == 8 and len(found["runs"]) == 24
    assert (tmp_path / "out/scaling.png").stat().st_size > 10_000
    assert "| low rank, 32 % | 96 | 1 |" in (tmp_path / "out/scaling.md").read_text()


def test_a_curve_counts_the_flops_of_each_phase_and_ends_where_the_run_does(tmp_path):
    write_run(tmp_path / "run", low_rank(), 32, loss=2.0, flops=6e9)
    (point,) = scaling.read_points(find_records([tmp_path / "run"]))
    flops, losses = zip(*point.curve, strict=True)
    assert len(flops) == 10 and flops[-1] == pytest.approx(6e9)
    assert flops[4] == pytest.approx(4e9)  # half of the updates, at twice the work
    assert losses[0] == pytest.approx(2 + (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_a_curve_ends_at_the_total_of_the_summary_where_an_update_cost_less_than_its_phase_says(
    tmp_path,
):
    folder = tmp_path / "run"
    write_run(folder, low_rank(adapter="guided"), 32, loss=2.0, flops=6e9)
    summary = json.loads((folder / "summary.json").read_text())
    summary["cost"]["train_flops"] = 4.5e9  # guided layers skipped a quarter
    (folder / "summary.json").write_text(json.dumps(summary))
    (point,) = scaling.read_points(find_records([folder]))
    flops = [each for each, _ in point.curve]
    assert flops[-1] == pytest.approx(4.5e9) and flops[4] == pytest.approx(3e9)
    assert flops == sorted(flops)


@pytest.mark.parametrize(
    "adapter, label", [("factorized", "low rank, 50 %"), ("guided", "self-guided, 50 %")]
)
def test_a_run_is_named_by_what_stands_for_its_weights(adapter, label, tmp_path):
    write_run(tmp_path / "run", low_rank(0.5, adapter), 32, loss=2.0)
    (point,) = scaling.read_points(find_records([tmp_path / "run"]))
    assert (point.label, point.width) == (label, 32)


@pytest.mark.parametrize(
    "words, says",
    [
        ([NEVER] * 3, "dense: 3 run.s. of width 64 give no exponent"),
        ([NEVER, (*NEVER, "epochs=3")], "differ in 'epochs'"),
        ([("switch/criterion=at_start",)], "neither dense nor low-rank"),
    ],
)
def test_runs_that_cannot_be_fitted_are_one_clear_line(words, says, tmp_path, monkeypatch):
    for number, arm in enumerate(words):
        write_run(tmp_path / "sweep" / str(number), arm, 64, loss=2.0, seed=number)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "sweep"), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit, match=says) as stop:
        scaling.main()
    assert "\n" not in str(stop.value)


def test_runs_that_go_on_are_nothing_to_fit(tmp_path):
    write_run(tmp_path / "run", NEVER, 64, loss=2.0)
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(ValueError, match="none of 1 run.s. has finished"):
        scaling.read_points(find_records([tmp_path / "run"]))
