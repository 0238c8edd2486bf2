"""What pictures and the page of a sweep say, on recorded events of small made-up runs."""

import copy
import json
import re
from html.parser import HTMLParser
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from conf_yamls import composed
from runs import SHORT
from switchlora.analysis.counterparts import find_counterparts
from switchlora.analysis.figures import (
    draw_figures,
    heat_map,
    judged_norms,
    smoothed,
    training_curves,
)
from switchlora.analysis.output import formats_of, save
from switchlora.analysis.page.colors import COLORS, PAGE, PAGE_COLORS
from switchlora.analysis.page.curves import (
    Curve,
    difference_curve,
    late_limits,
    panel,
    with_common_phases,
)
from switchlora.analysis.page.page import write_page
from switchlora.analysis.rule import Rule, crossing, rule_of
from switchlora.analysis.scaling import Point, fit
from switchlora.analysis.scaling_picture import draw as draw_scaling
from switchlora.analysis.tables.columns import Cell
from switchlora.analysis.tables.formats import shown
from switchlora.analysis.tables.pareto import FULL, KINDS, kind_of, pareto_figure
from switchlora.analysis.tables.rows import run_names
from switchlora.analysis.tables.table import make_table
from switchlora.analysis.timeline import UPDATE_NORM, Change, read_timeline
from switchlora.run.messages import memory_table
from switchlora.storage import find_records, read_record

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NEVER = "switch/criterion=never"
QKV = "blocks.0.attn.qkv"


def config_of(*overrides):
    """A configuration on digits, whose keys with a dot need not be known groups."""
    groups = [word for word in overrides if "/" in word or word.startswith("+")]
    config = copy.deepcopy(composed(*SHORT, *groups))
    OmegaConf.set_struct(config, False)
    config.merge_with_dotlist([word for word in overrides if word not in groups])
    return config


def write_run(folder, *overrides, switch=None, top1=(60, 70, 80, 82), lead=(), **told):
    """A finished run of 20 updates an epoch that switched after ``switch`` updates, or never."""
    folder.mkdir(parents=True)
    OmegaConf.save(config_of(*overrides), folder / "config.yaml", resolve=True)
    events = [*lead]
    for epoch, value in enumerate(top1, start=1):
        at = {"num_updates": 20 * epoch, "epoch": epoch}
        events.append({"event": "train", **at, "train/loss": 3 / epoch, "train/phase": "full"})
        events.append({"event": "eval", **at, "val/top1": value, "val/loss": 2 / epoch})
    if switch is not None:
        events.append({"event": "switch", "num_updates": switch, f"switch/rank/{QKV}": 2})
    events.sort(key=lambda event: event["num_updates"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    last = 20 * len(top1)
    summary = {
        "status": "finished",
        "num_updates": last,
        "val": {"top1": top1[-1], "loss": 2 / len(top1)},
        "test": {"top1": top1[-1]},
        "switch": {"fired": switch is not None, "num_updates": switch, "parameters": 1000},
        "phases": {"full": {"num_updates": last, "trainable_parameters": 1000}},
        "cost": {"train_flops": 1e9 * (last if switch is None else (last + switch) / 2)},
        "transitions": [],
        "environment": {"device": "1 x CPU", "threads": 1},
        **told,
    }
    for key in ("images_per_second", "epoch_seconds", "peak_memory_bytes"):
        summary["phases"]["full"].setdefault(key, 1.0)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def measured(*rows, every=10):
    """Measurements of update norms: a row of numbers by target for each window."""
    events = []
    for place, row in enumerate(rows, start=1):
        norms = {f"{UPDATE_NORM}/{name}": norm for name, norm in row.items()}
        events.append({"event": "measure", "num_updates": every * place, **norms})
    return events


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def line_named(axis, label):
    (line,) = [line for line in axis.get_lines() if line.get_label() == label]
    return line


# 1. The picture of training


def test_full_training_of_the_same_setting_and_seed_is_drawn_beside_a_run(tmp_path):
    run = write_run(tmp_path / "switched", switch=40)
    write_run(tmp_path / "never", NEVER, top1=(60, 70, 81, 83))
    write_run(tmp_path / "short", NEVER, "epochs=2", top1=(65, 75))
    write_run(tmp_path / "seed", NEVER, "seed=1", top1=(1, 1, 1, 1))
    write_run(tmp_path / "model", NEVER, "model.depth=1", top1=(1, 1, 1, 1))
    write_run(tmp_path / "rate", NEVER, "full.optimizer.lr=1", top1=(1, 1, 1, 1))
    write_run(tmp_path / "stopped", NEVER, "epochs=1", top1=(1,), status="interrupted")
    write_run(tmp_path / "other", "switch.criterion.fraction=0.2", switch=60)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("{")
    (tmp_path / "damaged" / "metrics.jsonl").write_text("")
    found = find_counterparts(run)
    names = ["full training", "full training of 40 updates"]
    assert [each.label for each in found] == names
    figure = training_curves(list(read_record(run).events()), found)
    for axis, key in zip(figure.axes, ("val/loss", "val/top1"), strict=True):
        assert set(names) <= set(legend(axis))
        full = line_named(axis, "full training")
        assert list(full.get_ydata()) == found[0].points(key)[1]
    assert list(line_named(figure.axes[1], names[1]).get_ydata()) == [65, 75]
    assert all(path.is_file() for path in draw_figures(run))


def test_a_threshold_that_never_fired_is_full_training_and_is_not_drawn_beside_itself(tmp_path):
    run = write_run(tmp_path / "switched", switch=40)
    zero = write_run(tmp_path / "zero", "switch.criterion.fraction=0")
    assert [each.label for each in find_counterparts(run)] == ["full training"]
    write_run(tmp_path / "never", NEVER)
    assert find_counterparts(zero) == []


def test_a_run_alone_shows_smoothed_loss_and_the_accuracies_that_matter(tmp_path):
    rough = [1 / (1 + n / 50) + 0.3 * (-1) ** n for n in range(200)]
    assert np.abs(np.diff(smoothed(rough))).max() < np.abs(np.diff(rough)).min()
    assert np.isfinite(smoothed([1.0, float("nan"), 2.0])).sum() == 2
    run = write_run(tmp_path / "run", switch=60, top1=(30, 60, 80, 86, 87, 87.5, 87.8, 88))
    loss, top1 = training_curves(list(read_record(run).events())).axes
    low, high = top1.get_ylim()
    assert 75 < low < 80 and 88 < high < 90 and "later part" in top1.get_title()
    assert {"train, smoothed", "validation"} <= set(legend(loss))
    assert not any("full training" in label for label in legend(loss))


def test_the_demo_is_drawn_beside_its_recorded_full_training(tmp_path):
    for name, changed in (("demo", []), ("other", ["model.depth=2"])):
        folder = tmp_path / name
        folder.mkdir()
        config = copy.deepcopy(composed("+experiments=demo"))
        config.merge_with_dotlist(["full.precision=fp32", "full.compile=null", *changed])
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        (folder / "metrics.jsonl").write_text('{"event": "test", "num_updates": 312}\n')
    full, short = find_counterparts(tmp_path / "demo")
    names = ("full training, recorded", "full training of 265 updates, recorded")
    assert (full.label, short.label) == names and short.shortened
    for found, summary in ((full, "never"), (short, "short")):
        told = json.loads((EXPERIMENTS / "demo" / f"{summary}.json").read_text())
        updates, top1 = found.points("val/top1")
        assert (updates[-1], top1[-1]) == (told["num_updates"], told["val"]["top1"])
    assert find_counterparts(tmp_path / "other") == []


# 2. Update norms


def test_update_norms_are_drawn_over_their_own_peak_with_the_rules_line_and_crossings():
    other = "blocks.1.attn.qkv"
    norms = ((0.2, 0.1), (0.4, 0.2), (0.2, 0.2), (0.36, 0.15), (0.2, 0.19), (0.1, 0.18))
    events = measured(*({QKV: one, other: two} for one, two in norms))
    figure = judged_norms(read_timeline(events), Rule(0.7, 2))
    (axis, *_) = figure.axes
    first, second = axis.get_lines()[:2]
    assert np.allclose(first.get_ydata(), [1, 1, 0.5, 0.9, 0.5, 0.25])
    assert np.allclose(second.get_ydata(), [1, 1, 1, 0.75, 0.95, 0.9])
    dots = [line for line in axis.get_lines() if line.get_gid() == "crossing"]
    assert [(dot.get_xdata()[0], dot.get_color()) for dot in dots] == [(50, first.get_color())]
    assert any(list(line.get_ydata()) == [0.7, 0.7] for line in axis.get_lines())
    assert "0.7 of the own peak for 2 windows" in figure.get_supxlabel()
    assert "peak" in figure.get_supylabel()


@pytest.mark.parametrize(
    ("shares", "place"), [([1, 0.5, 0.4], 1), ([1, 0.5, 0.8, 0.7], 3), ([1, 0.5, 0.8], None)]
)
def test_a_target_crosses_where_it_comes_to_the_line_and_stays(shares, place):
    assert crossing(shares, 0.7) == place


def test_only_criteria_on_update_norms_have_their_line():
    assert rule_of(config_of("switch.criterion.fraction=0.4")) == Rule(0.4, 3)
    assert rule_of(config_of("switch/criterion=all_of")) == Rule(0.7, 3)
    for name in ("never", "prelora", "at_epoch"):
        assert rule_of(config_of(f"switch/criterion={name}")) is None


# 3. The common full phase, and differences


def test_the_common_full_phase_is_drawn_once_and_grey():
    updates = [10, 20, 30, 40]
    never = Curve(0, updates, [1.0, 2.0, 3.0, 4.0])
    early = Curve(1, updates, [1.0, 2.0, 2.5, 2.6])
    late = Curve(2, updates, [1.0, 2.0, 3.0, 3.5])
    seed = Curve(1, updates, [9.0, 9.0, 9.0, 9.0])
    shared = [curve.shared_until for curve in with_common_phases([never, early, late, seed])]
    assert shared == [30, 20, 30, -np.inf]
    svg = panel([never, early, late, seed], "x", "a chart", None)
    assert re.findall(r'id="x-(trunk-\d+)"', svg) == ["trunk-0"]
    assert svg.split('id="x-trunk-0"')[1].split("</g>")[0].count("var(--trunk)") > 0
    own = svg.split('id="x-g1-1"')[1].split("</g>")[0]
    assert len(re.findall(r"[ML] ", own)) == 3, "it begins where the common phase ends"
    switched = [Change("switch", 25)]
    twins = [Curve(group, updates, [1.0, 2.0, 3.0, 4.0], switched) for group in (0, 1)]
    assert [curve.shared_until for curve in with_common_phases(twins)] == [25, 25]


def test_the_difference_to_full_training_is_in_points_and_fills_its_axis(tmp_path):
    full = write_run(tmp_path / "full", NEVER, top1=(60, 70, 80, 82))
    run = write_run(tmp_path / "run", switch=20, top1=(60, 50, 79.5, 81.4))
    curve = difference_curve(read_record(run), [read_record(full)], 1)
    assert list(curve.updates) == [20, 40, 60, 80]
    assert curve.values == pytest.approx([0, -20, -0.5, -0.6])
    late = Curve(1, [20, 40, 60, 80], [0, -20, -0.5, -0.6])
    low, high = late_limits([Curve(0, [10], [-50.0]), late])
    assert -21.1 < low < -20 and 0 < high < 1.1
    page = write_page(tmp_path, tmp_path / "page.html").read_text()
    assert "difference to full training, points" in page


# 4. Full training


@pytest.mark.parametrize(
    "words",
    [
        (NEVER,),
        ("switch.criterion.fraction=0",),
        ("switch/criterion=prelora", "switch.criterion.tau=0"),
        ("switch/criterion=at_epoch", "switch.criterion.epoch=99"),
    ],
)
def test_what_cannot_switch_is_called_full_training_everywhere(tmp_path, words):
    write_run(tmp_path / "sweep" / "a", *words)
    write_run(tmp_path / "sweep" / "b", "switch.criterion.fraction=0.5", switch=40)
    records = find_records([tmp_path / "sweep"])
    table = make_table(records)
    assert [row.label for row in table.rows] == ["full training", "update_norm"]
    assert kind_of(table.rows[0]) == FULL and table.rows[0].trains_in_full
    assert run_names(records)[0] == "full training, seed 0"
    page = write_page(tmp_path / "sweep", tmp_path / "page.html").read_text()
    assert "full training" in page and "fraction=0<" not in page


def test_a_threshold_of_zero_that_fired_all_the_same_is_not_called_full_training(tmp_path):
    write_run(tmp_path / "a", "switch.criterion.fraction=0", switch=40)
    write_run(tmp_path / "b", "switch.criterion.fraction=0.5", switch=40)
    rows = make_table(find_records([tmp_path])).rows
    assert [row.label for row in rows] == ["fraction=0", "fraction=0.5"]


def test_never_and_a_threshold_of_zero_stay_two_rows(tmp_path):
    write_run(tmp_path / "a", NEVER)
    write_run(tmp_path / "b", "switch.criterion.fraction=0")
    labels = [row.label for row in make_table(find_records([tmp_path])).rows]
    assert len(set(labels)) == 2 and all("full training" in label for label in labels)


# 5. The page


class Order(HTMLParser):
    """The text of the page in order, each with whether it lies in a folded part."""

    def __init__(self, text):
        super().__init__()
        self.depth = 0
        self.hidden = 0
        self.shown = []
        self.folded = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.depth += tag == "details"
        self.hidden += tag in ("style", "script", "svg")

    def handle_endtag(self, tag):
        self.depth -= tag == "details"
        self.hidden -= tag in ("style", "script", "svg")

    def handle_data(self, data):
        if data.strip() and not self.hidden:
            (self.folded if self.depth else self.shown).append(data.strip())


@pytest.fixture
def sweep(tmp_path):
    """Full training and two settings, two seeds each, on shared trunks."""
    folder = tmp_path / "sweep"
    for seed in (0, 1):
        one = f"seed={seed}"
        write_run(folder / f"zero-{seed}", "switch.criterion.fraction=0", one)
        for fraction, lost in ((0.3, 0.5), (0.6, 2)):
            write_run(
                folder / f"{fraction}-{seed}",
                f"switch.criterion.fraction={fraction}",
                one,
                switch=40,
                top1=(60, 70, 79, 82 - lost),
                trunk={"folder": "t", "reused_updates": 40 + seed, "reused_seconds": 1},
            )
    return folder


def test_the_page_begins_with_a_sentence_and_four_tiles_and_folds_the_rest(sweep):
    text = write_page(sweep, sweep / "page.html").read_text()
    order = Order(text)
    said = (
        "Of 2 settings beside full training, fraction=0.3 does best: it ends 0.50 ± "
        "0.00 points of val top1 below it and costs 75 % of its training FLOPs."
    )
    assert said in order.shown[:3]
    assert text.count('class="tile"') == 4
    for number in ("6 of 6", "82.00 ± 0.00 %", "81.50 ± 0.00 %", "75 %"):
        assert number in order.shown
    for heading in ("Results", "Curves", "Runs", "Provenance"):
        assert heading in order.folded
    assert not any("±" in words for words in order.shown[11:])


def test_pages_of_one_kind_of_run_have_a_sentence_too(tmp_path):
    write_run(tmp_path / "full" / "a", NEVER)
    write_run(tmp_path / "alone" / "a", switch=40)
    write_run(tmp_path / "dead" / "a", switch=40, status="interrupted")
    said = {
        "full": "Full training reaches 82.00 % val top1; no other setting has finished.",
        "alone": "there is no full training that it can be compared with.",
        "dead": "No run has finished yet.",
    }
    for name, words in said.items():
        page = write_page(tmp_path / name, tmp_path / f"{name}.html").read_text()
        assert words in page and page.count('class="tile"') == 4


def test_notes_that_differ_in_numbers_alone_are_a_column(sweep):
    table = make_table(find_records([sweep]))
    (column,) = [column for column in table.columns if column.key == "reused"]
    cells = [row.cells["reused"] for row in table.rows]
    assert [shown(cell, column) for cell in cells] == ["0 ± 0 (2)", "40 ± 1 (2)", "40 ± 1 (2)"]
    assert sum("trunk" in note for note in table.notes) == 1
    assert "reused" not in {c.key for c in make_table(find_records([sweep]), times=False).columns}


# 6. The Pareto picture


def test_each_row_is_named_at_its_point_and_coloured_by_its_kind(tmp_path):
    methods = {
        "full": FULL,
        "update_norm": "switch",
        "lora": "LoRA",
        "low_rank_32": "low rank",
        "pufferfish": "low rank",
        "relora": "switch",
        "galore": "smaller optimizer state",
    }
    for place, method in enumerate(methods):
        switch = None if method in ("full", "galore") else 10 * place
        for seed in (0, 1):
            top1 = (60, 70, 80, 82 - place + seed / 10)
            words = (f"+method={method}", f"seed={seed}")
            write_run(tmp_path / f"{method}-{seed}", *words, switch=switch, top1=top1)
    rows = make_table(find_records([tmp_path])).rows
    assert {row.label: kind_of(row) for row in rows} == methods
    figure = pareto_figure(rows)
    (axes,) = figure.axes
    names = {text.get_text(): text.get_color() for text in axes.texts if text.get_text()}
    colors = {method: KINDS[kind]["color"] for method, kind in methods.items()}
    colors["full training"] = colors.pop("full")
    assert names == colors and len({look["color"] for look in KINDS.values()}) == 5
    (key,) = figure.legends
    told = [text.get_text() for text in key.get_texts()]
    assert {"full training", "switch", "low rank", "LoRA", "Pareto front"} <= set(told)
    assert "beaten" not in told and "full training ± std of 2 seeds" in told
    (noise,) = [patch for patch in axes.patches if patch.get_gid() == "noise"]
    (low, high) = noise.get_extents().transformed(axes.transData.inverted()).intervaly
    cell = next(row for row in rows if row.label == "full").cells["val_top1"]
    assert (low, high) == pytest.approx((cell.mean - cell.std, cell.mean + cell.std))


def test_shortened_full_training_is_a_line_and_dominated_points_are_open(tmp_path):
    for epochs in (2, 3, 4):
        top1 = (60, 70, 80, 82)[:epochs]
        write_run(tmp_path / str(epochs), NEVER, f"epochs={epochs}", top1=top1)
    write_run(tmp_path / "again", NEVER, "epochs=4", "seed=1", top1=(60, 70, 80, 82))
    write_run(tmp_path / "run", "epochs=4", switch=70, top1=(1, 2, 3, 79))
    rows = make_table(find_records([tmp_path])).rows
    figure = pareto_figure(rows)
    (axes,) = figure.axes
    (line,) = [line for line in axes.get_lines() if line.get_gid() == "shortened"]
    assert list(line.get_ydata()) == [70, 80, 82]
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"full training, shortened", "dominated"} <= set(told)
    figure.draw_without_rendering()
    ends = axes.transData.transform(line.get_xydata())
    on_line = [here for pair in pairwise(ends) for here in np.linspace(*pair, 200)]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert not any(box.contains(*here) for box in boxes for here in on_line)
    (named,) = figure.legends
    assert all(figure.bbox.contains(*corner) for corner in named.get_window_extent().corners())


def test_twenty_rows_are_named_and_not_numbered(tmp_path):
    rows = make_table(find_records([write_run(tmp_path / "a", NEVER)])).rows
    many = []
    for place in range(20):
        cells = {"cost_flops": Cell((1e9 + place * 1e8,)), "val_top1": Cell((70 + place % 7,))}
        many.append(type(rows[0])(f"rank={place}", {}, (), cells))
    (axes,) = pareto_figure(many).axes
    assert {text.get_text() for text in axes.texts} - {""} == {f"rank={n}" for n in range(20)}


# 7. Scaling, maps, formats, colours, names


def points(exponent=0.06):
    generator = np.random.default_rng(0)
    found = []
    for label, factor in (("dense", 1.0), ("low rank, 50 %", 0.6)):
        for width in (32, 48, 64, 96):
            flops = factor * 2e8 * width**2
            loss = 10 * flops**-exponent * float(np.exp(0.01 * generator.standard_normal()))
            found.append(Point(label, width, 0, flops, loss, [(flops / 2, 3.0), (flops, loss)]))
    return found


def test_scaling_shows_intervals_as_bands_and_many_tick_labels():
    made = points()
    laws = fit(made)
    figure = draw_scaling(made, laws)
    figure.draw_without_rendering()
    _, end = figure.axes
    assert len(end.collections) == len(laws)
    dense = [point.flops for point in made if point.label == "dense"]
    middle = np.exp(np.mean(np.log(dense)))
    low, high = laws["dense"].band(np.array([min(dense), middle, max(dense)]), dense)
    fitted = laws["dense"](np.array([min(dense), middle, max(dense)]))
    assert (low < fitted).all() and (fitted < high).all()
    width = np.log(high / low)
    assert width[1] < width[0] and width[0] == pytest.approx(width[2])
    for axis, limits in ((end.xaxis, end.get_xlim()), (end.yaxis, end.get_ylim())):
        ticks = [each for each in axis.get_majorticklocs() if limits[0] <= each <= limits[1]]
        texts = axis.get_major_formatter().format_ticks(ticks)
        assert len([text for text in texts if text]) >= 5


def test_each_row_of_the_map_is_over_its_own_largest():
    rows = ({QKV: 0.2, "blocks.1.mlp.fc1": 0.001}, {QKV: 0.1, "blocks.1.mlp.fc1": 0.004})
    figure = heat_map(
        read_timeline(measured(*rows, {QKV: 0.0, "blocks.1.mlp.fc1": 0.0})), UPDATE_NORM
    )
    (mesh,) = figure.axes[0].collections
    assert np.allclose(mesh.get_array(), [[1, 0.5, 0], [0.25, 1, 0]])
    assert "largest" in figure.axes[1].get_ylabel()


def test_every_picture_can_be_png_pdf_and_svg_with_the_same_bytes_again(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    for folder in ("one", "two"):
        save(figure, tmp_path / folder, "x", formats_of("png, PDF,.svg"))
    for ending, head in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        one = (tmp_path / "one" / f"x.{ending}").read_bytes()
        assert one.startswith(head) and one == (tmp_path / "two" / f"x.{ending}").read_bytes()


@pytest.mark.parametrize(
    "command",
    ["curves", "figures", "scaling", "replay.replay", "tables.table"],
)
def test_each_command_that_draws_refuses_an_unknown_format_in_one_line(
    command, monkeypatch, capsys
):
    main = import_module(f"switchlora.analysis.{command}").main
    monkeypatch.setattr("sys.argv", ["x", "run", "--out", "o", "--formats", "gif"])
    with pytest.raises(SystemExit):
        main()
    assert "'gif' is no kind of picture: png, pdf, svg" in capsys.readouterr().err


def luminance(color):
    shares = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one, other):
    """WCAG's contrast ratio of two colours."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_lines_on_the_page_have_contrast_in_both_modes(sweep):
    page = write_page(sweep, sweep / "page.html").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)[:2]
    for mode, least in ((light, 3.0), (dark, 4.5)):
        values = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", mode))
        for color in PAGE:
            assert contrast(values[color.name], values["--card"]) >= least, color
        assert contrast(values["--text"], values["--card"]) >= 4.5
    assert all(color in PAGE_COLORS for color in COLORS)
    kinds = {look["color"] for look in KINDS.values()}
    assert all(color in PAGE_COLORS for color in kinds)
    assert not any(f"{color.drawn};" in page.split("</style>")[1] for color in PAGE)


def test_runs_are_named_by_setting_and_seed(sweep, tmp_path):
    records = find_records([sweep])
    names = dict(zip([record.folder.name for record in records], run_names(records), strict=True))
    assert names["0.3-0"] == "fraction=0.3, seed 0" and names["zero-1"] == "full training, seed 1"
    page = Order(write_page(sweep, sweep / "page.html").read_text())
    assert "fraction=0.3, seed 0" in page.folded
    write_run(tmp_path / "b" / "one", "switch.rank.share=0.2", switch=40)
    write_run(tmp_path / "b" / "two", "switch/criterion=at_epoch", switch=40)
    both = run_names(find_records([tmp_path / "b"]))
    assert len(set(both)) == 2 and all(name.endswith(", seed 0") for name in both)
    write_run(tmp_path / "c" / "one", switch=40)
    write_run(tmp_path / "c" / "two", switch=40)
    assert [name[-5:] for name in run_names(find_records([tmp_path / "c"]))] == ["(one)", "(two)"]


# 8. The memory table


def test_parts_that_hold_nothing_have_no_row_in_the_memory_table():
    held = {"parameters": 2**20, "ema": 0, "ddp_buckets": 0, "activations": 2**20, "total": 0}
    later = {**held, "ema": 0, "monitor_reference": 0, "optimizer_state": 2**22}
    unknown = dict.fromkeys(held)
    memory = {
        "full": {"measured": held, "predicted": {**held, "ddp_buckets": None}},
        "adapter": {"measured": later, "predicted": unknown},
    }
    lines = memory_table(memory, model="cpu", reference="cpu")
    labels = [line[:26].strip() for line in lines[1:]]
    assert labels == ["parameters", "gradients", "optimizer state", "activations", "total on cpu"]
    assert not any(set(line[26:].split()) <= {"0.00"} for line in lines[1:-1])
