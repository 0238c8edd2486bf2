"""A run that is interrupted anywhere goes on as if it had not been."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from conf_yamls import composed
from conftest import acting
from runs import (
    BY_DATE,
    DIGITS,
    SHORT,
    assert_same_run,
    events_without_times,
    history_row,
    make_run,
    wandb_records,
)
from switchlora.adapters import adapted_modules
from switchlora.config import build
from switchlora.errors import CheckpointUnusable, Interrupted
from switchlora.learner import Learner
from switchlora.process import Interruption
from switchlora.run import prepare
from switchlora.storage import (
    FORMAT,
    STATE,
    SUMS,
    FolderLock,
    find_all,
    is_run,
    load_model,
    load_saved,
    read,
    read_config,
    read_events,
    read_history,
    read_record,
    read_summary,
    updates_of,
)
from switchlora.storage.files import sha256_of

EVERYTHING = (
    *BY_DATE,
    "ema=0.9",
    "data.mixup_alpha=0.2",
    "full.accumulation=2",
    "+model.drop_path_rate=0.3",
    "switch.split_qkv=true",
)
WORKERS = (
    *BY_DATE,
    "data.train_transform={auto_augment: rand-m9-mstd0.5, re_prob: 0.2}",
    "data.eval_transform={}",
    "system.workers=2",
)
RANK_2 = ("switch/rank=fixed", "switch.rank.rank=2")
KINDS = {
    "everything": EVERYTHING,
    "workers": WORKERS,
    "sgd": (*BY_DATE, "recipe@full=sgd", "switch.moments=factors", "adapter.rewarmup_updates=4"),
    "lion": (*BY_DATE, "recipe@full=lion", "switch.moments=reset", "full.precision=bf16"),
    "lean": (
        *(*BY_DATE, "model.depth=2"),
        *("full.precision=bf16", "switch.residual_dtype=bf16", "switch.train_factors=[B]"),
        "switch/init=update_svd",
        *(r"switch.freeze=[patch_embed,pos_embed,cls_token,'blocks\.0\.','blocks\.1.*\.q$']",),
        *("switch.split_qkv=true", "adapter.activation_checkpointing=gelu", "ema=0.9"),
    ),
    "quantised": (
        *(*BY_DATE, "switch.residual_dtype=nf4", "switch.split_qkv=true", "ema=0.9"),
        *("full.precision=bf16", "switch.joint_epochs=0.1"),
    ),
    "fp16": (
        *BY_DATE,
        *("full.precision=fp16", "switch/rank=fixed", "switch.rank.rank=1"),
        *("model.depth=1", "model.embed_dim=16", "model.num_heads=1"),
    ),
    "criterion": (
        "switch/criterion=update_norm",
        "switch.criterion.patience=1",
        "switch.criterion.fraction=0.95",
        "switch/rank=energy",
        "monitor.exact=true",
        "switch.remove_weight_decay=true",
    ),
    "guided": (
        *("+method=self_guided_32", "switch.joint_epochs=1.25"),
        *("switch.dropout=0.1", "ema=0.9", r"switch.targets=['blocks\.0\.mlp\.fc[12]']"),
    ),
    "joint": (
        *("+method=prelora", "switch.joint_epochs=0.25", "monitor.window=3"),
        *("switch.criterion.tau=90", "switch.criterion.zeta=90"),
    ),
    "staged": (
        *("+method=staged", "switch.stages.interval=3", "monitor.window=3", *RANK_2),
        *("switch.criterion.fraction=0.77", "switch.criterion.patience=1"),
    ),
    "restarts": (
        *("+method=relora", "switch.criterion.epoch=0.5", "switch.restart.every_epochs=0.4"),
        *("adapter/refactoring=reflora", "adapter.refactoring.warmup_updates=3", *RANK_2),
    ),
    "taken back": (
        "model.embed_dim=64",
        *("switch/guard=full", "switch.guard.patience=1", "switch.guard.criterion.patience=1"),
        *(
            "switch.guard.criterion.fraction=1.1",
            "adapter.lr_scale=100",
            "adapter.factor_lr=3",
            *RANK_2,
        ),
        *("switch/criterion=at_epoch", "switch.criterion.epoch=0.4", "monitor.window=3"),
        *("full.scheduler.warmup_t=2", "data.train_size=640", "max_updates=42"),
    ),
}
CHANGES = {
    "guided": {"switch", "settle"},
    "joint": {"switch", "settle"},
    "quantised": {"switch", "settle"},
    "staged": {"stage"},
    "restarts": {"switch", "restart"},
    "taken back": {"switch", "take_back"},
}
"""what a run of a kind must go through; {'switch'} for the others"""
TEN = ("data.train_size=320", "full.scheduler.warmup_t=5", "monitor.window=5", "max_updates=22")
"""10 updates an epoch"""


@pytest.fixture
def signal_at(at_update):
    """Send this process a real signal while it makes a given update."""
    return lambda number, update: at_update(update, killing(number))


def killing(number):
    """Sends this process a signal and gives its argument back."""

    def kill(images):
        os.kill(os.getpid(), number)
        return images

    return kill


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_anywhere_and_resuming_is_bit_identical(kind, tmp_path, signal_at):
    options = (*TEN, *KINDS[kind])
    whole = make_run(tmp_path / "whole", *options)
    assert {each["kind"] for each in whole["transitions"]} == CHANGES.get(kind, {"switch"})
    last = whole["transitions"][-1]["num_updates"]
    stops = {last, last + 1}  # at a change, after it
    if kind not in CHANGES:  # the others train in full as "everything" does
        stops.add(3)  # in an epoch
    if kind in ("everything", "workers"):
        stops.add(10)  # at an epoch's end, which is alike in all kinds
    for stop in sorted(stops):
        signal_at(signal.SIGTERM, stop)
        with pytest.raises(Interrupted, match=f"SIGTERM after update {stop}; the last checkpoint"):
            make_run(tmp_path / "stopped", *options, "resume=auto")
    signal_at(signal.SIGTERM, None)
    make_run(tmp_path / "stopped", *options, "resume=auto")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of everything that keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("kept")
    make_run(folder, *EVERYTHING, "checkpoint.keep=99", "checkpoint.every_updates=13")
    return folder


def test_there_is_a_checkpoint_at_every_interval_epoch_and_around_the_switch(kept):
    names = [path.name for path in reversed(find_all(kept))]
    updates = [name.removeprefix("update-").lstrip("0") for name in names]
    assert updates == ["13", "20", "30", "30.1", "40", "53", "60"]


@pytest.mark.parametrize("place", [1, 2, 3, 5])
def test_a_run_that_branches_off_at_any_checkpoint_ends_the_same(kept, place, tmp_path):
    path = list(reversed(find_all(kept)))[place]
    before = find_all(kept)
    make_run(tmp_path, *EVERYTHING, f"resume={path}")
    assert_same_run(kept, tmp_path)
    assert find_all(kept) == before, "the run that it branched off from is left alone"


def test_checkpoints_hold_plain_types_and_rebuild_the_adapted_module(kept):
    before, after = (
        read(kept / "checkpoints" / f"update-{n}") for n in ("00000030", "00000030.1")
    )
    assert before["train"]["phase"] == "full" and before["adapters"] == {}
    assert after["train"]["phase"] == "adapter" and not after["monitor"]["references"]
    frozen = set(after["weights"]) - set(after["trained"])
    assert "blocks.0.attn.qkv.weight" in frozen and not frozen & set(after["moments"])
    parts = after["adapters"]["blocks.0.attn.qkv"]["parts"]
    ranks = {part: values["rank"] for part, values in parts.items()}
    assert ranks == {
        part: len(after["weights"][f"blocks.0.attn.qkv.lora_A.{part}"]) for part in "qkv"
    }


def test_a_model_is_rebuilt_from_a_checkpoint_alone(kept):
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    adapted = load_model(find_all(kept)[0])
    assert adapted_modules(adapted)
    plain = build(composed(*DIGITS).model).eval()
    plain.load_state_dict(load_file(kept / "model.safetensors"))
    assert (adapted(images) - plain(images)).abs().max() <= 1e-5


def test_what_reads_a_run_takes_its_path_as_a_string_too(short):
    folder = str(short)
    checkpoints = find_all(folder)
    assert checkpoints == find_all(short)
    path = str(checkpoints[0])
    assert updates_of(path) == read(path)["train"]["num_updates"] == 10
    assert not adapted_modules(load_model(path))
    assert load_saved(path).source == checkpoints[0]
    assert is_run(folder) and read_record(folder).config == read_config(folder)
    assert read_summary(folder) is None and len(read_history(folder)) == 1


def test_a_run_given_for_a_checkpoint_is_told_with_its_newest_checkpoint(short, tmp_path):
    newest = re.escape(str(find_all(short)[0]))
    with pytest.raises(CheckpointUnusable, match=f"the folder of a run: .* {newest}$"):
        load_model(short)
    with pytest.raises(CheckpointUnusable, match="is no folder: give a checkpoint"):
        load_model(tmp_path / "none")


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    make_run(tmp_path, *BY_DATE, "checkpoint.every_updates=5", "checkpoint.keep=2")
    best = read(find_all(tmp_path)[0])["train"]["best_update"]
    names = [path.name for path in find_all(tmp_path)]
    assert names[:2] == ["update-00000060", "update-00000055"]
    assert all(name.startswith(f"update-{best:08d}") for name in names[2:])
    assert any(name.startswith(f"update-{best:08d}") for name in names)


def test_no_checkpoints_when_none_are_kept(tmp_path):
    make_run(tmp_path, *BY_DATE, "checkpoint.keep=0", "max_updates=25")
    assert find_all(tmp_path) == []


def with_value(value, *keys):
    """Puts a value into a state, or with Ellipsis takes it out."""

    def change(state):
        inside = state
        for key in keys[:-1]:
            inside = inside[key]
        if value is ...:
            del inside[keys[-1]]
        else:
            inside[keys[-1]] = value
        return state

    return change


OUTSIDE = {"device": "/dev/zero", "above": "../../metrics.jsonl", "folder": "."}
CONTENTS = {
    "a list": lambda state: [state],
    "no weights": with_value({}, "weights"),
    "no key": with_value(..., "random"),
    "a word for a number": with_value("7", "train", "num_updates"),
    "another update": with_value(9, "train", "num_updates"),
    "a word in the history": with_value(["x"], "train", "history"),
    "no ledger": with_value(..., "train", "segments"),
    "an adapter nowhere": with_value({"parts": {}}, "adapters", "nowhere"),
    "a shape": with_value(torch.zeros(3), "weights", "head.bias"),
    "a moment": with_value(torch.zeros(3), "moments", "head.bias", "exp_avg"),
    "a generator": with_value("x", "random", 0, "torch"),
    "a negative log": with_value(-1, "log", "bytes"),
    "no laps": with_value(None, "stopwatch", "laps"),
}


def damage(path, kind):
    state_file = path / STATE
    if kind == "truncated":
        os.truncate(state_file, state_file.stat().st_size // 2)
    elif kind == "empty":
        os.truncate(state_file, 0)
    elif kind == "flipped":
        content = bytearray(state_file.read_bytes())
        content[len(content) // 2] ^= 1
        state_file.write_bytes(content)
    elif kind == "state missing":
        state_file.unlink()
    elif kind == "sums missing":
        (path / SUMS).unlink()
    elif kind == "sums cut":
        (path / SUMS).write_text("1234")
    elif kind in OUTSIDE:
        with (path / SUMS).open("a") as sums:
            sums.write(f"{'0' * 64}  {OUTSIDE[kind]}\n")
    elif kind == "link":
        state_file.rename(path / "real.pt")
        state_file.symlink_to(path / "real.pt")
    else:
        state = torch.load(state_file, weights_only=True)
        if kind == "version":
            state["format"] = FORMAT + 1
        elif kind in CONTENTS:
            state = CONTENTS[kind](state)
        else:
            state["shapes"]["head.weight"] = (10, 16)
        torch.save(state, state_file)
        (path / SUMS).write_text(f"{sha256_of(state_file)}  {STATE}\n")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of ten updates that did not come to write its summary."""
    folder = tmp_path_factory.mktemp("short")
    make_run(folder, "checkpoint.every_updates=4", "max_updates=10")
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize(
    "kind,words",
    [
        ("truncated", "is damaged: state.pt does not match its checksum"),
        ("empty", "is damaged: state.pt does not match its checksum"),
        ("flipped", "is damaged: state.pt does not match its checksum"),
        ("state missing", "is not whole: state.pt cannot be read"),
        ("sums missing", "is not whole: SHA256SUMS cannot be read"),
        ("sums cut", "is not whole: SHA256SUMS cannot be read"),
        ("device", "is damaged: SHA256SUMS names /dev/zero, outside of it"),
        ("above", r"is damaged: SHA256SUMS names ../../metrics.jsonl, outside of it"),
        ("folder", r"is damaged: SHA256SUMS names ., outside of it"),
        ("link", "is not whole: state.pt is no plain file"),
        *((kind, "(has wrong content: |holds a list).*") for kind in CONTENTS),
        ("version", f"has format {FORMAT + 1}, this version of switchlora reads 7 and {FORMAT}"),
        (
            "other model",
            r"is another model's: head.weight is \(10, 16\) there and \(10, 32\) here",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    kind, words, short, tmp_path, capsys
):
    shutil.copytree(short, tmp_path, dirs_exist_ok=True)
    newest, before = find_all(tmp_path)
    damage(newest, kind)
    make_run(tmp_path, "resume=auto", "checkpoint.every_updates=4", "max_updates=10")
    said = capsys.readouterr().out
    assert re.search(rf"{newest.name} {words}; the one before it is used", said)
    assert f"resumed from {before}" in said
    counts = [e["num_updates"] for e in read_events(tmp_path, "train")]
    assert counts == list(range(1, 11))
    assert newest.with_name(f"unusable-{newest.name}").exists()


def test_a_run_without_a_usable_checkpoint_does_not_start_over(tmp_path):
    make_run(tmp_path, "max_updates=25")
    (tmp_path / "summary.json").unlink()
    for path in find_all(tmp_path):
        damage(path, "truncated")
    with pytest.raises(ValueError, match="no checkpoint can be used: .* is damaged"):
        make_run(tmp_path, "resume=auto", "max_updates=25")
    assert len(list(read_events(tmp_path, "train"))) == 25


def test_unfinished_writes_are_not_taken_for_checkpoints_and_are_removed(tmp_path):
    make_run(tmp_path, "max_updates=10")
    (tmp_path / "summary.json").unlink()
    left = tmp_path / "checkpoints" / ".writing-00000011"
    left.mkdir()
    others = [tmp_path / "checkpoints" / name for name in ("._update-00000010", "update-00000099")]
    for other in others:
        other.write_text("of another system")
    make_run(tmp_path / "branch", f"resume={tmp_path}", "max_updates=20")
    assert left.exists(), "another run's folder is left alone"
    assert all(other.exists() for other in others)
    for other in others:
        other.rename(tmp_path / "branch" / "checkpoints" / other.name)
    (tmp_path / "branch" / "summary.json").unlink()
    left.rename(tmp_path / "branch" / "checkpoints" / left.name)
    shutil.rmtree(find_all(tmp_path / "branch")[0])
    make_run(tmp_path / "branch", "resume=auto", "max_updates=20")
    names = [path.name for path in (tmp_path / "branch" / "checkpoints").iterdir()]
    assert {other.name for other in others} < set(names) and len(names) == 4


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    summary = make_run(tmp_path, "max_updates=10")
    again = make_run(tmp_path, "max_updates=10", "resume=auto")
    assert again["num_updates"] == summary["num_updates"] == 10
    assert "holds a finished run; nothing to do" in capsys.readouterr().out


def test_a_finished_run_with_another_configuration_is_refused(tmp_path):
    make_run(tmp_path, "max_updates=10")
    with pytest.raises(ValueError, match="another configuration .*max_updates: 10 there, 20 here"):
        make_run(tmp_path, "max_updates=20", "resume=auto")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("summary.json", "", "line 1 is empty; without this file the last checkpoint is used"),
        ("summary.json", "[1]", "line 1 holds no JSON object; without this file"),
        ("summary.json", '{"status": "fin', "line 1 is no JSON.*; without this file"),
        (
            "config.yaml",
            "",
            "it holds no mapping; without summary.json the last checkpoint is used",
        ),
        ("config.yaml", "data:\n  root", "line 2 has no end, the rest is missing"),
    ],
)
def test_a_finished_run_whose_files_are_damaged_is_refused_in_one_line(
    short, tmp_path, name, content, words
):
    shutil.copytree(short, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").write_text('{"status": "finished", "val": {}, "phases": {}}')
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path / name} is damaged: {words}"):
        make_run(tmp_path, "resume=auto", "checkpoint.every_updates=4", "max_updates=10")


def test_a_run_goes_on_without_the_damaged_line_of_its_log_and_keeps_the_file(stopped, capsys):
    log = stopped / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")
    lines[4] = b"\xff" * len(lines[4])
    log.write_bytes(b"\n".join(lines))
    make_run(stopped, "resume=auto")
    kept = stopped / "damaged-metrics.jsonl"
    words = f"{log} is damaged: line 5 is not UTF-8; the run goes on without, {kept} has all"
    assert words in capsys.readouterr().out
    events = list(read_events(stopped))
    assert [event["event"] for event in events].count("lost") == 1
    assert log.read_bytes().split(b"\n")[:4] == lines[:4] and b"\xff" in kept.read_bytes()
    assert events[-1]["event"] == "test"


def test_a_log_that_was_changed_at_the_same_length_is_told(stopped, capsys):
    log = stopped / "metrics.jsonl"
    log.write_text(log.read_text().replace('"train/loss": 2', '"train/loss": 3', 1))
    make_run(stopped, "resume=auto")
    assert f"{log} was changed after the checkpoint was saved" in capsys.readouterr().out


def test_a_branch_owns_a_checkpoint_before_its_first_update(stopped, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "update", fail)
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / "branch", f"resume={stopped}", "seed=1")
    assert [path.name for path in find_all(tmp_path / "branch")] == ["update-00000012"]
    before = list(read_events(tmp_path / "branch", "train"))
    monkeypatch.undo()
    make_run(tmp_path / "branch", "resume=auto", "seed=1")
    assert list(read_events(tmp_path / "branch", "train"))[: len(before)] == before


def test_a_branch_with_another_optimizer_starts_its_moments_anew_and_says_so(
    stopped, tmp_path, capsys
):
    make_run(tmp_path / "branch", f"resume={stopped}", "recipe@full=sgd", "max_updates=15")
    said = capsys.readouterr().out
    assert "moments start anew: the optimizer was AdamW, it is SGD with momentum" in said


def test_a_branch_with_other_data_in_the_middle_of_an_epoch_is_refused(stopped, tmp_path):
    with pytest.raises(ValueError, match="in the middle of an epoch of other data .*batch_size"):
        make_run(tmp_path / "branch", f"resume={stopped}", "data.batch_size=16")


def test_auto_starts_from_the_beginning_where_there_is_nothing(tmp_path):
    assert make_run(tmp_path / "new", "resume=auto", "max_updates=5")["num_updates"] == 5


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was interrupted after update 12."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        acting(patch)(12, killing(signal.SIGTERM))
        make_run(folder)
    return folder


@pytest.fixture
def stopped(interrupted, tmp_path):
    """A copy of it for a test of its own."""
    return shutil.copytree(interrupted, tmp_path / "stopped")


def test_wandb_goes_on_without_a_gap_or_a_double_step(tmp_path, signal_at):
    for stop in (12, 33):
        signal_at(signal.SIGTERM, stop)
        with pytest.raises(Interrupted):
            make_run(tmp_path, *BY_DATE, "log.wandb.mode=offline", "resume=auto")
    signal_at(signal.SIGTERM, None)
    make_run(tmp_path, *BY_DATE, "log.wandb.mode=offline", "resume=auto")
    names = [path.name for path in tmp_path.glob("wandb/**/offline-run-*")]
    ids = {name.split("-")[-1].partition(".")[0] for name in names}  # .1: of the same second
    assert len(ids) == 1 and len(list(tmp_path.glob("wandb/interrupted/*"))) == 2
    records = wandb_records(tmp_path)
    rows = [history_row(r) for r in records if r["type"] == "history"]
    steps = [r["num_updates"] for r in rows if "train/loss" in r]
    assert steps == list(range(1, 61))
    logged = [r["train/loss"] for r in rows if "train/loss" in r]
    assert logged == [e["train/loss"] for e in read_events(tmp_path, "train")]
    assert [row["_step"] for row in rows] == list(range(len(list(read_events(tmp_path)))))
    assert sum(any("switch/ranks" in key for key in row) for row in rows) == 1


def test_another_configuration_is_refused_in_place_and_named(stopped):
    with pytest.raises(ValueError, match="full.optimizer.lr: 0.001 there, 0.01 here.*resume=/"):
        make_run(stopped, "resume=auto", "full.optimizer.lr=0.01")


def test_what_does_not_shape_results_may_change(stopped):
    summary = make_run(stopped, "resume=auto", "max_skipped=9", "system.workers=1", "name=other")
    assert summary["num_updates"] == 60


def test_a_branch_keeps_the_history_and_says_what_differs(stopped, tmp_path, capsys):
    make_run(tmp_path / "branch", f"resume={stopped}", "full.optimizer.lr=0.01", "max_updates=20")
    said = capsys.readouterr().out
    assert "branches off with" in said and "full.optimizer.lr: 0.001 there, 0.01 here" in said
    before = events_without_times(stopped)
    branch = events_without_times(tmp_path / "branch")
    assert branch[: len(before)] == before
    rates = [e["train/lr"] for e in branch if e["event"] == "train"]
    assert rates[12] > 5 * rates[11]


def test_a_branch_into_a_folder_that_holds_a_run_is_refused(stopped):
    with pytest.raises(ValueError, match="already holds a run; resume=auto goes on"):
        make_run(stopped, f"resume={stopped}")


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint and no run folder with one"):
        make_run(tmp_path / "run", f"resume={tmp_path / 'nowhere'}")


def test_metrics_that_were_cut_are_noticed(stopped):
    os.truncate(stopped / "metrics.jsonl", 100)
    with pytest.raises(ValueError, match="missing or shorter than the checkpoint knows"):
        make_run(stopped, "resume=auto")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with FolderLock(tmp_path), pytest.raises(ValueError, match="another process is running in"):
        make_run(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_child_that_outlives_a_run_does_not_hold_its_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    child = context.Process(target=lambda: (begun.set(), time.sleep(60)))
    with FolderLock(tmp_path):
        child.start()
        begun.wait()
    try:
        with FolderLock(tmp_path):
            assert child.is_alive()
    finally:
        child.kill()


def test_an_average_that_starts_in_a_branch_starts_at_the_present_weights(stopped, tmp_path):
    config = composed(*SHORT, f"resume={stopped}", "ema=0.9")
    run = prepare(config, tmp_path / "branch")
    with run.log:
        average, weights = run.ema.model.state_dict(), run.model.state_dict()
        assert all(torch.equal(average[name], weights[name]) for name in weights)


def test_a_second_interrupt_kills_at_once_and_the_first_is_kept():
    handler = signal.default_int_handler  # a shell starts background jobs with SIGINT ignored
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.received is signal.SIGINT
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_summary_of_a_resumed_run_counts_all_updates(stopped):
    summary = make_run(stopped, "resume=auto")
    assert sum(phase["num_updates"] for phase in summary["phases"].values()) == 60
    assert json.loads((stopped / "summary.json").read_text())["num_updates"] == 60
