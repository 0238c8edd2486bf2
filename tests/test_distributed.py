"""Real processes of torchrun's launcher: they agree, they repeat, others can go on from them."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from ranks import (
    compare_settings,
    program_with_a_changed_weight,
    program_with_other_factors,
    program_with_own_words,
    run_and_look,
    run_with_a_broken_switch,
)
from runs import SHORT, assert_same_run, make_run
from starts import Started, children, program, torchrun
from switchlora.process import distributed
from switchlora.storage import STATE, find_all, read_events

PLATEAU = (
    "model.depth=2",
    "switch/criterion=loss_plateau",
    "switch.criterion.tolerance=6",
    "switch.criterion.patience=1",
    "checkpoint.keep=99",
    "full.accumulation=2",
    *("data.train_size=320", "monitor.window=5", "full.scheduler.warmup_t=5"),
)
"""10 updates an epoch; the switch is at update 10"""


def run_ranks(processes, folder, *overrides, act=run_and_look):
    """A run on several ranks that also looks around; what it found."""
    words = (processes, act, str(folder), *overrides)
    with Started(f"{folder}.said", torchrun, *words) as started:
        done = started.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((Path(folder) / "ranks.json").read_text())


def losses(folder):
    return [e["train/loss"] for e in read_events(folder, "train")]


def switched_at(folder):
    return [e["num_updates"] for e in read_events(folder, "switch")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    make_run(folder, *PLATEAU)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return folder, run_ranks(2, folder, *PLATEAU, "log.cost_model=true")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_ranks(2, folder, *PLATEAU, "system.parallel=fsdp", "log.cost_model=true")


def assert_like(alone, folder):
    """The same losses to fp32 accuracy, the same switch, each update once."""
    assert switched_at(folder) == switched_at(alone) == [10]
    assert losses(folder) == pytest.approx(losses(alone), rel=2e-5)
    counts = [e["num_updates"] for e in read_events(folder, "train")]
    assert counts == list(range(1, 31))


def test_two_ranks_make_the_run_of_one_process(alone, pair):
    assert_like(alone, pair[0])


def test_every_tensor_is_the_same_on_all_ranks(pair):
    _, found = pair
    assert found["spread"] == 0.0 and found["trained"] > 0


def test_the_summary_shows_the_checksum_of_the_trained_tensors(pair):
    summary = json.loads((pair[0] / "summary.json").read_text())
    assert len(summary["switch"]["checksum"]) == 16


def test_sharded_ranks_make_the_run_of_one_process(alone, sharded):
    folder, found = sharded
    assert_like(alone, folder)
    assert found["local"] < 0.6 * found["total"]


def memory_of(folder, phase):
    memory = json.loads((folder / "summary.json").read_text())["phases"][phase]["memory"]
    return memory["measured"], memory["predicted"]


@pytest.mark.parametrize("phase", ["full", "adapter"])
def test_a_rank_holds_the_bytes_that_were_predicted_and_a_shard_its_part_of_them(
    pair, sharded, phase
):
    measured, predicted = memory_of(pair[0], phase)
    assert measured["ddp_buckets"] == 0 < measured["gradients"]
    assert measured == pytest.approx(predicted, rel=0.01)
    part, predicted = memory_of(sharded[0], phase)
    assert part["activations"] == pytest.approx(predicted["activations"], rel=0.01)
    for states in ("parameters", "gradients", "optimizer_state"):
        assert measured[states] / 2 <= part[states] <= 0.6 * measured[states]


STAGED = (
    *("+method=staged", "switch.split_qkv=true", "switch.stages.interval=5", "monitor.window=5"),
    *("switch/rank=fixed", "switch.rank.rank=2", "max_updates=42"),
    *("switch.criterion.fraction=0.77", "switch.criterion.patience=1"),
)
GUIDED = (
    *("+method=self_guided_32", "switch.joint_epochs=0.5", "max_updates=24"),
    r"switch.targets=['blocks\.0\.mlp\.fc[12]']",
)
TAKEN_BACK = (
    "model.embed_dim=64",
    *(
        "switch/guard=full",
        "switch.guard.patience=1",
        "adapter.lr_scale=100",
        "adapter.factor_lr=3",
    ),
    *("switch/criterion=at_epoch", "switch.criterion.epoch=0.4", "monitor.window=3"),
    *("switch.guard.criterion.patience=1", "switch.guard.criterion.fraction=1.1"),
    *("switch/rank=fixed", "switch.rank.rank=2", "max_updates=30", "full.scheduler.warmup_t=2"),
)
"""at a hundred times its rate the adapter's loss is about twice that of full training"""


@pytest.mark.parametrize(
    "options,kinds",
    [
        (STAGED, {"stage"}),
        (GUIDED, {"switch", "settle"}),
        (TAKEN_BACK, {"switch", "take_back"}),
    ],
    ids=["staged", "guided", "taken back"],
)
def test_ranks_stay_together_through_every_change(options, kinds, tmp_path):
    found = run_ranks(2, tmp_path, *options)
    transitions = json.loads((tmp_path / "summary.json").read_text())["transitions"]
    assert {each["kind"] for each in transitions} == kinds and len(transitions) > 1
    assert found["spread"] == 0.0 and found["trained"] > 0


def test_ranks_agree_on_values_and_on_failures(pair):
    for seen in pair[1]["ranks"]:
        assert seen["sum"] == [2.0, 1.0] and seen["any"] == [True, False]
        assert seen["new folder"] is True
        assert seen["primary"] == 0 and seen["all well"] == ""
        assert "broken on rank 0" in seen["primary fails"]
        assert "broken on rank 1" in seen["one fails"]
        assert "ranks hold different tensors" in seen["different"]
    assert len({seen["same"] for seen in pair[1]["ranks"]}) == 1


def checkpoint_at(folder, name):
    return folder / "checkpoints" / name


@pytest.mark.parametrize("name", ["update-00000010", "update-00000020"])
def test_one_process_goes_on_from_the_checkpoint_of_two(alone, pair, name, tmp_path):
    make_run(tmp_path, *PLATEAU, f"resume={checkpoint_at(pair[0], name)}")
    assert_like(alone, tmp_path)


def test_one_process_goes_on_from_a_sharded_checkpoint(alone, sharded, tmp_path):
    folder = checkpoint_at(sharded[0], "update-00000020")
    assert (folder / "tensors" / ".metadata").exists() and (folder / STATE).exists()
    make_run(tmp_path, *PLATEAU, f"resume={folder}")
    assert_like(alone, tmp_path)


def test_four_ranks_go_on_from_the_checkpoint_of_two(alone, pair, tmp_path):
    found = run_ranks(4, tmp_path, *PLATEAU, f"resume={checkpoint_at(pair[0], 'update-00000010')}")
    assert found["spread"] == 0.0
    assert_like(alone, tmp_path)


def test_two_ranks_that_resume_are_bit_identical_to_two_that_did_not(pair, tmp_path):
    run_ranks(2, tmp_path, *PLATEAU, f"resume={checkpoint_at(pair[0], 'update-00000020')}")
    assert_same_run(pair[0], tmp_path)


def test_ranks_that_take_their_full_phase_from_a_trunk_make_the_same_run(pair, tmp_path):
    trunk = (*PLATEAU, "log.cost_model=true", f"trunk.dir={tmp_path / 'trunk'}")
    trunk += ("trunk.time_share=1",)
    for name in ("extends", "takes"):
        run_ranks(2, tmp_path / name, *trunk)
        assert_same_run(pair[0], tmp_path / name)
    taken = [
        json.loads((tmp_path / n / "summary.json").read_text())["trunk"]
        for n in ("extends", "takes")
    ]
    assert taken[0] is None and taken[1]["reused_updates"] == switched_at(tmp_path / "takes")[0]


def test_sharded_ranks_go_on_from_the_checkpoint_of_replicas(alone, pair, tmp_path):
    path = checkpoint_at(pair[0], "update-00000010")
    run_ranks(2, tmp_path, *PLATEAU, "system.parallel=fsdp", f"resume={path}")
    assert_like(alone, tmp_path)


def test_a_switch_that_fails_on_one_rank_is_undone_on_all(alone, tmp_path):
    options = (*PLATEAU, "full.accumulation=1")
    found = run_ranks(2, tmp_path, *options, act=run_with_a_broken_switch)
    assert found["spread"] == 0.0
    (failed,) = read_events(tmp_path, "switch_failed")
    assert failed["num_updates"] == 10 and "broken on rank 1" in failed["reason"]
    assert switched_at(tmp_path) and switched_at(tmp_path)[0] > 10
    assert losses(tmp_path)[:10] == pytest.approx(losses(alone)[:10], rel=2e-5)


def test_ranks_ask_each_other_about_flags_once_a_second(monkeypatch):
    clock, sums = [0.0], []

    def all_reduce(values):
        sums.append(clock[0])
        values.mul_(2)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    question = distributed.Question()
    answers = []
    for update in range(1000):
        clock[0] += 0.01
        answers.append(question.any_rank(False, update > 500))
    assert len(sums) < 20
    first = answers.index([False, True])
    assert 500 < first <= 501 + 100 and answers.count([True, True]) == 0
    for _ in range(3 * question.every):
        clock[0] += 10.0
        question.any_rank(False)
    assert question.every == 1


def test_nccl_knows_its_device_from_the_start(monkeypatch):
    joined = {}
    variables = {"RANK": "1", "MASTER_ADDR": "localhost", "LOCAL_RANK": "5"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    cuda = {"is_available": lambda: True, "device_count": lambda: 4, "set_device": joined.get}
    for name, does in cuda.items():
        monkeypatch.setattr(torch.cuda, name, does)
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **options: joined.update(options)
    )
    distributed.join()
    assert joined["device_id"] == torch.device("cuda", 1)


SHAPING = {
    "full.optimizer.lr=0.5": "full.optimizer.lr, ",
    "seed=7": "seed, 0 on rank 0 and 7 on rank 1",
    "epochs=9": "epochs, 3 on rank 0 and 9 on rank 1",
    "data.batch_size=8": "data.batch_size, ",
    "switch.keep=[norm]": "switch.keep, ",
    "checkpoint.every_updates=2": "checkpoint.every_updates, None on rank 0",
    "resume=auto": "resume, None on rank 0 and auto on rank 1",
    "log.cost_model=true": "log.cost_model, False on rank 0",
    "+model.qk_norm=true": "model.qk_norm, which only rank 1 has",
}
OF_A_MACHINE = ("system.threads=2", "system.workers=1", "system.device=cpu", "data=digits")


def test_ranks_agree_on_every_setting_but_those_of_a_machine(tmp_path):
    words = (2, compare_settings, str(tmp_path), *SHAPING, *OF_A_MACHINE)
    with Started(tmp_path / "said", torchrun, *words) as started:
        assert started.finish().returncode == 0, started.said()
    heard = json.loads((tmp_path / "heard.json").read_text())
    for word, key in SHAPING.items():
        assert heard[word].startswith(f"ranks disagree on {key}"), heard[word]
    assert not any(heard[word] for word in OF_A_MACHINE), heard
    assert heard["same data"] == "" and "ranks disagree on the data" in heard["other data"]


def lines_at_the_end(tmp_path, act, *words):
    """What the program says on standard error of a run of two ranks that is refused or stops."""
    with Started(tmp_path / "said", torchrun, 2, act, *words) as started:
        done = started.finish()
    assert done.returncode != 0 and 'switchlora/train.py", line' not in done.stderr, done.stderr
    return [x for x in done.stderr.splitlines() if x.startswith("switchlora") and ":" in x]


def test_ranks_with_other_settings_end_with_one_line_before_anything_is_written(tmp_path):
    words = (*SHORT, f"hydra.run.dir={tmp_path / 'run'}")
    (line,) = lines_at_the_end(tmp_path, program_with_own_words, "data.batch_size=8", *words)
    assert "ranks disagree on data.batch_size, 32 on rank 0 and 8 on rank 1" in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_weight_that_changes_on_one_rank_ends_the_run_at_the_end_of_the_epoch(tmp_path):
    folder = tmp_path / "run"
    words = (*SHORT, "switch/criterion=never", "checkpoint.every_minutes=null")
    words += ("model.depth=2", "model.embed_dim=64", f"hydra.run.dir={folder}")
    (line,) = lines_at_the_end(tmp_path, program_with_a_changed_weight, "25", *words)
    assert "ranks hold different weights at update 40: blocks.1.mlp.fc1.weight" in line
    assert "update-00000020; go on with: torchrun" in line
    assert [path.name for path in find_all(folder)] == ["update-00000020"]


def test_ranks_that_disagree_inside_a_switch_end_the_run_and_train_no_further(tmp_path):
    folder = tmp_path / "run"
    words = (*SHORT, *PLATEAU, "full.accumulation=1", f"hydra.run.dir={folder}")
    (line,) = lines_at_the_end(tmp_path, program_with_other_factors, *words)
    assert "ranks hold different tensors" in line and "update-00000010" in line
    assert len(losses(folder)) == 10 and not list(read_events(folder, "switch_failed"))


def test_a_rank_killed_at_the_switch_ends_the_run_and_one_process_goes_on(alone, tmp_path):
    folder = tmp_path / "run"
    options = (*SHORT, *PLATEAU, f"hydra.run.dir={folder}")
    launch = partial(torchrun, looks_every=5)  # the other rank has the time to say what it sees
    with Started(tmp_path / "said", launch, 2, program, *options) as started:
        while not checkpoint_at(folder, "update-00000010").exists():
            assert started.running, started.said()
            time.sleep(0.001)
        _, victim = children(started.process.pid)
        os.kill(victim, signal.SIGKILL)
        killed = started.finish()
    said = killed.stdout + killed.stderr
    assert killed.returncode != 0
    assert "switchlora: another process of this run is gone" in said, said
    assert "go on with: torchrun" in said and 'switchlora/train.py", line' not in said, said
    assert find_all(folder)
    again = (2, program, *options, "resume=auto", "seed=1")
    with Started(tmp_path / "refused", torchrun, *again) as started:
        refused = started.finish()
    lines = [x for x in refused.stderr.splitlines() if x.startswith("switchlora") and ":" in x]
    assert len(lines) == 1 and "another configuration (seed: 0 there, 1 here)" in lines[0], lines
    assert 'switchlora/train.py", line' not in refused.stderr
    make_run(folder, *PLATEAU, "resume=auto")
    assert_like(alone, folder)
