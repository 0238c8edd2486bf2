"""Versions of models: whole or not there, whoever else writes, and whenever a writer dies."""

import json
import os
import re
import shutil
import signal
import sys

import pytest

from switchlora import registry as room
from switchlora.registry import VersionDamaged, aliases, check, entries, versions, writing
from switchlora.storage import FileDamaged, NoLocks

STEPS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.symlink", "shutil.rmtree"}
"""audit events of what changes or reads a disk"""


def fill(folder):
    """Two files, one of them in a folder."""
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"factors")


def publish(registry, **more):
    return room.publish(registry, fill, {"run": "runs/mine"}, room.CANDIDATE, **more)


@pytest.fixture
def registry(tmp_path):
    """Three versions, of which the first two have been in production."""
    folder = tmp_path / "registry"
    for _ in range(3):
        publish(folder)
    room.promote(folder, "v0001")
    room.promote(folder, "v0002")
    return folder


def state(registry):
    """What a reader sees, but for times and names."""
    log = entries(registry) if registry.is_dir() else []
    told = [(entry.what, entry.version, entry.why) for entry in log]
    return (versions(registry) if registry.is_dir() else []), aliases(log), told


def linked(registry):
    return {alias: os.readlink(registry / alias) for alias in aliases(entries(registry))}


def test_versions_are_numbered_and_have_names(registry):
    assert versions(registry) == ["v0001", "v0002", "v0003"]
    assert linked(registry) == {"candidate": "v0003", "production": "v0002"}
    assert (registry / "production/model.safetensors").read_bytes() == b"weights"
    assert room.resolve(registry, "production") == room.resolve(registry, "v0002") == "v0002"
    with pytest.raises(ValueError, match=r"^no v0009 in .*; near names: .*v0001"):
        room.resolve(registry, "v0009")


def test_a_registry_is_found_by_a_string_too(registry):
    word = str(registry)
    assert versions(word) == versions(registry) and entries(word) == entries(registry)
    assert room.resolve(word, "candidate") == "v0003" and room.promote(word, "v0003")
    assert room.rollback(word) == "v0002" and room.is_version(f"{word}/v0001")


def test_the_log_has_who_when_what_and_why(registry):
    room.rollback(registry, why="it was slow")
    last = entries(registry)[-1]
    assert (last.what, last.version, last.why) == ("rollback", "v0001", "it was slow")
    assert "@" in last.who and last.when.endswith("+00:00")
    times = [
        json.loads(line)["when"] for line in (registry / "log.jsonl").read_text().splitlines()
    ]
    assert times == sorted(times) and len(times) == 6


def test_rollbacks_go_back_through_all_that_was_in_production(registry):
    room.promote(registry, "v0003")
    assert room.rollback(registry) == "v0002"
    assert room.rollback(registry) == "v0001"
    with pytest.raises(ValueError, match=r"nothing to go back to: v0001 is the first"):
        room.rollback(registry)
    room.promote(registry, "v0003")
    assert room.rollback(registry) == "v0001"


def test_what_is_in_production_is_not_promoted_again(registry):
    assert not room.promote(registry, "v0002")
    assert room.rollback(registry) == "v0001"


def test_a_number_is_never_given_twice(registry):
    shutil.rmtree(registry / "v0003")
    assert publish(registry) == "v0004"
    with pytest.raises(ValueError, match="v0003 is gone"):
        room.promote(registry, "v0003")


def flip(registry):
    content = bytearray((registry / "v0002/adapter/adapter_model.safetensors").read_bytes())
    content[3] ^= 1
    (registry / "v0002/adapter/adapter_model.safetensors").write_bytes(content)


def write(name, content):
    return lambda registry: (registry / "v0002" / name).write_bytes(content)


def remove(registry):
    (registry / "v0002/model.safetensors").unlink()


def relink(registry):
    (registry / "v0002/model.safetensors").unlink()
    (registry / "v0002/model.safetensors").symlink_to("../v0001/model.safetensors")


DAMAGES = {
    "adapter/adapter_model.safetensors does not match its checksum": flip,
    "model.safetensors is missing": remove,
    "model.safetensors is no plain file": relink,
    "more.bin was not published with it": write("more.bin", b""),
    "adapter/.hidden was not published with it": write("adapter/.hidden", b""),
    "version.json does not match its checksum": write("version.json", b"{"),
    ".*checksums.json is damaged: line 1 is no JSON": write("checksums.json", b"{,"),
    ".*checksums.json is damaged: line 1 holds no JSON object": write("checksums.json", b"[]"),
    "adapter/adapter_model.safetensors was not published": write("checksums.json", b"{}"),
    "checksums.json is missing": lambda registry: (registry / "v0002/checksums.json").unlink(),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_version_is_named_and_not_put_into_production(registry, said):
    room.rollback(registry)
    DAMAGES[said](registry)
    with pytest.raises(VersionDamaged, match=f"v0002 is damaged: {said}"):
        room.promote(registry, "v0002")
    assert check(registry / "v0001") == 3
    assert aliases(entries(registry))["production"] == "v0001"


def test_a_rollback_to_a_damaged_version_is_refused(registry):
    (registry / "v0001/model.safetensors").write_bytes(b"weight5")
    with pytest.raises(VersionDamaged, match="v0001 is damaged: model.safetensors does not match"):
        room.rollback(registry)
    assert aliases(entries(registry))["production"] == "v0002"


def test_a_damaged_log_is_named_by_its_line(registry):
    lines = (registry / "log.jsonl").read_text().splitlines()
    for damaged in ("{", "[]", "{}", lines[1].replace("v0002", "../x")):
        (registry / "log.jsonl").write_text("\n".join([lines[0], damaged, *lines[2:]]))
        with pytest.raises(FileDamaged, match=r"line 2"):
            entries(registry)


def test_publications_come_back_when_the_log_is_lost(registry):
    (registry / "log.jsonl").unlink()
    assert [entry.version for entry in entries(registry)] == ["v0001", "v0002", "v0003"]
    assert publish(registry) == "v0004"


def test_nothing_else_becomes_a_registry(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").touch()
    with pytest.raises(ValueError, match=r"photos is no registry, and holds 1.png"):
        publish(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"1.png is no folder"):
        publish(tmp_path / "photos/1.png")
    with pytest.raises(ValueError, match=r"photos is no registry: switchlora-runs publish"):
        room.promote(tmp_path / "photos", "v0001")
    assert os.listdir(tmp_path / "photos") == ["1.png"]


def test_what_could_not_be_filled_leaves_nothing(registry):
    before = state(registry)

    def fail(folder):
        fill(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        room.publish(registry, fail, {}, room.CANDIDATE)
    assert state(registry) == before and not list(registry.glob(".publishing-*"))


class Killed(BaseException):
    """From the step on at which it is raised, nothing reaches the disk any more."""


class Disk:
    """Counts accesses to the disk. Before a given one it vanishes, or the process dies."""

    def __init__(self):
        self.count, self.last, self.really = 0, None, False
        sys.addaudithook(self.see)

    def see(self, event, _):
        if self.last is None or event not in STEPS:
            return
        self.count += 1
        if self.count >= self.last and self.really:
            self.last = None
            os.kill(os.getpid(), signal.SIGKILL)
        if self.last is not None and self.count >= self.last:
            raise Killed

    def dies(self, change, last, really=False):
        """Whether a change dies before its access number ``last``."""
        self.count, self.last, self.really = 0, last, really
        try:
            change()
        except Killed:
            return True
        finally:
            self.last = None
        return False


@pytest.fixture(scope="module")
def disk():
    return Disk()


def forked(action):
    """Start ``action`` in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    failed = 1
    try:
        action()
        failed = 0
    finally:
        os._exit(failed)


def ended(pid):
    """Whether a process was killed; it must not fail."""
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


CHANGES = {
    "publish": publish,
    "promote": lambda registry: room.promote(registry, "v0003"),
    "rollback": room.rollback,
}


@pytest.mark.parametrize("name", CHANGES)
def test_killed_at_any_step_a_registry_is_as_before_or_after(registry, tmp_path, disk, name):
    change = CHANGES[name]
    done = tmp_path / "done"
    shutil.copytree(registry, done, symlinks=True)
    before = state(registry)
    change(done)
    after, seen = state(done), []
    for step in range(1, 1000):
        here = tmp_path / str(step)
        shutil.copytree(registry, here, symlinks=True)
        killed = disk.dies(lambda here=here: change(here), step)
        seen.append(state(here))
        assert seen[-1] in (before, after), step
        assert all(check(here / version) == 3 for version in versions(here)), step
        with writing.writing(here):  # as the next writer
            pass
        assert state(here) == seen[-1], step
        assert linked(here) == aliases(entries(here)), step
        assert not list(here.glob(".publishing-*")), step
        if not killed:
            break
    assert seen[0] == before and seen[-1] == after and step > 10
    turn = seen.index(after)
    assert seen == [before] * turn + [after] * (len(seen) - turn)


@pytest.mark.parametrize("name", CHANGES)
def test_a_real_kill_leaves_what_a_disk_that_is_gone_leaves(registry, tmp_path, disk, name):
    step = 14
    other = tmp_path / "other"
    shutil.copytree(registry, other, symlinks=True)
    assert disk.dies(lambda: CHANGES[name](registry), step)
    assert ended(forked(lambda: disk.dies(lambda: CHANGES[name](other), step, really=True)))
    assert files_of(registry) == files_of(other)


def files_of(registry):
    """Names of all files, without the process ids in them."""
    names = [str(path.relative_to(registry)) for path in registry.rglob("*")]
    return sorted(re.sub(r"(\.publishing-)\d+", r"\1", name) for name in names)


def test_two_writers_at_the_same_time_lose_nothing(tmp_path):
    registry = tmp_path / "registry"

    def write_five():
        for number in range(5):
            version = publish(registry, why=f"{os.getpid()} {number}")
            room.promote(registry, version)

    for pid in [forked(write_five), forked(write_five)]:
        assert not ended(pid)
    published = [entry for entry in entries(registry) if entry.what == "publish"]
    assert [entry.version for entry in published] == versions(registry)
    assert len({entry.why for entry in published}) == len(published) == 10
    assert len(entries(registry)) == 20
    assert [check(registry / version) for version in versions(registry)] == [3] * 10


def test_a_name_that_another_writer_took_is_left_to_it(registry, monkeypatch):
    """On a file system without locks."""

    def no_locks(folder):
        raise NoLocks(f"the file system of {folder} has no locks")

    monkeypatch.setattr(writing, "locked", no_locks)
    monkeypatch.setattr(writing, "versions", lambda registry: ["v0001"])
    monkeypatch.setattr(writing, "logged", lambda registry: [])
    begun = registry / ".publishing-77"
    begun.mkdir()
    assert publish(registry) == "v0004"
    assert begun.is_dir(), "another writer's"


def test_a_writer_that_never_ends_is_told(registry, monkeypatch):
    monkeypatch.setattr(writing, "PATIENCE", 0.2)
    with (
        writing.writing(registry),
        pytest.raises(ValueError, match=r"another process has been writing to .* for 0.2 s"),
    ):
        publish(registry)
