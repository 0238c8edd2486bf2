"""A card of a saved model: what it tells of good, bad and strange ones, and where it goes."""

import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from conf_yamls import composed
from runs import BY_DATE, ON_ANY_DATA, SHORT, make_run
from switchlora import commands
from switchlora.analysis.card import use
from switchlora.analysis.card.card import make_card, parse, write_card
from switchlora.analysis.evaluate import all_splits, opened, validation_loader
from switchlora.config import as_plain
from switchlora.data import Digits
from switchlora.storage import find_all, read_record
from switchlora.train import train
from test_hub import CLASSES, ON_FOLDERS, paint
from test_tables import NEVER, table_of, text_of, write_run

KEYS = {
    *("model", "source_sha256", "data", "images", "accuracy", "calibration", "robustness"),
    *("ood", "cost", "against", "verdict"),
}
QUIET = ("log.wandb.mode=disabled", "data.eval_size=null", "model.embed_dim=32", "epochs=2")
OWN = "class Linear(nn.Sequential):\n    def __init__(self, classes=10):\n"
FEW = ("--robustness", "0", "--no-cost", "--device", "cpu", "--allow", "own_linear.Linear")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that switched."""
    folder = tmp_path_factory.mktemp("card") / "run"
    make_run(folder, *BY_DATE, *QUIET, "switch/rank=fixed", "switch.rank.rank=2")
    return folder


def write_linear(folder, weight, bias):
    """A folder with a linear model on digits, as a run leaves it."""
    folder.mkdir()
    config = as_plain(composed(*SHORT, "data.eval_size=null", "full.precision=fp32"))
    config["model"] = {"_target_": "own_linear.Linear", "classes": len(bias)}
    config["data"]["num_classes"] = len(bias)
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 0}))
    save_file({"1.weight": weight.contiguous(), "1.bias": bias}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A folder with three good models of digits, 0 to 2, that saw other images each."""
    place = tmp_path_factory.mktemp("twins")
    told = "        super().__init__(nn.Flatten(), nn.Linear(64, classes))\n"
    (place / "own_linear.py").write_text(f"from torch import nn\n\n\n{OWN}{told}")
    data = Digits(train=True)
    images = (np.stack(data.images).reshape(-1, 64) / 255 - 0.3054) / 0.3760
    for seed in range(3):
        rows = np.random.default_rng(seed).choice(len(images), 1100, replace=False)
        found = LogisticRegression(C=0.02).fit(images[rows], data.targets[rows])
        numbers = (found.coef_, found.intercept_)
        write_linear(place / str(seed), *(torch.tensor(each).float() for each in numbers))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        yield place


def card_of(path, *words):
    return make_card(parse([*map(str, (path, *words)), *FEW]))


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["switchlora-runs", "card", *map(str, words)])
    commands.runs()


def test_the_command_writes_a_card_that_stands_by_itself(run, monkeypatch, capsys):
    """The test images as 'other data' are told apart by nothing at all: an AUROC of 0.5."""
    monkeypatch.setattr(use, "compiled_form", lambda *_: (None, "not measured: left to the user"))
    monkeypatch.setattr(use, "onnx_form", lambda *_: {"left_out": "not measured here"})
    monkeypatch.setattr(use, "REPEATS", 5)
    call(monkeypatch, run, "--robustness", 40, "--ood", "data=digits")
    printed = capsys.readouterr()
    card = json.loads((run / "card/card.json").read_text())
    assert set(card) >= KEYS and card["images"] == 360 and card["verdict"]["regression"] is None
    assert card["source_sha256"] == sha256(run / "model.safetensors")
    top1 = card["accuracy"]["top1"]
    assert top1["value"] == pytest.approx(read_record(run).result["test"]["top1"], abs=1e-6)
    assert top1["low"] < top1["value"] < top1["high"]
    assert len(card["robustness"]["corruptions"]) == 8 and card["robustness"]["images"] == 40
    assert card["ood"]["energy"]["value"] == pytest.approx(0.5, abs=1e-6)
    assert card["cost"]["unmerged"]["same"] and card["cost"]["bytes"]["adapter"] > 0
    assert {each["form"] for each in card["cost"]["latency"]} == {"merged", "unmerged adapter"}
    assert card["calibration"]["validation_images"] == 144
    page = (run / "card/card.html").read_text()
    assert page.count("<svg") == 2 + 8 and "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page) and "@import" not in page
    markdown = (run / "card/card.md").read_text()
    assert markdown in printed.out and "## Calibration" in markdown
    assert "robustness: noise, 1 of 8" in printed.err


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_onnx_runtime_computes_the_logits_of_the_model(twins):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = opened(twins / "0", allow=["own_linear.Linear"], device="cpu")
    inputs, _ = next(iter(found.loader))
    exported = use.onnx_form(found.saved.model, inputs)
    assert exported["same"] and exported["bytes"] > 1000


def test_without_onnx_the_card_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert use.onnx_form(None, None)["left_out"].endswith("install 'switchlora[onnx]'")


def test_every_saved_form_has_the_same_card(run):
    forms = {run / "model.safetensors": "model.safetensors"}
    forms[run / "adapter"] = "adapter/adapter_model.safetensors"
    checkpoint = find_all(run)[0]
    forms[checkpoint] = checkpoint.relative_to(run) / "state.pt"
    expected = read_record(run).result["test"]["top1"]
    for path, weights in forms.items():
        found = card_of(path)
        assert found["accuracy"]["top1"]["value"] == pytest.approx(expected, abs=1e-6)
        assert found["source_sha256"] == sha256(run / weights)


def test_the_temperature_is_fitted_on_the_images_that_the_run_validated_on(run):
    for words in ((), ("data.val_fraction=0.5",)):
        found = opened(run, words, device="cpu")
        loader = validation_loader(found, words)
        whole = all_splits(found.saved, found.saved.config["data"], ()).val
        for one, other in zip(loader, whole, strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_twins_show_no_regression_and_a_sabotaged_class_is_found_by_name(twins, tmp_path):
    others = ("--against", twins / "1", twins / "2")
    clean = card_of(twins / "0", *others)
    assert clean["verdict"]["regression"] is False
    assert clean["accuracy"]["top1"]["value"] > 90
    assert "no silent regression found at 5 %" in clean["verdict"]["sentence"]
    assert "of which the 2 runs of full training have" in clean["verdict"]["sentence"]
    weights = load_file(twins / "0/model.safetensors")
    weights["1.bias"][3] -= 100
    planted = write_linear(tmp_path / "planted", weights["1.weight"], weights["1.bias"])
    card = card_of(planted, *others)
    assert card["verdict"]["regression"] is True
    assert "class 3 has 0.0 % right" in card["verdict"]["sentence"]
    assert [each["class"] for each in card["against"][0]["classes"]] == ["3"]
    assert card["accuracy"]["worst"][0]["class"] == "3"
    (_, _, page) = write_card(card, tmp_path / "out")
    assert 'id="problem">Regression' in page.read_text()


def test_robustness_is_relative_to_the_runs_compared_with(twins):
    words = ("--against", twins / "1", *FEW[2:], "--robustness", "100")
    found = make_card(parse(list(map(str, (twins / "0", *words)))))["robustness"]
    assert 80 < found["mce"] < 125
    assert found["difference"]["low"] < 0 < found["difference"]["high"]
    assert len(found["reference"]) == 8


def test_of_a_text_the_card_says_what_it_leaves_out(tmp_path):
    (tmp_path / "text").write_text("a story that says the same again and again. " * 60)
    words = ("data=bytes", "model=bytes", f"data.path={tmp_path}/text", "data.train_size=null")
    small = ("data.context=16", "model.depth=1", "model.embed_dim=16", "model.num_heads=1")
    rest = ("epochs=1", "monitor.window=2", "switch/criterion=never", "log.wandb.mode=disabled")
    config = composed(*ON_ANY_DATA, *words, *small, *rest)
    train(config, tmp_path / "run")
    train(composed(*ON_ANY_DATA, *words, *small, *rest, "seed=1"), tmp_path / "other")
    card = card_of(tmp_path / "run", "--against", tmp_path / "other")
    assert card["inputs"] == "windows" and card["images"] == (264 - 1) // 16
    assert card["robustness"]["left_out"] == "left out: for images alone"
    assert "bytes" in card["accuracy"]["classes"]["left_out"]
    assert card["calibration"]["temperature"] and card["against"][0]["churn"]["value"] >= 0
    write_card(card, tmp_path / "out")


def test_colour_images_in_folders_and_a_folder_of_timm_have_their_cards(tmp_path):
    """What timm puts on the hub does not say what it learned from: it gets no temperature."""
    for number, split in enumerate(("train", "val")):
        paint(tmp_path / "data" / split, CLASSES, count=8 - number)
    root = f"data.root={tmp_path / 'data'}"
    train(composed(*ON_FOLDERS, root), tmp_path / "run")
    few = ("--robustness", "6", *FEW[2:5], "--ood", "data=digits")
    card = make_card(parse([str(tmp_path / "run"), *few]))
    assert card["data"]["classes"] == list(CLASSES) and "top5" not in card["accuracy"]
    assert len(card["robustness"]["corruptions"]) == 8 and card["robustness"]["images"] == 6
    assert card["calibration"]["temperature"] > 0 and card["ood"]["images"] == 360
    (tmp_path / "hub").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "run" / name, tmp_path / "hub" / name)
    words = ["data=imagefolder", root]
    found = card_of(tmp_path / "hub", *words)
    assert found["accuracy"]["top1"] == card["accuracy"]["top1"]
    assert "does not say which data" in found["calibration"]["after"]["left_out"]
    write_card(found, tmp_path / "out")


@pytest.fixture(scope="module")
def mistaken(run, twins, tmp_path_factory):
    """Folders with something wrong in each."""
    place = tmp_path_factory.mktemp("mistaken")
    write_linear(place / "eleven", torch.zeros(11, 64), torch.zeros(11))
    write_linear(place / "broken", torch.full((10, 64), torch.nan), torch.zeros(10))
    for name, size in (("cut", "null"), ("fewer", "100"), ("smaller", "360")):
        shutil.copytree(twins / "1", place / name)
        config = (place / name / "config.yaml").read_text()
        changed = config.replace("eval_size: null", f"eval_size: {size}")
        (place / name / "config.yaml").write_text(changed)
    (place / "cut/model.safetensors").write_bytes(b"\x10")
    return place


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{twins}/none",), "none: there is no such file or folder"),
        (("{twins}/0", "--against", "{twins}/none"), "none: there is no such file or folder"),
        (("{twins}/0", "--against", "{twins}/0"), "holds the same weights as"),
        (("{twins}/0", "--against", "{place}/eleven"), "has 11 classes, .* has 10"),
        (("{twins}/0", "--against", "{place}/fewer"), "is tested on 100 inputs, .* on 360"),
        (("{twins}/0", "--against", "{twins}/1", "data.eval_size=9"), "right behind RUN"),
        (("{place}/broken",), "logits that are not finite"),
        (("{place}/cut",), "model.safetensors"),
        (("{twins}/0", "data.eval_size=1"), "has 1 inputs: a card needs at least 2"),
        (("{twins}/0", "epochs=3"), "write data=NAME or data.KEY=VALUE"),
        (("{twins}/0", "--ood", "digits"), "--ood digits: write data=NAME"),
        (("{twins}/0", "--ood", "data=digit"), "choose one of bytes, cifar10, digits"),
        (("{twins}/0", "--ood", "data=bytes"), "these are no images"),
        (("{twins}/0", "--robustness", "-1"), "--robustness is -1: give at least 0"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words, said, twins, mistaken, monkeypatch, tmp_path
):
    words = [word.format(twins=twins, place=mistaken) for word in words]
    few = [word for word in FEW if "--robustness" not in words or word not in FEW[:2]]
    with pytest.raises(SystemExit, match=rf"^card: [^\n]*{said}[^\n]*$"):
        call(monkeypatch, *words, *few, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_hold_the_card_is_told_before_anything_is_computed(twins, monkeypatch):
    file = twins / "own_linear.py"
    with pytest.raises(SystemExit, match=rf"^card: {file}/x: {file} is no folder"):
        call(monkeypatch, twins / "none", "--output", file / "x")
    with pytest.raises(SystemExit, match=r"^card: /proc/x: /proc is no folder"):
        call(monkeypatch, twins / "none", "--output", "/proc/x")


def test_tables_have_columns_of_the_cards_and_name_a_damaged_one(tmp_path):
    write_run(tmp_path / "a", *NEVER)
    table, _ = table_of(tmp_path)
    assert not {"ece", "churn"} & {column.key for column in table.columns}
    (tmp_path / "a/card").mkdir()
    card = {
        "calibration": {"before": {"ece": {"value": 3.456}}},
        "robustness": {"left_out": "left out: --robustness 0"},
        "against": [{"churn": {"value": 2.0}}, {"churn": {"value": 4.0}}],
    }
    (tmp_path / "a/card/card.json").write_text(json.dumps(card))
    table, rows = table_of(tmp_path)
    assert text_of(table, rows["full training"], "ece") == "3.46 (1)"
    assert text_of(table, rows["full training"], "churn") == "3.00 (1)"
    assert "corruption_error" not in {column.key for column in table.columns}
    (tmp_path / "a/card/card.json").write_text("{")
    table, _ = table_of(tmp_path)
    assert any("card.json" in note and "switchlora-runs card" in note for note in table.notes)
    assert "ece" not in {column.key for column in table.columns}


def write_card_of(folder, card, method, seed, top1, churns):
    """A card as if a run of a method with a seed had made it; ``churns`` by the other's seed."""
    against = [{"seed": other, "churn": {"value": value}} for other, value in churns.items()]
    changed = {**card, "model": {**card["model"], "method": method, "seed": seed}}
    changed["accuracy"] = {**card["accuracy"], "top1": {"value": top1}}
    place = folder / f"{method}_{seed}/card"
    place.mkdir(parents=True)
    (place / "card.json").write_text(json.dumps({**changed, "against": against}))


def test_cards_of_several_seeds_are_a_table_beside_full_training(
    twins, tmp_path, monkeypatch, capsys
):
    """Differences of 1, 2 and 3 points have the 95 % interval 2 +- 4.3 / sqrt(3)."""
    card = card_of(twins / "0", "--against", twins / "1")
    for seed in range(3):
        others = {other: 10 for other in range(3) if other != seed}
        write_card_of(tmp_path, card, "full", seed, 80 + seed, others)
        write_card_of(tmp_path, card, "mine", seed, 81 + 2 * seed, {**others, seed: 4 + seed})
    words = ["switchlora-runs", "cards", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    commands.runs()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = {row[0]: row[1:] for row in rows}
    assert found[""] == ["full", "mine"]
    assert found["top1, %"] == ["81.00 ± 1.00 (3)", "83.00 ± 2.00 (3)"]
    assert rows[3] == ["– to full, points", "–", "+2.00 [-0.48 to +4.48] (3)"]
    assert found["churn to full training of the same seed, %"] == ["–", "5.0 ± 1.0 (3)"]
    assert found["churn to full training of other seeds, %"] == ["10.0 ± 0.0 (3)"] * 2
    assert found["error on corrupted images, %"] == ["–", "–"]
    assert found["regression by its card"] == ["0 of 3"] * 2
    monkeypatch.setattr(sys, "argv", [*words, "--full", "never"])
    with pytest.raises(SystemExit, match="no card is of never: give --full, one of full, mine"):
        commands.runs()
