"""The replay: what it says of a logged history is what a run does."""

import json
import sys

import pytest

from conf_yamls import names
from runs import make_run
from switchlora.analysis.replay import replay
from switchlora.storage import find_records, read_record

TINY = (
    *("epochs=1", "monitor.window=2", "checkpoint.keep=0", "data.batch_size=16"),
    *("data.train_size=320", "model.depth=1", "model.embed_dim=16", "model.num_heads=1"),
    *("full.optimizer.lr=0.01", "switch/rank=fixed", "switch.rank.rank=1"),
)
NEVER = "switch/criterion=never"
SETTINGS = {
    "update_norm": ("switch.criterion.patience=1", "switch.criterion.fraction=0.9"),
    "prelora": ("switch.criterion.tau=20", "switch.criterion.windows=4"),
    "stable_rank": ("switch.criterion.patience=4", "switch.criterion.epsilon=2"),
    "at_epoch": ("switch.criterion.epoch=0.35",),
    "loss_plateau": ("switch.criterion.tolerance=30", "switch.earliest=11"),
    "any_of": (),
}


def setting(criterion):
    return (f"switch/criterion={criterion}", *SETTINGS[criterion])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A run in full, and one by each criterion."""
    folder = tmp_path_factory.mktemp("sweep")
    make_run(folder / "never", *TINY, NEVER, "monitor.bases=true")
    for criterion in SETTINGS:
        make_run(folder / criterion, *TINY, *setting(criterion))
    return folder


def ask(folder, *words):
    return replay.replay(find_records([folder]), words)


@pytest.mark.parametrize("criterion", SETTINGS)
def test_a_replay_of_full_training_predicts_when_a_run_switches(sweep, criterion):
    lived = read_record(sweep / criterion)
    (predicted,) = ask(sweep / "never", *setting(criterion))
    switch = lived.summary["switch"]
    assert 0 < switch["num_updates"] < 20
    assert (predicted.fires_at, predicted.epoch) == (switch["num_updates"], switch["epoch"])
    assert predicted.reason == switch["reason"]
    (own,) = ask(sweep / criterion)
    assert own.fires_at == switch["num_updates"] and own.setting == "as configured"
    (last,) = (e for e in lived.events("measure") if e["switch/fires"])
    assert predicted.margin == (
        last[f"switch/margin/{predicted.target}"] if predicted.target else None
    )


STAGED = (
    *("switch/stages=by_margin", "switch.stages.interval=4", "switch/criterion=update_norm"),
    *("switch.criterion.patience=1", "switch.criterion.fraction=0.9"),
)


@pytest.mark.parametrize("by", ["target", "block"])
def test_a_replay_predicts_the_first_stage_of_a_staged_run(sweep, tmp_path, by):
    words = (*STAGED, f"switch.stages.by={by}")
    first = make_run(tmp_path, *TINY, *words)["transitions"][0]
    (predicted,) = ask(sweep / "never", *words)
    assert 0 < first["num_updates"] < 20
    assert (predicted.fires_at, predicted.reason) == (first["num_updates"], first["reason"])


def test_a_start_at_once_fires_before_the_first_update(sweep):
    (answer,) = ask(sweep / "never", "switch/criterion=at_start")
    assert (answer.fires_at, answer.epoch, answer.outcome) == (0, 0.0, "0")


def test_where_the_run_switched_nothing_is_said_of_later(sweep):
    strict = ("switch/criterion=at_epoch", "switch.criterion.epoch=0.9")
    (short,), (whole,) = ask(sweep / "at_epoch", *strict), ask(sweep / "never", *strict)
    assert (short.outcome, whole.outcome) == ("not by 8", "18")
    assert ask(sweep / "never", NEVER)[0].outcome == "never"


def test_a_criterion_that_needs_more_windows_than_there_are_says_so(sweep):
    (answer,) = ask(sweep / "never", "switch/criterion=prelora", "switch.criterion.windows=11")
    assert answer.outcome == "never" and answer.margin is None
    assert answer.reason == "10 of the 11 windows it needs are measured"


def test_a_run_without_its_end_is_not_said_to_never_switch(sweep, tmp_path):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((sweep / "never" / name).read_bytes())
    (answer,) = ask(tmp_path, NEVER)
    assert (answer.outcome, answer.history_ends) == ("not by 20", "the run is not finished")
    (tmp_path / "metrics.jsonl").write_bytes((sweep / "at_epoch" / "metrics.jsonl").read_bytes())
    assert ask(tmp_path, NEVER)[0].history_ends == "where it switched"


def test_values_and_choices_are_swept_as_the_command_line_sweeps_them(sweep):
    swept = ask(sweep / "update_norm", "switch.criterion.fraction=0.2,0.9", "switch.earliest=0,18")
    assert [a.setting for a in swept] == [
        f"fraction={fraction}, earliest={earliest}"
        for fraction in (0.2, 0.9)
        for earliest in (0, 18)
    ]
    own = read_record(sweep / "update_norm").summary["switch"]["num_updates"]
    assert swept[2].fires_at == own and swept[3].outcome == f"not by {own}"
    every = ask(sweep / "never", "switch/criterion=glob(*)")
    assert [a.setting for a in every] == names("switch/criterion")


def test_values_alone_vary_the_runs_own_criterion(sweep):
    (own,) = ask(sweep / "prelora", "switch.latest=2")
    assert own.fires_at is None and "switch.latest=2 is past" in own.reason


def test_the_quorum_decides_which_target_holds_the_switch_back(sweep):
    words = ("switch/criterion=update_norm", "switch.criterion.fraction=0")
    all_of_them, half = ask(sweep / "never", *words, "switch.criterion.quorum=1,0.5")
    last = read_record(sweep / "never").history()[-3:]
    peaks = {
        name: max(
            m.layers[name].relative_update_norm for m in read_record(sweep / "never").history()
        )
        for name in last[0].layers
    }
    margins = sorted(
        -max(m.layers[name].relative_update_norm for m in last) / peak
        for name, peak in peaks.items()
    )
    assert all_of_them.margin == pytest.approx(margins[0])
    assert half.margin == pytest.approx(margins[len(margins) // 2])


@pytest.mark.parametrize(
    "words, told",
    [
        (["monitor.window=4"], "monitor.window=4 cannot be replayed: never measured windows of 2"),
        (["epochs=3"], "epochs=3 cannot be replayed: it would change the full phase"),
        (["data=cifar10"], "data=cifar10 cannot be replayed"),
        (["switch.targets=[attn.qkv]"], "switch.targets says what is measured"),
        (["switch.criterion.fraction=1"], "never: switch.criterion.fraction belongs to"),
        (["switch/criterion=nevr"], "Could not find 'switch/criterion/nevr'"),
        (
            ["switch/criterion=prelora", "switch.criterion.windows=1"],
            "windows is 1: give at least",
        ),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_one_line(sweep, monkeypatch, words, told):
    monkeypatch.setattr(sys, "argv", ["replay.py", str(sweep / "never"), *words])
    with pytest.raises(SystemExit) as stop:
        replay.main()
    assert told in stop.value.code and "\n" not in stop.value.code


def test_what_changes_nothing_measured_is_taken(sweep):
    (answer,) = ask(
        sweep / "any_of", "monitor.window=2", "recipe@adapter=sgd", "adapter.weight_decay=0"
    )
    assert answer.fires_at == read_record(sweep / "any_of").summary["switch"]["num_updates"]


def test_a_criterion_of_ones_own_that_reads_full_spectra_needs_a_run_in_exact_mode(
    sweep, tmp_path, monkeypatch
):
    (tmp_path / "spectra_of_mine.py").write_text(
        "from switchlora.criteria import Verdict\n"
        "def narrow(history):\n"
        "    ranks = [s.update_effective_rank for m in history[-1:] for s in m.layers.values()]\n"
        "    return Verdict(any(rank < 3 for rank in ranks), {}, 'narrow')\n"
    )
    yaml = tmp_path / "conf" / "switch" / "criterion" / "narrow.yaml"
    yaml.parent.mkdir(parents=True)
    yaml.write_text("_target_: hydra.utils.get_method\npath: spectra_of_mine.narrow\n")
    monkeypatch.syspath_prepend(tmp_path)
    records = find_records([sweep / "never"])
    with pytest.raises(
        ValueError,
        match="reads what only monitor.exact=true measures",
    ):
        replay.replay(records, ["switch/criterion=narrow"], tmp_path / "conf")


def test_the_command_leaves_a_table_numbers_and_a_picture(sweep, monkeypatch, capsys):
    words = [str(sweep), "switch/criterion=prelora,at_epoch", "switch.earliest=4"]
    monkeypatch.setattr(sys, "argv", ["replay.py", *words])
    replay.main()
    printed = capsys.readouterr().out.splitlines()
    folder = sweep / "replay"
    assert printed[-1] == f"written: {folder}/replay.json {folder}/replay.md {folder}/replay.png"
    written = json.loads((folder / "replay.json").read_text())
    assert len(written["answers"]) == 2 * len(written["runs"]) == 14
    assert {a["setting"] for a in written["answers"]} == {"prelora", "at_epoch"}
    assert sum(line.startswith("| prelora ") for line in printed) == 7
    assert (folder / "replay.png").stat().st_size > 10_000
