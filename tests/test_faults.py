"""What breaks around a run: one line, a non-zero exit status, and a checkpoint that is valid."""

import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time

import pytest

from runs import BY_DATE, SHORT, make_run
from starts import Started, program
from switchlora.errors import LoaderDied, TrainingStopped
from switchlora.learner import Learner
from switchlora.storage import find_all, read, read_events


def with_small_files(size, *words):
    """The program where no file may be larger than ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    program(*words)


def test_a_full_disk_stops_the_run_with_one_line_and_a_valid_checkpoint(tmp_path):
    """The system's limit on the size of a file stands for the disk: the switch needs less."""
    folder, options = tmp_path / "run", (*BY_DATE, "checkpoint.every_updates=4")
    options += ("max_updates=8", "checkpoint.keep=9")
    make_run(folder, *options)
    (folder / "summary.json").unlink()
    for later in find_all(folder)[:-1]:
        shutil.rmtree(later)
    size = max(p.stat().st_size for p in find_all(folder)[0].iterdir())
    words = (*SHORT, *options, f"hydra.run.dir={folder}", "resume=auto")
    with Started(tmp_path / "said", with_small_files, size // 2, *words) as started:
        done = started.finish()
    assert done.returncode == 1
    (line,) = [x for x in done.stderr.splitlines() if x]
    assert re.match("switchlora: no checkpoint could be written to .*: .*too large", line), line
    assert read(find_all(folder)[0])["train"]["num_updates"] == 4
    assert not list((folder / "checkpoints").glob(".writing*"))


def test_a_run_folder_that_is_gone_is_told(tmp_path, at_update):
    folder = tmp_path / "run"

    def remove(images):
        shutil.rmtree(folder)
        return images

    at_update(6, remove)
    with pytest.raises(OSError, match=f"the run folder {folder} is gone: nothing can be saved"):
        make_run(folder, "checkpoint.every_updates=3")


def test_code_of_the_users_that_leaves_the_program_is_no_success_and_loses_nothing(
    tmp_path, at_update
):
    at_update(6, lambda images: sys.exit(0))
    with pytest.raises(TrainingStopped, match=r"exit\(0\) after update 5; .*resume=auto"):
        make_run(tmp_path, "checkpoint.every_updates=3")
    assert read(find_all(tmp_path)[0])["train"]["num_updates"] == 3
    assert "exit(0)" in json.loads((tmp_path / "summary.json").read_text())["status"]


def test_a_loader_worker_that_dies_is_told_with_the_way_to_go_on(tmp_path, at_update):
    def kill_worker(images):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        return images

    at_update(12, kill_worker)
    options = (
        "data.train_transform={no_aug: true}",
        "data.eval_transform={}",
        "system.workers=1",
        "checkpoint.every_updates=5",
    )
    with pytest.raises(LoaderDied, match="loads images died.*update-000000.*resume=auto"):
        make_run(tmp_path, *options)
    at_update(None, None)
    assert make_run(tmp_path, *options, "resume=auto")["num_updates"] == 60


def test_a_signal_to_all_processes_saves_although_it_meets_loader_workers(tmp_path):
    folder = tmp_path / "run"
    options = (
        "data.train_transform={no_aug: true}",
        "data.eval_transform={}",
        "system.workers=2",
        "full.optimizer.lr=1e-4",
        "epochs=30",
    )
    words = (*SHORT, *options, f"hydra.run.dir={folder}")
    with Started(tmp_path / "said", program, *words) as started:
        while not (folder / "metrics.jsonl").exists() or not list(read_events(folder, "train")):
            assert started.running, started.said()
            time.sleep(0.05)
        os.killpg(started.process.pid, signal.SIGTERM)
        done = started.finish()
    assert done.returncode == 128 + signal.SIGTERM
    said = done.stderr
    assert re.search(r"switchlora: interrupted by SIGTERM after update \d+; the last", said), said
    number = int(re.search(r"after update (\d+)", said)[1])
    assert read(find_all(folder)[0])["train"]["num_updates"] == number


def test_bad_losses_stop_the_run_and_name_the_last_good_checkpoint(tmp_path, monkeypatch):
    update = Learner.update

    def spoiled(self, images, targets, loss_fn, num_updates):
        images = images * math.nan if num_updates >= 12 else images
        return update(self, images, targets, loss_fn, num_updates)

    monkeypatch.setattr(Learner, "update", spoiled)
    with pytest.raises(TrainingStopped, match="not finite.*last checkpoint is .*update-00000010"):
        make_run(tmp_path, "checkpoint.every_updates=5")
    weights = read(find_all(tmp_path)[0])["weights"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_an_fp16_overflow_lowers_the_scale_and_does_not_stop_the_run(tmp_path, monkeypatch):
    update, scales = Learner.update, []

    def scaled(self, images, targets, loss_fn, num_updates):
        if self.scaler.get_scale() == 2.0**16 and not scales:
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": 2.0**40})
        found = update(self, images, targets, loss_fn, num_updates)
        scales.append((self.scaler.get_scale(), found.applied, found.overflow))
        return found

    monkeypatch.setattr(Learner, "update", scaled)
    options = (*BY_DATE, "full.precision=fp16", "max_skipped=3", "max_updates=12")
    options += ("model.depth=1", "model.embed_dim=16", "model.num_heads=1", "switch/rank=fixed")
    options += ("switch.rank.rank=1", "switch.criterion.epoch=0.5")
    summary = make_run(tmp_path, *options)
    skipped = [overflow for _, applied, overflow in scales if not applied]
    assert len(skipped) == summary["skipped_updates"] > 3 and all(skipped)
    assert summary["num_updates"] == 12 and summary["switch"]["fired"]
    kept = [scale for scale, *_ in scales]
    assert kept[-1] == min(kept) < 2.0**40
