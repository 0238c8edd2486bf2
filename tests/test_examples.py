"""The examples: each switches, learns, and saves weights that give the same logits elsewhere."""

import re
import runpy
import sys
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hydra import compose, initialize_config_dir

from conf_yamls import CONF

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs/examples.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples write."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def run(folder, monkeypatch):
    """Run an example there, and give what it defined."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["example"])
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


def same_logits(one, other, inputs):
    with torch.no_grad():
        found, expected = one.eval()(inputs), other.eval()(inputs)
    found, expected = getattr(found, "logits", found), getattr(expected, "logits", expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def images_of(found):
    return found["test"].tensors[0]


def test_a_plain_loop_switches_and_what_it_left_is_published(run, capsys):
    pytest.importorskip("peft")
    trained = run("plain_loop")
    assert trained["switch"].switched and "SWITCH at update" in capsys.readouterr().out
    assert trained["accuracy"](trained["model"], trained["test"]) > 0.7
    published = run("publish")
    same_logits(published["loaded"], trained["model"], images_of(trained))
    assert "adapter/" in (published["FOLDER"] / "README.md").read_text()
    assert (published["FOLDER"] / "adapter/adapter_config.json").is_file()


def test_publishing_without_a_trained_model_says_what_to_run_first(run, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="run examples/plain_loop.py first"):
        run("publish")


def test_a_script_like_timms_switches_with_mixup_and_an_average(run):
    found = run("timm_train")
    assert found["switch"].switched
    average = found["ema"].module
    assert found["accuracy"](average, found["test"]) > 0.7
    file = found["args"].output / "last.pth.tar"
    loaded = timm.create_model("vit_tiny_patch16_224", checkpoint_path=file, **found["SMALL_VIT"])
    same_logits(loaded, average, images_of(found))


@pytest.mark.parametrize("name", ["trainer_images", "trainer_text"])
def test_the_trainer_of_transformers_switches(name, run):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = run(name)
    assert found["callback"].switch.switched
    on_images = name == "trainer_images"
    inputs = images_of(found) if on_images else found["test"]
    commonest = 0.1 if on_images else (inputs == inputs.mode().values.mode().values).float().mean()
    assert found["accuracy"](found["model"], found["test"]) > commonest + 0.05
    same_logits(found["loaded"], found["model"], inputs)


def test_the_trainer_of_lightning_switches(run):
    pytest.importorskip("lightning")
    pytest.importorskip("switchlora.integrations.lightning")
    found = run("lightning_fit")
    assert found["callback"].switch.switched
    assert found["accuracy"](found["model"], found["test"]) > 0.7
    same_logits(found["loaded"], found["model"], images_of(found))


def test_each_command_of_the_sweep_composes(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load((EXAMPLES / "wandb_sweep.yaml").read_text())
    names = list(sweep["parameters"])
    for values in product(*(p["values"] for p in sweep["parameters"].values())):
        args = {name: {"value": value} for name, value in zip(names, values, strict=True)}
        words = utils.create_sweep_command_args({"args": args})["args_no_hyphens"]
        command = utils.create_sweep_command(list(sweep["command"]))
        assert command[0] == "${program}" and command[-1] == "${args_no_hyphens}"
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", [*command[1:-1], *words], return_hydra_config=True)
        assert [config.switch.criterion.fraction, config.seed] == list(values)
        assert config.hydra.run.dir == "runs/wandb_sweep/abc"


def test_the_notebook_draws_the_update_norms_and_the_switch(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    notebook = nbformat.read(EXAMPLES / "update_norms.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    place = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=200, resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("SWITCH at update" in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_every_example_is_on_the_page():
    told = set(re.findall(r"\.\./examples/([\w.]+)", PAGE))
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert told == files


def test_a_wheel_has_no_examples_and_a_source_archive_has_them():
    wheel = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    source = pytest.importorskip("hatchling.builders.sdist").SdistBuilder(str(ROOT))
    names = [file.distribution_path for file in wheel.recurse_included_files()]
    assert names and not any(name.startswith("examples/") for name in names)
    paths = [file.relative_path for file in source.recurse_included_files()]
    assert "examples/plain_loop.py" in paths
