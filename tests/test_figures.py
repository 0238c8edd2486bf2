"""The course of a run, read from its events, and what its pictures show of it."""

import warnings

import pytest

from runs import make_run
from switchlora.analysis.figures import (
    draw_figures,
    layer_figures,
    statistics_figures,
    training_curves,
)
from switchlora.analysis.marks import SHADES, TICK
from switchlora.analysis.timeline import Change, Span, read_timeline
from switchlora.storage import read_record

TARGETS = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")
KEYS = ("relative_update_norm", "update_stable_rank", "weight_stable_rank")


def event(kind, num_updates, phase=None, targets=(), **values):
    """One event, with statistics of ``targets``."""
    statistics = {f"{key}/{name}": 0.5 for key in KEYS for name in targets}
    told = {"train/phase": phase} if phase else {}
    return {"event": kind, "num_updates": num_updates, **told, **statistics, **values}


def measured(*updates, kind="measure", targets=TARGETS):
    """Measurements after these updates."""
    return [event(kind, update, targets=targets) for update in updates]


def switch(num_updates, *targets):
    """A switch of these targets."""
    return event("switch", num_updates, **{f"switch/rank/{name}": 2 for name in targets})


def evaluated(num_updates, phase):
    """A validation."""
    return event("eval", num_updates, phase, **{"val/loss": 1.0, "val/top1": 50.0})


SINGLE = [*measured(10, 20), switch(20, *TARGETS), event("window", 30), evaluated(40, "adapter")]
JOINT = [*measured(10), switch(10, *TARGETS), event("settle", 15), evaluated(40, "adapter")]
STAGED = [
    *measured(10, 20),
    switch(20, TARGETS[0]),
    *measured(30, 40, targets=TARGETS[1:]),
    switch(40, TARGETS[1]),
    evaluated(60, "adapter"),
]
RESTARTED = [
    *measured(10, 20),
    switch(20, *TARGETS),
    *measured(35, kind="window"),
    event("restart", 35),
    *measured(50, kind="window"),
    event("restart", 50),
    evaluated(60, "adapter"),
]
TAKEN_BACK = [
    *measured(10, 20),
    switch(20, *TARGETS),
    evaluated(40, "adapter"),
    event("guard", 40),
    event("take_back", 40),
    *measured(50, 60),
    evaluated(60, "full"),
]
NEVER = [*measured(10, 20), evaluated(20, "full")]
COURSES = {
    "single": (SINGLE, [("full", 0, 20), ("adapter", 20, 40)], [("switch", 20)]),
    "joint": (
        JOINT,
        [("full", 0, 10), ("joint", 10, 15), ("adapter", 15, 40)],
        [("switch", 10), ("settle", 15)],
    ),
    "staged": (
        STAGED,
        [("full", 0, 20), ("staged", 20, 40), ("adapter", 40, 60)],
        [("stage", 20), ("stage", 40)],
    ),
    "restarted": (
        RESTARTED,
        [("full", 0, 20), ("adapter", 20, 60)],
        [("switch", 20), ("restart", 35), ("restart", 50)],
    ),
    "taken back": (
        TAKEN_BACK,
        [("full", 0, 20), ("adapter", 20, 40), ("full", 40, 60)],
        [("switch", 20), ("take_back", 40)],
    ),
    "never": (NEVER, [("full", 0, 20)], []),
}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A real run whose targets switch one after the other."""
    stages = ("+method=staged", "switch.stages.interval=5", "monitor.window=5")
    early = ("switch.criterion.fraction=0.95", "switch.criterion.patience=1", "epochs=2")
    folder = tmp_path_factory.mktemp("figures") / "staged"
    make_run(folder, "model.depth=2", *stages, *early, "log.cost_model=false", "checkpoint.keep=0")
    return folder


@pytest.mark.parametrize(("events", "spans", "changes"), COURSES.values(), ids=COURSES)
def test_phases_and_changes_are_read_from_the_events(events, spans, changes):
    course = read_timeline(events)
    assert course.spans == tuple(Span(*each) for each in spans)
    assert course.changes == tuple(Change(*each) for each in changes)


@pytest.mark.parametrize("events", [each[0] for each in COURSES.values()], ids=COURSES)
def test_every_course_has_all_its_pictures_without_a_warning(events):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(layer_figures(events)) == 4
        loss, top1 = training_curves(events).axes
    shaded = {label for label in labels(loss) if "phase" in label}
    assert shaded == {f"{span.phase} phase" for span in read_timeline(events).spans}


def labels(axis):
    """The words of a legend."""
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_the_phases_have_colours_of_their_own():
    assert len(set(SHADES.values())) == 4


def test_a_window_is_as_long_as_what_it_measured():
    lengths = [window.end - window.begin for window in read_timeline(RESTARTED).windows]
    assert lengths == [10, 10, 15, 15]
    figure = layer_figures(RESTARTED)["update_norms"]
    assert "windows of 10 and 15 updates" in figure.get_supxlabel()


def test_a_layer_that_switched_has_no_curve_beyond_its_switch():
    (axis, *_) = layer_figures(STAGED)["update_norms"].axes
    first, second = axis.get_lines()[:2]
    assert list(first.get_xdata()[first.get_ydata() > 0]) == [10, 20]
    assert list(second.get_xdata()[second.get_ydata() > 0]) == [10, 20, 30, 40]


def test_a_curve_is_broken_where_nothing_was_measured():
    (axis, *_) = layer_figures(TAKEN_BACK)["update_norms"].axes
    line = axis.get_lines()[0]
    assert list(line.get_xdata()) == [10, 20, 40, 50, 60]
    assert list(line.get_ydata() > 0) == [True, True, False, True, True]


def test_the_map_marks_the_switch_of_each_target():
    axis = layer_figures(STAGED)["update_norm_map"].axes[0]
    marks = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
    assert marks == [([20, 20], [0, 1]), ([40, 40], [1, 2])]
    assert axis.get_title() == "orange: a target switches"


def test_restarts_are_ticks_and_other_changes_are_named():
    axis, _ = training_curves(RESTARTED).axes
    assert [text.get_text() for text in axis.texts] == ["switch"]
    ticks = [
        line.get_xdata()[0] for line in axis.get_lines() if list(line.get_ydata()) == [0, TICK]
    ]
    assert ticks == [35, 50] and "restart" in labels(axis)
    axis, _ = training_curves(TAKEN_BACK).axes
    assert [text.get_text() for text in axis.texts] == ["switch", "taken back"]


def test_changes_too_near_to_one_another_share_a_name():
    close = [switch(n, TARGETS[0]) for n in (20, 21, 22, 60)]
    axis, _ = training_curves([*close, evaluated(100, "staged")]).axes
    assert len(axis.texts) == 2


@pytest.mark.parametrize("events", [SINGLE, NEVER, JOINT], ids=["single", "never", "joint"])
def test_curves_that_end_at_the_switch_are_not_shaded(events):
    (axis, *_) = layer_figures(events)["update_norms"].axes
    named = [text.get_text() for text in axis.texts]
    assert not axis.patches and named == (["switch"] if events is not NEVER else [])


def test_a_run_without_measurements_has_no_pictures_of_layers():
    assert layer_figures([switch(0, *TARGETS), evaluated(40, "adapter")]) == {}


def test_a_real_staged_run_is_read_as_its_summary_tells_it(staged):
    record = read_record(staged)
    course = read_timeline(list(record.events()))
    told = [(each["kind"], each["num_updates"]) for each in record.summary["transitions"]]
    assert len(told) > 1 and list(course.changes) == told
    ranks = [each["ranks"] for each in record.summary["transitions"]]
    assert [name for name, _ in course.switched] == [name for stage in ranks for name in stage]
    phases = [each["phase"] for each in record.summary["segments"] if each["num_updates"]]
    assert [span.phase for span in course.spans] == list(dict.fromkeys(phases))
    assert set(statistics_figures(course)) < {path.stem for path in draw_figures(staged)}
