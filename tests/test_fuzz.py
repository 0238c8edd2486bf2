"""What is in a configuration, a record, a checkpoint or a file of weights works, or is told.

What is told is one line. ``SWITCHLORA_FUZZ=2000 pytest tests/test_fuzz.py`` tries as many inputs
in each test.
"""

import copy
import json
import os
import shutil
from functools import reduce
from operator import getitem

import pytest
import torch
import yaml
from hydra.utils import instantiate
from hypothesis import HealthCheck, Phase, given, note, settings, strategies as st
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from conf_yamls import composed
from conftest import tiny_vit
from runs import DIGITS
from switchlora.analysis.curves import read_curves
from switchlora.analysis.page.page import content
from switchlora.analysis.replay.replay import replay
from switchlora.analysis.scaling import attempt as point
from switchlora.analysis.tables.formats import markdown
from switchlora.analysis.tables.table import make_table
from switchlora.analysis.wandb_report import build_report
from switchlora.config import as_plain
from switchlora.errors import CheckpointUnusable
from switchlora.models import create_model, load_weights
from switchlora.process import USER_ERRORS, check_values, one_line
from switchlora.run import prepare
from switchlora.storage import (
    STATE,
    SUMS,
    FileDamaged,
    Record,
    events,
    find_all,
    find_records,
    load_adapter,
    load_model,
    load_saved,
    read,
    save_merged,
)
from switchlora.storage.files import sha256_of
from switchlora.train import train

LONG = int(os.environ.get("SWITCHLORA_FUZZ", "0"))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def fuzzed(short):
    """The same examples each time; ``short`` is their number in a run of all tests."""
    return settings(
        max_examples=LONG or short,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=SLOW,
    )


pytestmark = pytest.mark.timeout(0 if LONG else 300)

NUMBERS = [float("nan"), float("inf"), -float("inf"), -1, 0, 1, 7, 0.5, 1e-320, 1e300, 2**70]
WORDS = ["", " ", "x", "nan", "1", "../x", "é\n", "(", "${x}", "???"]
NESTED = [[], [1], ["("], [None], [[1]], {}, {"a": 1}, {"_target_": 3}]
CRITERION = [{"_target_": "switchlora.criteria.UpdateNorm", "fraction": "x"}]
ODD = [*NUMBERS, True, None, *WORDS, *NESTED, CRITERION]
TENSORS = [torch.zeros(0), torch.zeros(3), torch.full((2, 2), torch.nan), torch.tensor(1)]
TINY = (
    *(*DIGITS, "model.depth=1", "model.embed_dim=16", "model.num_heads=1", "epochs=3"),
    *("switch/rank=fixed", "switch.rank.rank=1", "full.scheduler.warmup_t=2", "monitor.window=2"),
    *("switch/criterion=at_epoch", "switch.criterion.epoch=1.5", "checkpoint.every_updates=3"),
    *("log.progress=false", "data.train_size=160", "data.batch_size=80", "log.every=1"),
    *("checkpoint.keep=99", "log.cost_model=false"),
)
"""a run of six updates that switches after the fourth"""


@pytest.fixture(scope="module", autouse=True)
def apart():
    """Nothing that a test of this file sets outlives it, and no test asks for a network."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder for all examples of a test."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, with a checkpoint before its switch and one after."""
    folder = tmp_path_factory.mktemp("run")
    train(composed(*TINY), folder)
    return folder


# What is drawn


@st.composite
def paths(draw, whole):
    """The way to something inside of nested mappings and lists."""
    path = []
    inside = whole
    while isinstance(inside, dict | list) and inside:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        path.append(draw(st.sampled_from(keys)))
        inside = inside[path[-1]]
        if draw(st.integers(0, 4)) == 0:
            break
    return path


@st.composite
def altered(draw, whole, values=ODD):
    """A copy in which something, at one or two places, is another value or is missing."""
    changed = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 2))):
        *above, last = draw(paths(changed))
        section = reduce(getitem, above, changed)
        value = draw(st.sampled_from([..., *values]))
        note(f"{above} {last}: {value}")
        if value is ...:
            del section[last]
        else:
            section[last] = copy.deepcopy(value)
        if not changed:
            break
    return changed


@st.composite
def spoiled(draw, content):
    """Bytes cut, flipped, filled, moved or with others between them."""
    place = draw(st.integers(0, len(content) - 1))
    before, after = content[:place], content[place + 1 :]
    kind = draw(st.sampled_from(("cut", "flip", "line", "fill", "insert", "lose", "double")))
    if kind == "cut":
        return before
    if kind == "flip":
        return before + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + after
    if kind == "line":
        return before + b"\n" + after
    if kind == "fill":
        return before + bytes(len(content) - place)
    if kind == "insert":
        return before + draw(st.binary(min_size=1, max_size=3)) + content[place:]
    end = draw(st.integers(place, min(len(content), place + 200)))
    if kind == "lose":
        return before + content[end:]
    return content[:end] + content[place:]


def outcome(act):
    """None, or the one line of the error that a user would see."""
    try:
        act()
    except USER_ERRORS as error:
        line = one_line(error)
        assert line and "\n" not in line
        return line
    return None


# Configurations


STARTS = [
    (),
    ("switch/guard=full", "switch/stages=by_margin", "recipe@full=sgd"),
    ("switch/criterion=all_of", "switch/rank=prelora", "switch/restart=update_svd"),
    ("switch/criterion=cuttlefish", "switch/rank=cuttlefish", "adapter/refactoring=reflora"),
    ("switch/criterion=prelora", "switch/rank=energy", "switch/scaling=alpha_over_rank"),
    ("switch/criterion=oialr", "switch/adapter=guided", "recipe@full=lion", "monitor.bases=true"),
]


def check_and_build(config):
    """All that can be built without data."""
    check_values(config)
    instantiate(config["switch"], _convert_="all")
    for phase in ("full", "adapter"):
        recipe = instantiate(config[phase], _convert_="all")
        optimizer = recipe.optimizer([{"params": [nn.Parameter(torch.zeros(1))]}])
        recipe.scheduler(optimizer, t_initial=10)


@fuzzed(100)
@given(st.data(), st.sampled_from(STARTS))
def test_any_value_at_any_place_is_built_or_gets_one_line(data, start):
    changed = data.draw(altered(as_plain(composed(*start))))
    outcome(lambda: check_and_build(changed))


@fuzzed(20)
@given(st.data())
def test_a_run_of_any_configuration_is_prepared_or_gets_one_line(here, data):
    changed = data.draw(altered(as_plain(composed(*TINY))))
    folder = here / "prepared"
    shutil.rmtree(folder, ignore_errors=True)

    def begun():
        with prepare(OmegaConf.create(changed), folder).log:
            pass

    outcome(begun)


# Records


FILES = ("metrics.jsonl", "summary.json", "config.yaml")
COMMANDS = {
    "page": None,
    "tables": lambda record: markdown(make_table([record])),
    "history": Record.history,
    "curves": lambda record: read_curves([record]),
    "replay": lambda record: replay([record], []),
    "scaling": point,
    "report": lambda record: build_report([record], "", ""),
}


def copied(run, folder):
    """The records of a run in a folder of their own, without all that it saved."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(run / name, folder)
    return folder


def check_command(command, folder):
    """A command works with the run, or one line says why the run is left out."""
    said = []
    try:
        (record,) = find_records([folder], said.append, COMMANDS[command])
    except ValueError as error:
        assert str(error) == "every run was left out"
        (line,) = said
        assert "\n" not in line and str(folder) in line
        return
    if command == "page":
        outcome(lambda: content(folder))
    else:
        outcome(lambda: COMMANDS[command](record))


@fuzzed(25)
@given(st.data(), st.sampled_from(FILES), st.sampled_from(list(COMMANDS)))
def test_records_of_any_bytes_give_a_run_or_one_line(run, here, data, name, command):
    folder = copied(run, here / "bytes")
    (folder / name).write_bytes(data.draw(spoiled((run / name).read_bytes())))
    check_command(command, folder)


@fuzzed(25)
@given(st.data(), st.sampled_from(FILES), st.sampled_from(list(COMMANDS)))
def test_records_of_any_content_give_a_run_or_one_line(run, here, data, name, command):
    folder = copied(run, here / "content")
    text = (run / name).read_text()
    if name == "metrics.jsonl":
        lines = [json.loads(line) for line in text.splitlines()]
        changed = data.draw(altered(lines))
        text = "".join(json.dumps(line) + "\n" for line in changed)
    elif name == "summary.json":
        text = json.dumps(data.draw(altered(json.loads(text))))
    else:
        text = yaml.safe_dump(data.draw(altered(yaml.safe_load(text))))
    (folder / name).write_text(text)
    check_command(command, folder)


@fuzzed(50)
@given(st.data())
def test_a_log_of_any_bytes_is_mended_at_the_same_length(run, here, data):
    log = b"".join((run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:4])
    content = data.draw(spoiled(log))
    try:
        whole, reasons = events.mended(content, here / "metrics.jsonl")
    except FileDamaged as error:
        assert len(content) < len(events.LOST) and "remove the file" in str(error)
        return
    assert len(whole) == len(content)
    assert (whole == content) == (not reasons)
    (here / "metrics.jsonl").write_bytes(whole)
    list(events.read_events(here))


# Checkpoints


def sealed(path, content):
    """A checkpoint with this content of its state's file, and right checksums."""
    (path / STATE).write_bytes(content)
    (path / SUMS).write_text(f"{sha256_of(path / STATE)}  {STATE}\n")


def interrupted(run, folder):
    """The run in another folder, without its end."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()
    return folder


@fuzzed(25)
@given(st.data(), st.booleans())
def test_a_checkpoint_of_any_bytes_is_told_in_one_line(run, here, data, right):
    path = here / "bytes" / "update-00000006"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(find_all(run)[0], path)
    content = data.draw(spoiled((path / STATE).read_bytes()))
    if right:
        sealed(path, content)
    else:
        (path / STATE).write_bytes(content)
    for act in (read, load_model):
        try:
            act(path)
        except CheckpointUnusable as error:
            assert "\n" not in str(error) and str(path) in str(error)


@fuzzed(10)
@given(st.data())
def test_a_run_goes_on_from_any_content_of_its_checkpoint_or_from_the_one_before(run, here, data):
    """Or one line says that it does not."""
    folder = interrupted(run, here / "goes on")
    (newest,) = (path for path in find_all(folder) if path.name == "update-00000004.1")
    for path in find_all(folder):
        if path.name > newest.name:
            shutil.rmtree(path)
    state = torch.load(newest / STATE, weights_only=True)
    changed = data.draw(altered(state, [*ODD, *TENSORS]))
    torch.save(changed, newest / STATE)
    sealed(newest, (newest / STATE).read_bytes())
    outcome(lambda: load_model(newest))
    line = outcome(lambda: train(composed(*TINY, "resume=auto"), folder))
    assert line is not None or (folder / "summary.json").exists()


# Files of weights


SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 1, "patch_size": 8}
WAYS = {
    "safetensors": save_file,
    "zip": torch.save,
    "old": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}


@fuzzed(30)
@given(st.data(), st.sampled_from(list(WAYS)))
def test_weights_of_any_bytes_are_loaded_or_told_in_one_line(here, data, way):
    path = here / f"weights.{way}"
    WAYS[way](tiny_vit().state_dict(), path)
    path.write_bytes(data.draw(spoiled(path.read_bytes())))
    line = outcome(lambda: load_weights(tiny_vit(), str(path)))
    assert line is None or line.startswith(f"init_checkpoint={path}")


@fuzzed(30)
@given(st.data())
def test_descriptions_of_timm_of_any_content_give_a_model_or_one_line(here, data):
    folder = here / "hub"
    folder.mkdir(exist_ok=True)
    model = create_model("vit_tiny_patch16_224", **SMALL, num_classes=3, img_size=16)
    save_merged(model, folder / "model.safetensors")
    known = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    content = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": SMALL}
    content |= {
        "pretrained_cfg": known | {"fixed_input_size": True},
        "label_names": ["a", "b", "c"],
    }
    (folder / "config.json").write_text(json.dumps(data.draw(altered(content, ODD)), default=str))
    outcome(lambda: load_saved(folder))


@fuzzed(30)
@given(st.data())
def test_adapters_of_any_content_are_put_on_or_told_in_one_line(here, data):
    folder = here / "adapter"
    folder.mkdir(exist_ok=True)
    rows, columns = tiny_vit().blocks[0].mlp.fc1.weight.shape
    shapes = {"A": (2, columns), "B": (rows, 2)}
    name = "base_model.model.blocks.0.mlp.fc1.lora_{}.weight"
    factors = {name.format(side): torch.ones(shape) for side, shape in shapes.items()}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "lora_dropout": 0.0}
    settings |= {"alpha_pattern": {"fc1": 4}, "use_rslora": False, "init_lora_weights": True}
    if data.draw(st.booleans()):
        settings = data.draw(altered(settings, ODD))
    else:
        factors = data.draw(altered(factors, [*ODD, *TENSORS]))
    (folder / "adapter_config.json").write_text(json.dumps(settings, default=str))
    torch.save(factors, folder / "adapter_model.bin")
    line = outcome(lambda: load_adapter(tiny_vit(), folder))
    assert line is None or line.startswith(str(folder))


@fuzzed(30)
@given(st.data())
def test_weights_of_any_content_are_loaded_or_told_in_one_line(here, data):
    path = here / "content.pth"
    whole = {"epoch": 3, "state_dict": dict(tiny_vit().state_dict()), "args": [1]}
    torch.save(data.draw(altered(whole, [*ODD, *TENSORS])), path)
    line = outcome(lambda: load_weights(tiny_vit(), str(path)))
    assert line is None or line.startswith(f"init_checkpoint={path}")
