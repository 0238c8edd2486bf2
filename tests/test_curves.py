"""Curves of several runs: medians and quartiles on one axis, and only of what is alike."""

import json
import sys

import numpy as np
import pytest

from switchlora.analysis import curves
from switchlora.analysis.figures import run_labels, run_styles
from switchlora.storage import find_records

TARGETS = [f"blocks.{i}.{part}" for i in range(5) for part in ("attn.qkv", "mlp.fc1")]


def event(kind, num_updates, **metrics):
    return {"event": kind, "num_updates": num_updates, "epoch": num_updates / 10, **metrics}


def write_run(folder, window=10, windows=4, switch=True, depth=5, targets=TARGETS, seed=0):
    """A run folder whose statistics are drawn at random; its update norms (windows, targets)."""
    drawn = np.random.default_rng(seed).uniform(0.01, 0.2, size=(windows, len(targets)))
    lines = [event("train", 1, **{"train/loss": 2.0})]
    for time, row in enumerate(drawn.tolist(), start=1):
        values = {
            f"{key}/{name}": value
            for key, _, _ in curves.STATISTICS.values()
            for name, value in zip(targets, row, strict=True)
        }
        lines.append(event("measure", window * time, **values))
    if switch:
        lines.append(event("switch", window * windows))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"model": {"depth": depth}}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return drawn


def read(*folders):
    return curves.read_curves(find_records(folders))


def overlay(runs):
    return curves.overlay(runs, *curves.STATISTICS["update_norms"])


def test_a_line_is_the_median_of_the_layers_and_its_band_their_quartiles(tmp_path):
    drawn = write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1)
    runs, _ = read(tmp_path)
    for place, axis in enumerate(overlay(runs).axes):
        values = 100 * drawn[:, place::2]
        line = axis.get_lines()[0]
        assert axis.get_title() == ("attn.qkv", "mlp.fc1")[place] and line.get_label() == "a"
        assert np.array_equal(line.get_xdata(), [10, 20, 30, 40])
        assert np.allclose(line.get_ydata(), np.median(values, axis=1))
        band = axis.collections[0].get_paths()[0].vertices
        for time, row in zip((10, 20, 30, 40), values, strict=True):
            edges = band[band[:, 0] == time, 1]
            assert np.allclose([edges.min(), edges.max()], np.percentile(row, (25, 75)))


def test_each_run_that_switched_is_marked_at_its_own_update(tmp_path):
    for name, windows, switch in (("early", 2, True), ("late", 3, True), ("never", 4, False)):
        write_run(tmp_path / name, windows=windows, switch=switch)
    runs, _ = read(tmp_path)
    (axis, _) = overlay(runs).axes
    upright = [line for line in axis.get_lines() if list(line.get_xdata()) in ([20, 20], [30, 30])]
    styles = run_styles(2)
    assert [line.get_xdata()[0] for line in upright] == [20, 30]
    assert [line.get_color() for line in upright] == [style["color"] for style in styles]


def test_a_line_ends_where_its_layers_switch_and_only_marks_what_it_reaches(tmp_path):
    write_run(tmp_path / "a", windows=4, switch=False)
    path = tmp_path / "a" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[3:]:
        for key in [key for key in line if key.endswith("mlp.fc1")]:
            del line[key]
    lines.insert(3, event("switch", 20, **{"train/phase": "staged"}))
    lines += [event("switch", 40), event("restart", 45)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs, _ = read(tmp_path)
    whole, half = overlay(runs).axes
    for axis, marked in ((whole, [20, 40]), (half, [20])):
        large = [line for line in axis.get_lines() if line.get_markersize() == 7]
        assert [line.get_xdata()[0] for line in large] == marked
    assert np.isnan(half.get_lines()[0].get_ydata()[2:]).all()
    assert "restarts, which are ticks" in curves.key_of(runs)


def test_other_windows_share_the_axis_of_updates_and_are_told(tmp_path):
    write_run(tmp_path / "a", window=10)
    write_run(tmp_path / "b", window=25)
    runs, _ = read(tmp_path)
    figure = overlay(runs)
    assert [list(line.get_xdata()) for line in figure.axes[0].get_lines()[::3]] == [
        [10, 20, 30, 40],
        [25, 50, 75, 100],
    ]
    assert "windows of 10 and 25 updates" in figure.get_supxlabel()
    assert "windows" not in overlay(runs[:1]).get_supxlabel()


@pytest.mark.parametrize(
    "other, told",
    [
        ({"depth": 6}, "a and b are of different models, model.depth is 5 and 6: draw them apart"),
        ({"targets": TARGETS[1:]}, "a and b measured different targets, only one has blocks.0"),
    ],
)
def test_runs_of_different_models_or_targets_are_refused(tmp_path, other, told):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", **other)
    with pytest.raises(ValueError, match=told):
        read(tmp_path)


def test_a_run_that_measured_nothing_is_left_out_by_name(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "at_start", windows=0)
    runs, silent = read(tmp_path)
    assert [run.label for run in runs] == ["a"] and silent == ["at_start"]
    with pytest.raises(ValueError, match="nothing was measured in at_start"):
        read(tmp_path / "at_start")


def test_more_runs_than_can_be_told_apart_are_refused(tmp_path):
    for number in range(curves.MOST_RUNS + 1):
        write_run(tmp_path / f"{number:02}", windows=1)
    runs, _ = read(tmp_path)
    with pytest.raises(ValueError, match="13 runs cannot be told apart: give at most 12"):
        curves.draw(runs)


def test_runs_are_told_apart_without_colour():
    styles = run_styles(curves.MOST_RUNS)
    assert len({(str(s["linestyle"]), s["marker"]) for s in styles}) == curves.MOST_RUNS


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    assert run_labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert run_labels([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]


def test_pictures_of_one_run_and_overlays_of_several_are_written_for_screen_and_print(
    tmp_path, monkeypatch, capsys
):
    for name in ("a", "b"):
        write_run(tmp_path / "sweep" / name, windows=2)
    one = {"update_norms", "stable_ranks", "weight_stable_ranks", "update_norm_map"}
    many = one - {"update_norm_map"} | {"update_norm_map-a", "update_norm_map-b"}
    for path, expected in ((tmp_path / "sweep" / "a", one), (tmp_path / "sweep", many)):
        monkeypatch.setattr(sys, "argv", ["curves.py", str(path)])
        curves.main()
        files = [file for file in (path / "curves").iterdir() if file.stat().st_size > 5_000]
        assert {f.stem for f in files if f.suffix == ".png"} == expected
        assert {f.stem for f in files if f.suffix == ".pdf"} == expected
        assert f"written to {path / 'curves'}: " in capsys.readouterr().out


def test_a_folder_without_runs_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="curves: .* is no run folder and holds none"):
        curves.main()
