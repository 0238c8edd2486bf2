"""Checkpoints written in a thread, and frozen weights that are on the disk once."""

import hashlib
import shutil
import threading

import pytest
import torch

from runs import make_run
from switchlora.errors import CheckpointUnusable
from switchlora.storage import STATE, SUMS, checkpoint, find_all, frozen
from switchlora.storage.background import Background, staged

ADAPTER = (
    *("+method=lora", "switch/rank=fixed", "switch.rank.rank=1", "model.embed_dim=256"),
    *("max_updates=4", "checkpoint.every_updates=2", "checkpoint.keep=9", "seed=1"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose adapter trains from the first update, with a checkpoint every other update."""
    place = tmp_path_factory.mktemp("adapter")
    make_run(place, *ADAPTER)
    return place


def frozen_of(path):
    (file,) = path.glob("frozen-*.pt")
    return file


def in_adapter_phase(folder):
    return sorted(path for path in find_all(folder) if list(path.glob("frozen-*.pt")))


def test_a_second_checkpoint_of_an_adapter_writes_under_15_percent_of_the_first(folder):
    first, second, *_ = in_adapter_phase(folder)
    assert frozen_of(first).samefile(frozen_of(second))
    written = sum(f.stat().st_size for f in second.iterdir() if f.stat().st_nlink == 1)
    assert written < 0.15 * sum(f.stat().st_size for f in first.iterdir())


def test_every_checkpoint_is_whole_by_itself_and_has_the_checksums_of_its_files(folder, tmp_path):
    *_, last = in_adapter_phase(folder)
    copy = shutil.copytree(last, tmp_path / last.name)
    for line in (copy / SUMS).read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((copy / name).read_bytes()).hexdigest() == digest
    weights = checkpoint.read(copy)["weights"]
    assert set(weights) >= set(checkpoint.read(last)["shapes"])


def test_a_checkpoint_in_one_file_still_loads(folder, tmp_path):
    *_, last = in_adapter_phase(folder)
    whole = checkpoint.read(last)
    (tmp_path / "old").mkdir()
    torch.save({**whole, "format": 7}, tmp_path / "old" / STATE)
    digest = hashlib.sha256((tmp_path / "old" / STATE).read_bytes()).hexdigest()
    (tmp_path / "old" / SUMS).write_text(f"{digest}  {STATE}\n")
    old = checkpoint.load_model(tmp_path / "old").state_dict()
    new = checkpoint.load_model(last).state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in new)


@pytest.mark.parametrize("harm", ["gone", "other", "elsewhere"])
def test_frozen_weights_that_are_not_as_written_make_a_checkpoint_unusable(folder, tmp_path, harm):
    *_, last = in_adapter_phase(folder)
    copy = shutil.copytree(last, tmp_path / last.name)
    file = frozen_of(copy)
    if harm == "gone":
        file.unlink()
    elif harm == "other":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    else:
        state = torch.load(copy / STATE, weights_only=True)
        torch.save({**state, "frozen": f"../{last.name}/{file.name}"}, copy / STATE)
        digest = hashlib.sha256((copy / STATE).read_bytes()).hexdigest()
        rest = [x for x in (copy / SUMS).read_text().splitlines() if not x.endswith(STATE)]
        (copy / SUMS).write_text("\n".join([*rest, f"{digest}  {STATE}"]) + "\n")
    with pytest.raises(CheckpointUnusable, match=r"not whole|damaged|no name of a file"):
        checkpoint.read(copy)


def test_weights_that_changed_get_a_file_of_their_own(tmp_path):
    weights = {"a": torch.ones(9), "b": torch.zeros(9)}
    names = []
    for number in range(3):
        place = tmp_path / str(number)
        place.mkdir()
        name, digest = frozen.write(weights, place, [tmp_path / str(n) for n in range(number)])
        (place / SUMS).write_text(f"{digest}  {name}\n")
        names.append(name)
        if number == 1:
            weights["b"] = weights["b"] + 1
    assert names[0] == names[1] != names[2]
    assert (tmp_path / "0" / names[0]).samefile(tmp_path / "1" / names[1])


def test_without_links_frozen_weights_are_written_again(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("Operation not supported")

    monkeypatch.setattr(frozen.os, "link", no_links)
    for number in range(2):
        place = tmp_path / str(number)
        place.mkdir()
        name, digest = frozen.write({"a": torch.ones(9)}, place, [tmp_path / "0"])
        (place / SUMS).write_text(f"{digest}  {name}\n")
        assert hashlib.sha256((place / name).read_bytes()).hexdigest() == digest


def test_a_thread_does_one_thing_at_a_time_and_its_error_comes_out_at_the_next():
    background, ended, order = Background(), threading.Event(), []
    background.start(lambda: (ended.wait(20), order.append("first")))
    order.append("training goes on")
    ended.set()

    def fail():
        order.append("second")
        raise OSError("No space left on device")

    background.start(fail)
    with pytest.raises(OSError, match="No space left"):
        background.start(lambda: order.append("never"))
    background.wait()
    assert order == ["training goes on", "first", "second"]


def test_what_is_staged_stays_as_it_was():
    weight = torch.nn.Parameter(torch.ones(3))
    content = {"weights": {"w": weight}, "plain": [1, "two", None]}
    copy = staged(content)
    with torch.no_grad():
        weight.add_(1)
    assert copy["weights"]["w"].tolist() == [1.0] * 3 and copy["plain"] == [1, "two", None]
