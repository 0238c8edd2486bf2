"""A saved model: evaluated as the run did it, loaded by timm and PEFT, described by its card."""

import copy
import json
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from conf_yamls import composed
from runs import BY_DATE, ON_ANY_DATA, SHORT
from switchlora import commands
from switchlora.analysis.evaluate import evaluated, opened, precision_of
from switchlora.learner import predict
from switchlora.models import create_model, eval_mode
from switchlora.run import finish, prepare
from switchlora.storage import find_all, load_model, read_record, save_merged
from switchlora.storage.hub import MARK, hub_config, save_hub_layout
from switchlora.train import fit, train
from test_families import SMALL, built

SMALL_RUN = (
    *("model.embed_dim=32", "model.num_heads=1", "epochs=2", "switch/rank=fixed"),
    *("switch.rank.rank=2", "log.wandb.mode=disabled"),
)
CLASSES = ("blue", "green", "red")
MODEL = ("model=timm", "model.name=vit_tiny_patch16_224", "+model.depth=1", "+model.patch_size=8")
ON_FOLDERS = (
    *("data=imagefolder", "data.num_classes=3", "data.image_size=16", "data.batch_size=6"),
    *(*MODEL, "+model.embed_dim=32", "+model.num_heads=2", "epochs=1", "data.label_smoothing=0"),
    *("full.scheduler.warmup_t=1", "log=quiet", "log.figures=false", "log.wandb.mode=disabled"),
    *(
        "switch/criterion=never",
        "monitor.window=1",
        "data.mean=[0.3,0.4,0.5]",
        "data.std=[0.2,0.3,0.25]",
    ),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that switched, and its live model."""
    folder = tmp_path_factory.mktemp("finished")
    run = prepare(composed(*SHORT, *SMALL_RUN, *BY_DATE, "data.eval_size=null"), folder)
    with run.log:
        fit(run)
        finish(run, "finished")
    return folder, run


def paint(root, classes, count=8):
    """Images of one colour a class, of two sizes, with noise."""
    random = np.random.default_rng(0)
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 90, (20, 24 + number, 3), dtype=np.uint8)
            pixels[..., ("red", "green", "blue").index(name)] += 150
            Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def on_folders(tmp_path_factory):
    """A finished run on folders of images."""
    folder = tmp_path_factory.mktemp("folders")
    paint(folder / "images/train", CLASSES)
    paint(folder / "images/val", CLASSES, 3)
    train(composed(*ON_FOLDERS, f"data.root={folder}/images"), folder / "run")
    return folder


def recorded(folder):
    return read_record(folder).result["test"]


def assert_as_recorded(found, folder):
    for name, value in recorded(folder).items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize(
    "form",
    ["", "model.safetensors", "adapter", "adapter/residual.safetensors", "checkpoint", "state"],
)
def test_eval_gives_what_the_run_recorded_whatever_form_the_model_has(form, finished):
    folder, _ = finished
    checkpoint = find_all(folder)[0]
    path = {"checkpoint": checkpoint, "state": checkpoint / "state.pt"}.get(form, folder / form)
    found = evaluated(path)
    assert found["images"] == 360
    assert_as_recorded(found, folder)


def test_predictions_give_the_accuracy_and_loss_that_the_run_recorded(finished):
    folder, _ = finished
    found = opened(folder, device="cpu")
    logits, labels = predict(found.saved.model, found.loader)
    assert len(logits) == len(labels) == 360
    top1 = (logits.argmax(1) == labels).double().mean().item()
    assert 100 * top1 == pytest.approx(recorded(folder)["top1"])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(recorded(folder)["loss"], abs=1e-5)


def test_a_run_that_left_its_precision_open_is_evaluated_in_that_of_the_device(finished):
    folder, _ = finished
    saved = opened(folder, device="cpu").saved
    for phase in ("full", "adapter"):
        saved.config[phase]["precision"] = "auto"
    assert precision_of(saved) == "fp32"


def test_eval_takes_the_newest_checkpoint_of_a_run_without_a_model(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "killed")
    (tmp_path / "killed/model.safetensors").unlink()
    assert_as_recorded(evaluated(tmp_path / "killed"), folder)


def test_eval_of_a_run_on_text_counts_windows(tmp_path):
    (tmp_path / "text").write_text("a story that says the same again and again. " * 60)
    small = (
        "data.train_size=null",
        "data.context=16",
        "model.depth=1",
        "model.embed_dim=16",
        "model.num_heads=1",
    )
    words = ("data=bytes", "model=bytes", f"data.path={tmp_path}/text", *small)
    words += ("epochs=1", "monitor.window=2", "switch/criterion=never")
    summary = train(composed(*ON_ANY_DATA, *words), tmp_path / "run")
    found = evaluated(tmp_path / "run")
    assert found["loss"] == pytest.approx(summary["test"]["loss"], abs=1e-4)
    assert found["windows"] == (264 - 1) // 16
    assert not (tmp_path / "run/config.json").exists()
    assert "CausalTransformer builds it" in (tmp_path / "run/README.md").read_text()


def test_the_command_prints_a_table_or_json(finished, monkeypatch, capsys):
    folder, _ = finished
    call(monkeypatch, folder)
    header, _, row = capsys.readouterr().out.splitlines()
    assert all(name in header for name in ("loss", "top1", "top5", "images"))
    assert f"{recorded(folder)['top1']:.4f}" in row
    call(monkeypatch, folder, "data.eval_size=100", "--json")
    assert json.loads(capsys.readouterr().out)["images"] == 100


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["switchlora-runs", "eval", *map(str, words)])
    commands.runs()


def test_a_hub_folder_is_evaluated_on_data_that_are_named(finished, tmp_path):
    folder, _ = finished
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(ValueError, match="does not say which data"):
        evaluated(tmp_path)
    assert_as_recorded(evaluated(tmp_path, ["data=digits"]), folder)


def test_other_folders_have_the_models_normalisation_and_numbers_of_classes(on_folders, tmp_path):
    own = evaluated(on_folders / "run")
    assert_as_recorded(own, on_folders / "run")
    paint(tmp_path / "val", CLASSES, 3)
    words = ["data=imagefolder", f"data.root={tmp_path}"]  # it has no train/
    assert evaluated(on_folders / "run", words)["loss"] == pytest.approx(own["loss"], abs=1e-6)
    (tmp_path / "val/red").rename(tmp_path / "red")
    two = evaluated(on_folders / "run", words)
    (tmp_path / "red").rename(tmp_path / "val/red")
    shutil.rmtree(tmp_path / "val/blue")
    shutil.rmtree(tmp_path / "val/green")
    red = evaluated(on_folders / "run", words)
    assert (two["images"], red["images"]) == (6, 3)
    assert (6 * two["loss"] + 3 * red["loss"]) / 9 == pytest.approx(own["loss"], abs=1e-6)
    (tmp_path / "val/red").rename(tmp_path / "val/yellow")
    with pytest.raises(ValueError, match="class 'yellow' that the training split has not"):
        evaluated(on_folders / "run", words)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A model of timm that this program never saw, as timm writes it for the hub."""
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 16, "num_heads": 1, "num_classes": 3, "patch_size": 8}
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, **options)
    seen = {"mean": (0.2, 0.3, 0.4), "std": (0.3, 0.2, 0.4), "crop_pct": 0.6}
    model.pretrained_cfg |= {**seen, "interpolation": "bicubic", "input_size": (3, 16, 16)}
    names = ["red", "green", "blue"]
    described = {"label_names": names, "model_args": {**options, "img_size": 16}}
    timm.models.save_for_hf(model, folder, described, safe_serialization=True)
    return folder


def as_flat(folder):
    content = json.loads((folder / "config.json").read_text())
    labels = {"labels": content["label_names"], "architecture": content["architecture"]}
    old = content["pretrained_cfg"] | labels | {"model_args": content["model_args"]}
    (folder / "config.json").write_text(json.dumps(old))


def as_bin(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def as_dino(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "mask_token": torch.zeros(1, 16)}, folder / "model.safetensors")


@pytest.mark.parametrize("change", [None, as_flat, as_bin, as_dino])
@torch.no_grad()
def test_a_folder_of_timm_from_elsewhere_is_evaluated_as_timm_does(
    change, elsewhere, on_folders, tmp_path
):
    shutil.copytree(elsewhere, tmp_path / "hub")
    model = timm.create_model(f"local-dir:{elsewhere}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images, labels = [], []
    for number, name in enumerate(["red", "green", "blue"]):
        for path in sorted((on_folders / "images/val" / name).glob("*.png")):
            images.append(transform(Image.open(path)))
            labels.append(number)
    loss = torch.nn.functional.cross_entropy(model(torch.stack(images)), torch.tensor(labels))
    if change is not None:
        change(tmp_path / "hub")
    words = ["data=imagefolder", f"data.root={on_folders}/images"]
    found = evaluated(tmp_path / "hub", words, device="cpu")
    assert found["images"] == 9 and found["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_a_device_that_is_not_there_is_one_line(finished, monkeypatch):
    with pytest.raises(SystemExit, match=r"^eval: --device 'nowhere' cannot be used: [^\n]*$"):
        call(monkeypatch, finished[0], "--device", "nowhere")


def test_a_changed_root_of_the_runs_own_data_is_followed(on_folders, tmp_path):
    paint(tmp_path / "val", CLASSES, 2)
    assert evaluated(on_folders / "run", [f"data.root={tmp_path}"])["images"] == 6


MISTAKES = {
    "nowhere": "there is no such file or folder; give a run folder, a checkpoint",
    "empty": "holds no model",
    "alone/model.safetensors": "does not say which model its weights belong to",
    "other/model.safetensors": "is no model as the configuration in .* describes it: weights",
    "cut": "model.safetensors is a damaged file of safetensors",
    "evil": "model is to be built by 'os.mkdir', which is no part of this program",
    "evil_data": "data.train is to be built by 'os.mkdir', which is no part of this program",
    "evil_hub": "is to be built by 'os.mkdir', which is no part of this program",
    "half": "is missing: an adapter needs adapter_model.safetensors",
    "dora": "adapter_config.json: use_dora is True, which is more than LoRA",
}


@pytest.fixture(scope="module")
def mistaken(finished, tmp_path_factory):
    """Folders with something wrong in each."""
    folder, _ = finished
    place = tmp_path_factory.mktemp("mistaken")
    (place / "empty").mkdir()
    files = ("config.yaml", "config.json", "metrics.jsonl", "model.safetensors")
    for name in ("alone", "other", "cut", "evil", "evil_data", "evil_hub", "half", "dora"):
        (place / name).mkdir()
        for file in files:
            shutil.copy(folder / file, place / name)
    for file in files[:3]:
        (place / "alone" / file).unlink()
    save_file({"head.weight": torch.zeros(1)}, place / "other/model.safetensors")
    cut = (folder / "model.safetensors").read_bytes()[:3000]
    (place / "cut/model.safetensors").write_bytes(cut)
    config = (folder / "config.yaml").read_text()
    ours = {"evil": "switchlora.models.create_model", "evil_data": "switchlora.data.Digits"}
    for name, target in ours.items():
        (place / name / "config.yaml").write_text(config.replace(target, "os.mkdir"))
    (place / "evil_hub/config.yaml").unlink()
    hub = json.loads((folder / "config.json").read_text())
    hub["model_args"]["norm_layer"] = {"_target_": "os.mkdir", "path": str(place / "ran")}
    (place / "evil_hub/config.json").write_text(json.dumps(hub))
    for name in ("half", "dora"):
        shutil.copytree(folder / "adapter", place / name / "adapter")
        (place / name / "model.safetensors").rename(place / name / "adapter/x")
    (place / "half/adapter/residual.safetensors").unlink()
    settings = place / "dora/adapter/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    return place


@pytest.mark.parametrize("name", MISTAKES)
def test_a_file_that_is_not_right_is_one_line_and_runs_nothing(name, mistaken, monkeypatch):
    path = mistaken / name
    if name in ("half", "dora"):
        path /= "adapter"
    with pytest.raises(SystemExit, match=rf"^eval: [^\n]*{MISTAKES[name]}[^\n]*$"):
        call(monkeypatch, path)
    assert not (mistaken / "ran").exists()


@pytest.mark.parametrize(
    "word,said",
    {
        "epochs=3": "write data=NAME or data.KEY=VALUE",
        "my_data.Stripes": "repeat --allow for each name, as in --allow my_data.Stripes",
        "data=digit": "choose one of bytes, cifar10, digits",
        "data.bach_size=3": "near names: batch_size",
        "data.batch_size=many": "data.batch_size is 'many'",
        "data.num_classes=3": "data.num_classes is 3, but the model has 10",
        "data.image_size=16": "data.image_size=16",
        "data.eval_transform={nope: 3}": "data.train_transform or data.eval_transform",
    }.items(),
)
def test_a_wrong_word_is_one_line(word, said, finished, monkeypatch):
    with pytest.raises(SystemExit, match=rf"^eval: [^\n]*{said}[^\n]*$"):
        call(monkeypatch, finished[0], word)


def test_images_that_the_model_does_not_take_are_one_line(finished, monkeypatch):
    words = ("data.image_size=16", "data.eval_transform={}")
    with pytest.raises(SystemExit, match=r"^eval: the model does not take inputs of 1 x 16 x 16"):
        call(monkeypatch, finished[0], *words)


@torch.no_grad()
def test_timm_loads_the_folder_with_the_logits_and_the_images_of_the_run(finished):
    folder, run = finished
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images, _ = next(iter(run.data.test))
    with eval_mode(run.model):
        wanted = run.model(images)
    torch.testing.assert_close(model(images), wanted, rtol=0, atol=1e-5)
    assert len(model.blocks) == 1 and model.embed_dim == 32
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings)
    image = Image.fromarray((images[0, 0] * 0.3760 + 0.3054).mul(255).round().byte().numpy())
    torch.testing.assert_close(transform(image), images[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_timm_sees_folders_as_the_run_does_and_knows_the_names_of_the_classes(on_folders):
    folder = on_folders / "run"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert tuple(model.pretrained_cfg["label_names"]) == CLASSES
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = []
    for path in sorted((on_folders / "images/val").rglob("*.png")):
        images.append(transform(Image.open(path)))
    labels = torch.arange(3).repeat_interleave(3)
    loss = torch.nn.functional.cross_entropy(model(torch.stack(images)), labels)
    assert float(loss) == pytest.approx(recorded(folder)["loss"], abs=1e-5)


def config_of(size, channels=3):
    data = {"in_chans": channels, "image_size": size, "mean": [0.5] * channels}
    return {
        "model": {"_target_": "switchlora.models.create_model"},
        "data": {**data, "std": [0.5] * channels},
    }


def from_hub(model, config, folder):
    """The model as timm loads it from a folder."""
    save_merged(model, folder / "model.safetensors")
    content = json.dumps(hub_config(model, config, ()))
    (folder / "config.json").write_text(content)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_timm_loads_each_family_from_its_hub_layout(family, tmp_path):
    model, images, *_ = built(family)
    found = from_hub(model, config_of(images.shape[-1]), tmp_path)
    wanted = model(images)
    near = 5e-5 * float(wanted.abs().max())
    torch.testing.assert_close(found(images), wanted, rtol=0, atol=near)


@pytest.mark.parametrize(
    "options", [{"in_chans": 4}, {"in_chans": 1, "patch_size": 4, "img_size": 32}]
)
@torch.no_grad()
def test_timm_loads_other_channels_and_the_size_that_timm_took_by_itself(options, tmp_path):
    size = options.get("img_size", 224)
    tiny = {"depth": 1, "embed_dim": 16, "num_heads": 1, "num_classes": 3}
    model = create_model("vit_tiny_patch16_224", **tiny, **options).eval()
    found = from_hub(model, config_of(size, options["in_chans"]), tmp_path)
    images = torch.randn(1, options["in_chans"], size, size)
    torch.testing.assert_close(found(images), model(images), rtol=0, atol=1e-5)


def test_the_card_is_a_valid_one_and_tells_what_the_run_recorded(finished):
    folder, _ = finished
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm" and card.data.metrics == ["accuracy"]
    assert "switchlora" in card.data.tags
    summary = read_record(folder).result
    test, switch = summary["test"], summary["switch"]
    told = f"| test | {test['loss']:.4f} | {test['top1']:.2f} | {test['top5']:.2f} |"
    assert told in card.text
    assert f"Switch: at update {switch['num_updates']}, " in card.text
    assert f"{switch['trainable_after']:,}" in card.text
    assert "local-dir:THIS_FOLDER" in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_split, result.metric_type) == ("test", "accuracy")
    assert result.metric_value == pytest.approx(test["top1"] / 100, abs=1e-6)
    low, high = map(float, re.search(r"top1 is ([\d.]+) to ([\d.]+) %", card.text).groups())
    assert low < test["top1"] < high
    headings = ("Intended use", "Results", "Limits", "Training", "Cost", "Provenance", "Use")
    assert all(f"\n## {heading}\n" in card.text for heading in headings)
    assert f"{summary['cost']['train_flops']:.3g} training FLOPs" in card.text
    assert str(folder) not in card.text


def test_files_of_the_users_stay_and_ours_are_written_anew(finished, tmp_path):
    folder, run = finished
    summary = dict(read_record(folder).result)

    def save():
        return save_hub_layout(tmp_path, run.model, run.config, (), summary)

    assert save() == []
    summary["num_updates"] = 7654
    assert save() == [] and "7,654 updates" in (tmp_path / "README.md").read_text()
    edited = (tmp_path / "README.md").read_text().replace(MARK, "") + "mine"
    for name, text in {"README.md": edited, "config.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    assert [line.split()[0] for line in save()] == ["README.md", "config.json"]
    assert (tmp_path / "README.md").read_text() == edited
    assert (tmp_path / "config.json").read_text() == "{}"


def test_what_timm_cannot_build_gets_no_config_and_its_card_says_why(finished, tmp_path):
    folder, run = finished
    config = {**run.config, "model": {"_target_": "my_model.Perceptron", "width": 3}}
    model = torch.nn.Linear(2, 2)
    assert save_hub_layout(tmp_path, model, config, (), read_record(folder).result) == []
    assert not (tmp_path / "config.json").exists()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name is None
    assert "timm cannot build this model by itself: my_model.Perceptron builds it" in card.text


@torch.no_grad()
def test_peft_loads_the_adapter_that_names_its_base(finished):
    from peft import PeftConfig, PeftModel

    folder, run = finished
    settings = PeftConfig.from_pretrained(folder / "adapter")
    assert settings.base_model_name_or_path == "residual.safetensors"
    base = timm.create_model(f"local-dir:{folder}")
    base.load_state_dict(load_file(folder / "adapter" / settings.base_model_name_or_path))
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    images, _ = next(iter(run.data.test))
    live = load_model(find_all(folder)[0])
    torch.testing.assert_close(adapted(images), live(images), rtol=0, atol=1e-5)


def test_an_own_model_is_evaluated_when_the_user_allows_it(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ("switch.targets=['1']", "switch/criterion=never")
    plain = copy.deepcopy(composed(*SHORT, *SMALL_RUN, *words))
    plain.model = {"_target_": "own_net.Net"}
    train(plain, tmp_path / "run")
    with pytest.raises(ValueError, match="--allow own_net.Net"):
        evaluated(tmp_path / "run")
    found = evaluated(tmp_path / "run", allow=["own_net.Net"])
    assert_as_recorded(found, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()
