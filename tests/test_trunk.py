"""Runs that share a full phase end as each of them would have ended alone."""

import json
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import pytest
import torch
from omegaconf import OmegaConf

from conf_yamls import build, composed
from runs import SHORT, assert_same_run, history_row, wandb_records
from starts import FORKS
from switchlora.config import as_plain
from switchlora.run import prepare
from switchlora.storage import checkpoint, find_all, read_events, read_record, thin, updates_of
from switchlora.sweep import Trunk, TrunkLog, first_firing, trunk_key
from switchlora.train import fit, train

EARLY, LATE = "switch.criterion.epoch=0.5", "switch.criterion.epoch=1.5"
SMALL = (*SHORT, "data.train_size=320", "monitor.window=5")
"""10 updates an epoch, 30 in all, a measurement every 5"""
DATED = ("switch/criterion=at_epoch", "ema=0.9", "+model.drop_path_rate=0.1")
CPU = torch.device("cpu")


def made(folder, *overrides, trunk=None, words=DATED):
    """A finished run, its summary and what it said."""
    shared = (f"trunk.dir={trunk}", "trunk.time_share=1") if trunk else ()
    with redirect_stdout(StringIO()) as said:
        summary = train(composed(*SMALL, *words, *shared, *overrides), folder)
    return summary, said.getvalue()


def computed(summary):
    """Updates that a run made itself."""
    return summary["num_updates"] - (summary["trunk"] or {"reused_updates": 0})["reused_updates"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A late, an early and a never switching run on one trunk, and each of them alone."""
    place = tmp_path_factory.mktemp("sweep")
    settings = {"late": (LATE,), "early": (EARLY,), "never": ("switch/criterion=never",)}
    summaries = {}
    for name, words in settings.items():
        made(place / "alone" / name, *words)
        summaries[name], _ = made(place / name, *words, trunk=place / "trunk")
    return place, summaries


@pytest.mark.parametrize("name", ["late", "early", "never"])
def test_a_run_on_a_trunk_is_bit_identical_to_the_same_run_alone(sweep, name):
    place, _ = sweep
    assert_same_run(place / name, place / "alone" / name)
    assert not (place / name / ".from-trunk").exists()


def test_only_what_no_run_has_computed_yet_is_computed(sweep):
    _, summaries = sweep
    assert {name: computed(summary) for name, summary in summaries.items()} == {
        "late": 30,
        "early": 25,  # from its own switch at update 5 on
        "never": 15,  # from the late one's switch at update 15 on
    }


def test_a_run_says_what_it_took_over_and_keeps_the_times_of_it(sweep):
    place, summaries = sweep
    taken = summaries["never"]["trunk"]
    assert taken["folder"].startswith(str(place / "trunk")) and taken["reused_seconds"] > 0
    assert summaries["never"]["cost"]["train_seconds"] > taken["reused_seconds"]
    assert summaries["late"]["trunk"] is None


def test_every_run_logs_the_verdicts_of_its_own_criterion(sweep):
    place, _ = sweep
    reasons = [e["switch/reason"] for e in read_events(place / "never", "measure")]
    assert len(reasons) == 6 and all("criterion=never" in reason for reason in reasons)


def test_the_wandb_run_on_a_trunk_has_every_step_once(sweep, tmp_path):
    place, _ = sweep
    made(tmp_path, "switch/criterion=never", "log.wandb.mode=offline", trunk=place / "trunk")
    rows = [history_row(r) for r in wandb_records(tmp_path) if r["type"] == "history"]
    assert [row["_step"] for row in rows] == list(range(len(list(read_events(tmp_path)))))


def test_a_trunk_is_read_like_a_run_and_holds_the_whole_history(sweep):
    place, _ = sweep
    (folder,) = (place / "trunk").iterdir()
    assert read_record(folder).history() == read_record(place / "never").history()
    assert json.loads((folder / "trunk.json").read_text())["machine.threads"]


def test_the_same_run_again_takes_everything_from_the_trunk(sweep, tmp_path):
    place, _ = sweep
    summary, said = made(tmp_path, "switch/criterion=never", trunk=place / "trunk")
    assert computed(summary) == 0
    assert "30 updates of the full phase come from" in said


@pytest.mark.parametrize("budget", [0, 1e9])
def test_a_thinned_trunk_costs_updates_but_no_bit(budget, sweep, tmp_path):
    trunk = tmp_path / "trunk"
    made(tmp_path / "late", LATE, f"trunk.gigabytes={budget / 1e9}", trunk=trunk)
    (folder,) = trunk.iterdir()
    assert [updates_of(path) for path in find_all(folder)] == (
        [15] if budget == 0 else [15, 10, 5]
    )
    summary, _ = made(tmp_path / "early", EARLY, trunk=trunk)
    assert computed(summary) == (30 if budget == 0 else 25)
    assert_same_run(tmp_path / "early", sweep[0] / "alone" / "early")


def test_a_damaged_checkpoint_of_a_trunk_is_named_and_the_one_before_it_used(tmp_path):
    trunk = tmp_path / "trunk"
    made(tmp_path / "late", LATE, trunk=trunk)
    (folder,) = trunk.iterdir()
    (find_all(folder)[0] / checkpoint.STATE).write_bytes(b"")
    summary, said = made(tmp_path / "never", "switch/criterion=never", trunk=trunk)
    assert computed(summary) == 20 and "is damaged" in said


@pytest.mark.parametrize(
    "change",
    [
        "full.optimizer.lr=0.002",
        "monitor.window=4",
        "seed=1",
        "epochs=4",
        "ema=0.8",
        "log.every=2",
        "switch.split_qkv=true",
        "data.train_size=288",
    ],
)
def test_what_shapes_the_full_phase_has_a_trunk_of_its_own(change):
    assert key_of(change) != key_of()


@pytest.mark.parametrize(
    "change",
    [
        "switch/criterion=never",
        "switch/criterion=stable_rank",
        "switch/rank=fixed",
        "switch/init=zero_b",
        "adapter.factor_lr=1",
        "switch.freeze=[pos_embed]",
        "name=other",
        "checkpoint.keep=1",
        "system.workers=2",
    ],
)
def test_what_acts_at_the_switch_and_after_it_shares_the_trunk(change):
    assert key_of(change) == key_of()


def key_of(*overrides):
    config = as_plain(composed(*SMALL, "ema=0.9", *overrides))
    return trunk_key(config, CPU, data="digest")


def test_other_images_have_a_trunk_of_their_own():
    def digest(*words):
        return build(composed(*SMALL, *words).data).digest()

    assert digest() == digest() != digest("data.train_size=288")
    decoded = ("data.train_transform={}", "data.eval_transform={}")
    assert digest(*decoded) == digest(*decoded) != digest(*decoded, "data.val_fraction=0.2")


def test_changed_code_has_a_trunk_of_its_own(tmp_path, monkeypatch):
    module = tmp_path / "my_data.py"
    module.write_text("from switchlora.data import Digits\n\n\nclass Mine(Digits):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = ("data.train._target_=my_data.Mine", "data.test._target_=my_data.Mine")
    before = key_of(*words)
    module.write_text(module.read_text() + "# changed\n")
    assert key_of(*words) != before


def test_a_criterion_that_fires_before_the_first_update_needs_no_trunk(tmp_path):
    words = ("switch/init=zero_b", "switch/rank=fixed", "switch.rank.rank=4")
    made(tmp_path / "late", LATE, trunk=tmp_path / "trunk")
    start = ("switch/criterion=at_start", *words)
    summary, _ = made(tmp_path / "start", *start, trunk=tmp_path / "trunk")
    assert summary["trunk"] is None and summary["switch"]["num_updates"] == 0


def test_a_run_that_branched_off_from_another_one_extends_no_trunk(tmp_path):
    made(tmp_path / "one", "switch/criterion=never", "checkpoint.keep=9")
    place = find_all(tmp_path / "one")[-1]
    words = ("full.optimizer.lr=0.01", "switch/criterion=never", f"resume={place}")
    made(tmp_path / "other", *words, trunk=tmp_path / "trunk")
    assert not (tmp_path / "trunk").exists()


def test_a_replay_finds_the_first_measurement_at_which_a_policy_fires(sweep):
    place, _ = sweep
    history = read_record(place / "never").history()
    policy = build(composed(*DATED, LATE).switch)
    assert [first_firing(policy, history[:n]) for n in range(5)] == [None, None, None, 15, 15]


def test_a_run_in_stages_leaves_the_trunk_at_its_first_stage(sweep):
    place, _ = sweep
    history = read_record(place / "never").history()
    policy = build(composed("+method=staged", "switch.criterion.patience=1").switch)
    settled = history[-1].layers["blocks.0.attn.qkv"]
    moving = replace(settled, update_norm=9 * settled.update_norm)
    measured = [
        replace(m, layers=dict.fromkeys(m.layers, moving) | {"blocks.0.attn.qkv": stats})
        for m, stats in zip(history[:2], (moving, settled), strict=True)
    ]
    later = replace(measured[1], num_updates=measured[0].num_updates + 52)
    targets = policy.find_targets(build(composed(*SMALL).model))
    assert first_firing(policy, [measured[0], later]) is None
    assert first_firing(policy, [measured[0], later], targets) == later.num_updates


def train_in_a_process(folder, words, trunk):
    config = OmegaConf.create(
        composed(*SMALL, *DATED, *words, f"trunk.dir={trunk}", "trunk.time_share=1")
    )
    with folder.with_suffix(".log").open("w") as log, redirect_stdout(log):
        torch.set_num_threads(1)
        train(config, folder)


@pytest.mark.parametrize("wait", ["true", "false"])
def test_runs_at_the_same_time_wait_for_the_one_that_extends_or_go_alone(wait, sweep, tmp_path):
    trunk = tmp_path / "trunk"
    settings = {"early": EARLY, "late": LATE, "never": "switch/criterion=never"}
    jobs = [
        FORKS.Process(
            target=train_in_a_process,
            args=(tmp_path / name, (word, f"trunk.wait={wait}"), trunk),
        )
        for name, word in settings.items()
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    for name in settings:
        assert_same_run(tmp_path / name, sweep[0] / "alone" / name)
    said = "".join((tmp_path / f"{name}.log").read_text() for name in settings)
    assert ("waits for the run that extends" in said) == (wait == "true")
    if wait == "true":
        made_by = sum(computed(read_record(tmp_path / name).summary) for name in settings)
        window = 5  # computed again where a run sees a measurement before its checkpoint
        assert 25 + 15 + 30 <= made_by <= 25 + 15 + 30 + 2 * window


def test_a_killed_extender_leaves_a_trunk_that_the_next_run_extends(sweep, tmp_path):
    trunk, run = tmp_path / "trunk", tmp_path / "killed"
    never = ("switch/criterion=never",)
    killed = FORKS.Process(target=train_in_a_process, args=(run, never, trunk))
    killed.start()
    end = time.monotonic() + 60
    while not list(trunk.glob("*/checkpoints/update-*")) and time.monotonic() < end:
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert not (run / "summary.json").exists()
    (folder,) = trunk.iterdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "trai')
    summary, _ = made(run, *never, "resume=auto", trunk=trunk)
    assert computed(summary) < 30
    alone = sweep[0] / "alone" / "never"
    assert_same_run(run, alone)
    assert read_record(folder).history() == read_record(alone).history()


def test_a_run_that_began_alone_extends_no_trunk_without_its_history(sweep, tmp_path, at_update):
    trunk, run = tmp_path / "trunk", tmp_path / "run"
    never = ("switch/criterion=never", "checkpoint.every_updates=1", "max_skipped=0")
    at_update(12, lambda images: images * float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        made(run, *never)
    at_update(None, lambda images: images)
    made(run, *never, "resume=auto", trunk=trunk)
    assert not list(trunk.glob("*/checkpoints/*"))
    assert_same_run(run, sweep[0] / "alone" / "never")
    summary, _ = made(tmp_path / "late", LATE, trunk=trunk)
    assert summary["trunk"] is None
    assert_same_run(tmp_path / "late", sweep[0] / "alone" / "late")


def test_events_of_an_unfinished_write_are_cut_off_behind_the_last_measurement(tmp_path):
    log = TrunkLog(tmp_path)
    train = '{"event": "train", "num_updates": 5, "train/loss": 1.0}\n'
    whole = train + '{"event": "measure", "num_updates": 5}\n'
    log.path.write_text(whole + train + '{"event": "tra')
    log.mend()
    assert log.path.read_text() == whole


def test_a_resumed_run_counts_only_what_it_had_not_computed_itself(sweep, tmp_path, at_update):
    never = ("switch/criterion=never", "checkpoint.every_updates=1", "max_skipped=0")
    at_update(9, lambda images: images * float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        made(tmp_path, *never)
    at_update(None, lambda images: images)
    summary, _ = made(tmp_path, *never, "resume=auto", trunk=sweep[0] / "trunk")
    assert summary["trunk"]["reused_updates"] == 30 - 8
    assert_same_run(tmp_path, sweep[0] / "alone" / "never")


def test_a_trunk_that_cannot_be_written_is_left_and_the_run_goes_on(sweep, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(TrunkLog, "append", full)
    _, said = made(tmp_path / "late", LATE, trunk=tmp_path / "trunk")
    assert "the trunk is left, this run goes on alone: No space left" in said
    assert_same_run(tmp_path / "late", sweep[0] / "alone" / "late")


def damage_line(log, number):
    """Take the first character of a line away."""
    lines = log.read_bytes().split(b"\n")
    lines[number - 1] = lines[number - 1][1:]
    log.write_bytes(b"\n".join(lines))


def test_a_run_leaves_a_trunk_whose_log_is_damaged_and_goes_on_alone(sweep, tmp_path):
    trunk = tmp_path / "trunk"
    made(tmp_path / "early", EARLY, trunk=trunk)
    (folder,) = trunk.iterdir()
    damage_line(folder / "metrics.jsonl", 2)
    for name, words in {"late": LATE, "never": "switch/criterion=never"}.items():
        summary, said = made(tmp_path / name, words, trunk=trunk)
        reason = f"{folder / 'metrics.jsonl'} is damaged: line 2 is no JSON"
        assert f"the trunk is left, this run goes on alone: {reason}" in said
        assert computed(summary) == 30 and said.count("the trunk is left") == 1
        assert_same_run(tmp_path / name, sweep[0] / "alone" / name)
        assert not (tmp_path / name / ".from-trunk").exists()


def test_a_run_that_extends_a_trunk_leaves_it_when_its_log_gets_damaged(
    sweep, tmp_path, at_update
):
    trunk = tmp_path / "trunk"

    def damage(images):
        (log,) = trunk.glob("*/metrics.jsonl")
        damage_line(log, 1)
        return images

    at_update(12, damage)
    _, said = made(tmp_path / "late", LATE, trunk=trunk)
    assert "the trunk is left, this run goes on alone: " in said and "damaged: line 1" in said
    assert_same_run(tmp_path / "late", sweep[0] / "alone" / "late")


def test_thinning_keeps_the_newest_and_the_most_even_spread(tmp_path):
    for updates in (10, 20, 30, 40, 50):
        path = tmp_path / "checkpoints" / f"update-{updates:08d}"
        path.mkdir(parents=True)
        (path / "state.pt").write_bytes(bytes(100))
    thin(tmp_path, 300)
    kept = [updates_of(path) for path in find_all(tmp_path)]
    assert len(kept) == 3 and kept[0] == 50
    thin(tmp_path, 0)
    assert [updates_of(path) for path in find_all(tmp_path)] == [50]


def test_a_negative_budget_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="trunk.gigabytes"):
        Trunk(tmp_path, {}, gigabytes=-1)


def test_a_stopped_run_gives_its_lock_back(tmp_path, at_update):
    words = ("switch/criterion=never", "max_skipped=0")
    at_update(12, lambda images: images * float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        made(tmp_path / "stopped", *words, trunk=tmp_path / "trunk")
    run = prepare(
        composed(*SMALL, *DATED, LATE, f"trunk.dir={tmp_path / 'trunk'}"), tmp_path / "b"
    )
    assert run.trunk.extends and run.state.num_updates == 10
    at_update(None, lambda images: images)
    with run.log:
        fit(run)
    run.trunk.release()
