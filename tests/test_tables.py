"""Tables over runs: rows, means over seeds, ratios that are refused, and the files."""

import copy
import csv
import json
import math
import random
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from omegaconf import OmegaConf

from conf_yamls import composed
from runs import BY_DATE, SHORT, make_run
from switchlora.analysis.tables.columns import NOT_RECOVERED, Cell, Column
from switchlora.analysis.tables.formats import csv_text, escaped, latex, markdown, shown
from switchlora.analysis.tables.pareto import draw_pareto, pareto_figure, pareto_front
from switchlora.analysis.tables.rows import Row, Table, short_key
from switchlora.analysis.tables.table import main, make_table
from switchlora.storage import find_records

SCRIPTS = Path(__file__).parents[1] / "scripts"
NEVER = ("switch/criterion=never",)
HERE = {"device": "1 x CPU", "threads": 1}
SWITCH_AT = 30
EVALS = ((20, 60.0), (40, 55.0), (60, 59.0), (80, 61.0))


def write_run(
    folder,
    *overrides,
    seed=0,
    evals=EVALS,
    speeds=(100.0, 150.0),
    flops=(3e9, 2e9),
    status="finished",
    environment=HERE,
    trunk=None,
):
    """A run folder with chosen numbers; it switches at update 30 unless its criterion is never."""
    folder.mkdir(parents=True)
    groups = [each for each in overrides if "/" in each or "@" in each]
    config = copy.deepcopy(composed(*SHORT, *groups))
    OmegaConf.set_struct(config, False)
    config.merge_with_dotlist(
        [f"seed={seed}", *(each for each in overrides if each not in groups)]
    )
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    events = [{"event": "eval", "num_updates": n, "val/top1": top1} for n, top1 in evals]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    last = evals[-1][0]
    never = NEVER[0] in overrides
    made = {"full": last} if never else {"full": SWITCH_AT, "adapter": last - SWITCH_AT}
    numbers = zip(made, speeds, (1000, 100), flops, strict=False)
    phases = {
        phase: {
            "images_per_second": speed,
            "images_per_second_quartiles": [speed - 5, speed + 5],
            "epoch_seconds": 1000 / speed,
            "peak_memory_bytes": 2**20 * 10 * parameters,
            "num_updates": made[phase],
            "trainable_parameters": parameters,
            "flops_per_update": cost,
            "train_seconds": made[phase] * 64 / speed,
        }
        for phase, speed, parameters, cost in numbers
    }
    parts = [(phase["num_updates"], phase["flops_per_update"]) for phase in phases.values()]
    known = None not in flops
    cost = {
        "train_flops": sum(updates * each for updates, each in parts) if known else None,
        "train_seconds": sum(phase["train_seconds"] for phase in phases.values()),
    }
    summary = {
        "status": status,
        "num_updates": last,
        "val": {"top1": evals[-1][1]},
        "test": {"top1": evals[-1][1] - 1},
        "switch": {
            "fired": not never,
            "num_updates": None if never else SWITCH_AT,
            "parameters": 1000,
        },
        "phases": phases,
        "cost": cost,
        "environment": dict(environment),
        "trunk": trunk,
    }
    if never:
        del summary["switch"]["parameters"]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def table_of(folder, *options, **named):
    """The table of a sweep folder, with its rows by label."""
    table = make_table(find_records([folder]), *options, **named)
    return table, {row.label: row for row in table.rows}


def text_of(table, row, key):
    """A cell as it is shown."""
    (column,) = (c for c in table.columns if c.key == key)
    return shown(row.cells.get(key), column)


@pytest.fixture
def tables_command(monkeypatch, capsys):
    """``scripts/tables.py`` with these words: what it prints."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def sweep(tmp_path):
    """Full training and two settings, two seeds each."""
    folder = tmp_path / "sweep"
    for seed, moved in ((0, 0.0), (1, 2.0)):
        evals = tuple((n, top1 + moved) for n, top1 in EVALS)
        better = tuple((n, top1 + 5 - moved) for n, top1 in EVALS)
        write_run(folder / f"never-{seed}", *NEVER, seed=seed, evals=better)
        for fraction in (0.5, 0.7):
            chosen = f"switch.criterion.fraction={fraction}"
            run = folder / f"fraction-{fraction}-{seed}"
            write_run(run, chosen, seed=seed, evals=evals, speeds=(100.0, 150.0 + 10 * seed))
    return folder


def test_runs_that_differ_in_their_seed_are_one_row_with_mean_std_and_n(sweep):
    table, rows = table_of(sweep)
    assert list(rows) == [
        "full training",
        "update_norm, fraction=0.5",
        "update_norm, fraction=0.7",
    ]
    cell = rows["update_norm, fraction=0.5"].cells["val_top1"]
    assert cell.values == (61.0, 63.0) and cell.n == 2
    assert cell.mean == mean(cell.values) and cell.std == stdev(cell.values)
    assert cell.std == pytest.approx(np.std(cell.values, ddof=1))
    assert text_of(table, rows["full training"], "val_top1") == "65.00 ± 1.41 (2)"


def test_the_columns_are_what_the_runs_say(sweep):
    table, rows = table_of(sweep)
    row = rows["update_norm, fraction=0.7"]
    flops = SWITCH_AT * 3e9 + 50 * 2e9
    expected = {
        **{"switch_update": 30, "top1_at_switch": 61, "top1_after_switch": 56, "val_top1": 62},
        **{"test_top1": 61, "recovery": 50, "trainable": 100, "trainable_share": 10},
        **{"full_images_per_second": 100, "adapter_images_per_second": 155},
        **{"full_peak_memory": 10_000, "adapter_peak_memory": 1000, "cost_flops": flops},
        **{"top1_difference": -3, "speed_ratio": 1.55, "memory_ratio": 0.1},
        **{"cost_ratio": flops / (80 * 3e9), "full_epoch_seconds": 10},
        "cost_seconds": SWITCH_AT * 0.64 + 50 * 64 * (1 / 150 + 1 / 160) / 2,
        "adapter_epoch_seconds": 1000 * (1 / 150 + 1 / 160) / 2,
    }
    assert {key: cell.mean for key, cell in row.cells.items()} == pytest.approx(expected)
    assert set(expected) == {column.key for column in table.columns}


def test_what_does_not_exist_is_a_dash_and_never_a_zero(tmp_path):
    write_run(tmp_path / "a", *NEVER, flops=(None, None), speeds=(50.0,))
    table, rows = table_of(tmp_path)
    row = rows["full training"]
    for key in ("switch_update", "recovery", "adapter_images_per_second", "cost_flops"):
        assert key not in row.cells and text_of(table, row, key) == "–"
    assert text_of(table, row, "speed_ratio") == "–", "full training is not compared with itself"
    assert text_of(table, row, "full_images_per_second") == "50.0 [45.0–55.0] (1)"
    with pytest.raises(ValueError, match="no row has both FLOPs and val top1"):
        draw_pareto(table, tmp_path / "pareto.png")


def test_a_real_run_fills_every_column_but_the_ratios(tmp_path):
    make_run(tmp_path / "run", *BY_DATE, "epochs=2", "log.cost_model=false", "checkpoint.keep=0")
    table, rows = table_of(tmp_path)
    (row,) = rows.values()
    ratios = {"top1_difference", "speed_ratio", "cost_ratio", "memory_ratio"}
    assert row.label == "at_epoch"
    assert {column.key for column in table.columns} - set(row.cells) == ratios
    assert row.cells["switch_update"].values == (30,)
    assert any("No baseline" in note for note in table.notes)


@pytest.mark.parametrize(
    ("after", "recovered"),
    [
        (((40, 60.0), (60, 10.0)), 0),
        (((40, 59.9), (60, 60.0)), 30),
        (((40, 1.0), (60, 2.0), (80, 61.0), (100, 70.0)), 50),
        (((40, 59.0),), NOT_RECOVERED),
    ],
)
def test_recovery_is_counted_from_the_switch_until_its_top1_is_back(tmp_path, after, recovered):
    write_run(tmp_path / "a", evals=((10, 90.0), (30, 60.0), *after))
    table, rows = table_of(tmp_path)
    cell = rows["update_norm"].cells["recovery"]
    assert cell.values == (recovered,)
    if recovered == NOT_RECOVERED:
        assert text_of(table, rows["update_norm"], "recovery") == "not recovered (1)"


def test_recovery_needs_a_validation_before_and_after_the_switch(tmp_path):
    write_run(tmp_path / "a", evals=((40, 60.0), (60, 61.0)))
    write_run(tmp_path / "b", "switch.criterion.fraction=0.5", evals=((20, 60.0), (30, 61.0)))
    _, rows = table_of(tmp_path)
    assert not any("recovery" in row.cells for row in rows.values())


def test_seeds_that_did_not_recover_are_counted_apart():
    column = Column("recovery", "recovery", "updates", lambda record: None, 0)
    cell = Cell((10.0, 20.0, math.inf))
    assert shown(cell, column) == "15 ± 7 (2), not recovered (1)"
    assert cell.mean == math.inf and cell.std is None


@pytest.mark.parametrize(
    ("overrides", "environment", "named"),
    [
        (["data.batch_size=16"], {}, "data.batch_size is 32, not 16"),
        (["full.precision=bf16"], {}, "adapter.precision is auto, not bf16"),
        (["adapter.precision=bf16"], {}, "adapter.precision is auto, not bf16"),
        (["full.accumulation=2"], {}, "adapter.accumulation is 1, not 2"),
        (["model.drop_rate=0.1"], {}, "model.drop_rate is None, not 0.1"),
        (["model.depth=2"], {}, "model.depth is 1, not 2"),
        (["data.train_size=100"], {}, "data.train_size is 640, not 100"),
        (["data.hflip=0.5"], {}, "data.hflip is 0.0, not 0.5"),
        ([], {"device": "another"}, "device is 1 x CPU, not another"),
        ([], {"threads": 2}, "threads is 1, not 2"),
        ([], {"world_size": 2}, "world_size is 1, not 2"),
    ],
)
def test_a_ratio_under_other_conditions_is_refused(tmp_path, overrides, environment, named):
    write_run(tmp_path / "base", *NEVER)
    write_run(tmp_path / "other", *overrides, environment={**HERE, **environment})
    table, rows = table_of(tmp_path)
    base, row = rows.values()
    assert not {"top1_difference", "speed_ratio", "cost_ratio", "memory_ratio"} & set(row.cells)
    assert "val_top1" in row.cells
    (note,) = (note for note in table.notes if "no ratio" in note)
    assert note == f"{row.label}: no ratio to '{base.label}', where {named}."
    with pytest.raises(ValueError, match="--baseline: .*no ratio"):
        table_of(tmp_path, baseline=base.label)


@pytest.mark.parametrize("here, there, compared", [("null", "false", 1), ("true", "false", 0)])
def test_without_a_compiler_null_and_false_are_the_same(tmp_path, here, there, compared):
    write_run(tmp_path / "base", *NEVER, f"full.compile={there}")
    write_run(tmp_path / "other", f"full.compile={here}")
    _, rows = table_of(tmp_path)
    assert sum("top1_difference" in row.cells for row in rows.values()) == compared


def test_of_several_full_trainings_the_one_under_the_same_conditions_is_the_baseline(tmp_path):
    for batch, top1 in ((32, 70.0), (64, 80.0)):
        chosen = f"data.batch_size={batch}"
        write_run(tmp_path / f"never-{batch}", *NEVER, chosen, evals=((20, top1), (40, top1)))
        write_run(tmp_path / f"run-{batch}", chosen, evals=((20, 60.0), (40, 60.0)))
    _, rows = table_of(tmp_path)
    assert rows["update_norm, batch_size=32"].cells["top1_difference"].values == (-10.0,)
    assert rows["update_norm, batch_size=64"].cells["top1_difference"].values == (-20.0,)


def test_two_possible_baselines_are_none_until_one_is_named(tmp_path):
    for decay in (0.1, 0.2):
        write_run(tmp_path / f"never-{decay}", *NEVER, f"full.weight_decay={decay}")
    write_run(tmp_path / "run", "full.weight_decay=0.3")
    table, rows = table_of(tmp_path)
    assert any("both could be its baseline: name one" in note for note in table.notes)
    assert "speed_ratio" not in rows["update_norm, weight_decay=0.3"].cells
    _, rows = table_of(tmp_path, baseline="full training, weight_decay=0.2")
    assert rows["update_norm, weight_decay=0.3"].cells["speed_ratio"].values == (1.5,)
    with pytest.raises(ValueError, match="names no row: give one of: full training"):
        table_of(tmp_path, baseline="full training")


def test_thresholds_that_never_fire_are_the_baseline_where_no_other_is(tmp_path):
    for fraction in (0.0, 0.1, 0.6):
        write_run(tmp_path / str(fraction), f"switch.criterion.fraction={fraction}")
    for fraction in (0.0, 0.1):
        path = tmp_path / str(fraction) / "summary.json"
        summary = json.loads(path.read_text())
        summary["switch"] |= {"fired": False, "num_updates": None}
        del summary["phases"]["adapter"]
        path.write_text(json.dumps(summary))
    _, rows = table_of(tmp_path)
    assert list(rows)[0] == "full training"
    assert rows["update_norm, fraction=0.6"].cells["speed_ratio"].values == (1.5,)


def test_seeds_are_compared_with_the_same_seeds_or_with_the_mean(tmp_path):
    for seed, top1 in ((0, 70.0), (1, 90.0)):
        write_run(tmp_path / f"n{seed}", *NEVER, seed=seed, evals=((20, top1), (40, top1)))
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", "switch.criterion.fraction=0.5", seed=7)
    table, rows = table_of(tmp_path)
    assert rows["update_norm, fraction=0.9"].cells["top1_difference"].values == (61.0 - 90,)
    assert rows["update_norm, fraction=0.5"].cells["top1_difference"].values == (61.0 - 80,)
    assert any("over its own seeds, which lack 7" in note for note in table.notes)


def test_labels_name_only_what_tells_rows_apart(tmp_path):
    settings = {
        "a": [*NEVER],
        "b": ["switch/criterion=prelora", "switch.criterion.tau=1"],
        "c": ["switch/init=zero_b", "switch/rank=fixed", "switch.rank.rank=4"],
        "d": ["switch/init=zero_b", "switch/rank=fixed", "switch.rank.rank=8"],
        "e": ["switch/init=zero_b", "switch/rank=energy"],
    }
    for name, overrides in settings.items():
        write_run(tmp_path / name, *overrides)
    _, rows = table_of(tmp_path)
    assert list(rows) == [
        "full training",
        "prelora, switch.rank=budget, init=update_directions",
        "update_norm, switch.rank=energy, init=zero_b",
        "update_norm, switch.rank=fixed, rank.rank=4, init=zero_b",
        "update_norm, switch.rank=fixed, rank.rank=8, init=zero_b",
    ]


def test_a_value_that_both_phases_share_is_named_once(tmp_path):
    for rate in (0.001, 0.002):
        write_run(tmp_path / str(rate), f"full.optimizer.lr={rate}")
    for clip in (0.5, 0.25):
        write_run(tmp_path / f"clip{clip}", f"adapter.clip_grad={clip}")
    _, rows = table_of(tmp_path)
    assert list(rows) == [
        "lr=0.001, clip_grad=0.25",
        "lr=0.001, clip_grad=0.5",
        "lr=0.001, clip_grad=1",
        "lr=0.002, clip_grad=1",
    ]


def test_a_short_key_has_as_many_parts_as_it_needs():
    keys = {"a.b.c", "x.b.c", "a.d"}
    assert [short_key(key, keys) for key in sorted(keys)] == ["a.b.c", "d", "x.b.c"]


def test_unfinished_runs_are_named_and_not_averaged(sweep):
    write_run(sweep / "stopped", seed=5, status="interrupted", evals=((20, 0.0),))
    write_run(sweep / "killed", seed=6)
    (sweep / "killed" / "summary.json").unlink()
    table, rows = table_of(sweep)
    assert rows["update_norm, fraction=0.7"].cells["val_top1"].n == 2
    assert table.notes[-2:] == (
        "killed: no summary, since it goes on or was killed; not counted.",
        "stopped: interrupted at update 20; not counted.",
    )


def test_a_run_made_twice_counts_once(sweep):
    shutil.copytree(sweep / "never-0", sweep / "never-again")
    table, rows = table_of(sweep)
    assert rows["full training"].cells["val_top1"].n == 2
    twice = "never-again: not counted, the same configuration and seed as never-0."
    assert twice in table.notes


def test_updates_taken_from_a_trunk_are_told(tmp_path):
    trunk = {"folder": "trunk", "reused_updates": 30, "reused_seconds": 2.0}
    write_run(tmp_path / "a", trunk=trunk)
    write_run(tmp_path / "b", seed=1)
    told = "update_norm: 30, 0 updates of the full phase (by seed) were taken from a shared trunk"
    assert any(note.startswith(told) for note in table_of(tmp_path)[0].notes)
    assert not any("trunk" in note for note in table_of(tmp_path, times=False)[0].notes)


def rewrite(run, **changes):
    """Change the summary of a run."""
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, **changes}))


def test_the_cost_of_a_run_is_what_its_summary_says(tmp_path):
    whole = {"train_flops": 7, "train_seconds": 0.5}
    unknown = {"train_flops": None, "train_seconds": 0.5}
    for fraction, cost in ((0.1, whole), (0.2, unknown), (0.3, {})):
        run = write_run(tmp_path / str(fraction), f"switch.criterion.fraction={fraction}")
        rewrite(run, cost=cost)
    table, rows = table_of(tmp_path)
    told = {}
    for label, row in rows.items():
        told[label] = [text_of(table, row, key) for key in ("cost_flops", "cost_seconds")]
    assert told == {
        "fraction=0.1": ["7 (1)", "0.5 (1)"],
        "fraction=0.2": ["–", "0.5 (1)"],
        "fraction=0.3": ["–", "–"],
    }


def test_a_phase_without_updates_has_no_part_in_the_time_of_an_epoch(tmp_path):
    write_run(tmp_path / "base", *NEVER)
    run = write_run(tmp_path / "a", "switch/criterion=at_start")
    phases = json.loads((run / "summary.json").read_text())["phases"]
    phases["full"].update(num_updates=0, train_seconds=0.0, epoch_seconds=None)
    rewrite(run, phases=phases)
    _, rows = table_of(tmp_path, "prelora")
    assert rows["at_start"].cells["epoch_ratio"].values == pytest.approx((100 / 150,))


def test_a_row_over_several_machines_is_told(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, environment={**HERE, "threads": 8})
    note = "update_norm: runs on different machines (threads is 1, not 8): mind its times."
    assert note in table_of(tmp_path)[0].notes


def test_the_prelora_preset_sets_its_published_numbers_beside_ours(sweep):
    table, rows = table_of(sweep, "prelora")
    ours, published = rows["update_norm, fraction=0.5"].cells, rows["PreLoRA, published"].cells
    assert published.keys() == {column.key for column in table.columns} == ours.keys()
    assert ours["trainable_share"].mean == 10 and published["speed_ratio"].mean == 3
    seconds = [(30 * 10 + 50 * 1000 / speed) / 80 for speed in (150, 160)]
    assert ours["epoch_ratio"].values == pytest.approx([each / 10 for each in seconds])
    assert any("arXiv 2509.21619" in note for note in table.notes)


def test_csv_holds_plain_numbers_with_their_units(sweep):
    table, rows = table_of(sweep)
    header, *lines = csv.reader(csv_text(table).splitlines())
    place = header.index("val_top1 [%] mean")
    assert header[place : place + 3] == [f"val_top1 [%] {part}" for part in ("mean", "std", "n")]
    for line, (label, row) in zip(lines, rows.items(), strict=True):
        cell = row.cells["val_top1"]
        assert line[0] == label
        assert [float(each) for each in line[place : place + 3]] == [cell.mean, cell.std, cell.n]
    missing = header.index("recovery [updates] mean")
    assert lines[0][missing : missing + 3] == ["", "", "0"]


def test_latex_takes_no_character_of_a_label_for_a_command():
    text = r"a_b & 50 % of $x# {y} ~ ^ \z ± 1–2"
    plain = (
        r"a\_b \& 50 \% of \$x\# \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z "
        r"$\pm$ 1--2"
    )
    assert escaped(text) == plain


def test_the_latex_table_compiles(sweep, tmp_path):
    text = latex(table_of(sweep)[0])
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = [len(t.split("}")[0]) for t in text.split(r"\begin{tabular}{")[1:]]
    per_table = len(rows) // len(columns)
    for place, row in enumerate(rows):
        assert row.replace(r"\&", "").count("&") == columns[place // per_table] - 1
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not here: only the columns were counted")
    (tmp_path / "table.tex").write_text(text)
    (tmp_path / "page.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{table}\end{document}"
    )
    compiling = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    done = subprocess.run(compiling, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:]


def test_the_pareto_front_is_what_brute_force_finds():
    draw = random.Random(0)
    for size in range(1, 30):
        points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(size)]
        beaten = {
            i
            for i, (cost, accuracy) in enumerate(points)
            if any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)
        }
        front = pareto_front(points)
        assert sorted(front) == [i for i in range(size) if i not in beaten]
        assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


@pytest.mark.parametrize("number", [6, 20])
def test_names_in_the_picture_overlap_neither_names_nor_points(tmp_path, number):
    column = Column("val_top1", "val top1", "%", lambda record: None, 2)
    draw = random.Random(number)
    rows = []
    for place in range(number):
        cost, top1 = draw.uniform(1, 2) * 1e12, draw.uniform(70, 75)
        cells = {"cost_flops": Cell((cost,)), "val_top1": Cell((top1 - 0.2, top1 + 0.2))}
        rows.append(Row(f"update_norm, rank={place}", {}, (), cells))
    (axes,) = pareto_figure(rows).axes
    boxes = [t.get_window_extent() for t in axes.texts if t.get_text()]
    assert len(boxes) == number
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    points = [(row.cells["cost_flops"].mean, row.cells["val_top1"].mean) for row in rows]
    pixels = axes.transData.transform(points)
    assert not any(box.contains(*pixel) for box in boxes for pixel in pixels)
    path = draw_pareto(Table((column,), tuple(rows), ()), tmp_path / "new" / "pareto.png")
    assert path.stat().st_size > 10_000


def test_without_times_two_copies_of_a_sweep_give_the_same_bytes(sweep, tmp_path):
    copy = tmp_path / "copy" / "sweep"
    shutil.copytree(sweep, copy)
    for path in copy.glob("*/summary.json"):
        summary = json.loads(path.read_text())
        for phase in summary["phases"].values():
            for key in ("images_per_second", "epoch_seconds", "train_seconds"):
                phase[key] *= 1.7
            phase["peak_memory_bytes"] += 10**7
        summary["trunk"] = {"folder": "trunk", "reused_updates": 7, "reused_seconds": 1.0}
        path.write_text(json.dumps(summary))
    for times, same in ((True, False), (False, True)):
        one, other = (table_of(folder, times=times)[0] for folder in (sweep, copy))
        for form in (markdown, latex, csv_text):
            assert (form(one) == form(other)) is same
    one, other = (table_of(folder, times=False)[0] for folder in (sweep, copy))
    pictures = [draw_pareto(t, tmp_path / f"{i}.png") for i, t in enumerate((one, other))]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_the_command_writes_into_the_sweep_and_names_its_files(sweep, tables_command):
    *told, last = tables_command(sweep, "--no-times").splitlines()
    names = ["table.md", "table.tex", "table.csv", "pareto.png"]
    assert last == f"wrote {', '.join(str(sweep / 'tables' / name) for name in names)}"
    assert "\n".join(told).startswith((sweep / "tables" / "table.md").read_text().rstrip())
    assert "images/s" not in "".join(told).lower()
    assert len(find_records([sweep])) == 6, "tables/ is no run"


def test_loose_runs_get_their_tables_in_the_current_folder(sweep, tables_command, monkeypatch):
    monkeypatch.chdir(sweep)
    tables_command("never-0", "fraction-0.5-0", "--preset", "prelora")
    assert sorted(path.name for path in (sweep / "tables").iterdir()) == [
        *("prelora.csv", "prelora.md", "prelora.tex"),
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "tables: nowhere is no run folder and holds none"),
        (
            ["sweep", "--baseline", "x"],
            "tables: --baseline 'x' names no row: give one of: full",
        ),
        (["stopped"], "tables: no finished run: .*a: interrupted at update 80"),
    ],
)
def test_a_mistake_gets_one_line(sweep, tables_command, monkeypatch, words, line):
    monkeypatch.chdir(sweep.parent)
    write_run(sweep.parent / "stopped" / "a", status="interrupted")
    with pytest.raises(SystemExit, match=line) as exit:
        tables_command(*words)
    assert "\n" not in exit.value.code
