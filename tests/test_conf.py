"""Every yaml composes and builds; the same through the installed command's search path."""

import os
import re
import subprocess
import sys

import pytest
from torch import nn

from conf_yamls import CONF, build, composed, names
from switchlora.adapters import DEFAULT_TARGETS
from switchlora.learner import Recipe
from switchlora.policy import SwitchPolicy


@pytest.mark.parametrize("part", ["criterion", "rank", "init", "scaling"])
def test_every_choice_of_the_switch_builds_a_callable(part):
    for name in names(f"switch/{part}"):
        policy = build(composed(f"switch/{part}={name}").switch)
        assert isinstance(policy, SwitchPolicy) and callable(getattr(policy, part)), name


@pytest.mark.parametrize("recipe", [n for n in names("recipe") if n not in ("base", "adapter")])
def test_the_adapter_phase_follows_every_recipe_of_the_full_phase(recipe):
    config = composed(f"recipe@full={recipe}")
    full, adapter = build(config.full), build(config.adapter)
    assert isinstance(full, Recipe) and isinstance(adapter, Recipe)
    parameter = nn.Parameter(nn.Linear(2, 2).weight.detach())
    optimizers = [r.optimizer([{"params": [parameter]}]) for r in (full, adapter)]
    assert type(optimizers[0]) is type(optimizers[1])
    assert optimizers[0].defaults == optimizers[1].defaults


@pytest.mark.parametrize(
    "model", sorted(set(names("model")) - {"timm", "small", "digits", "bytes"})
)
def test_every_model_config_names_a_model_that_timm_has(model):
    import timm

    assert timm.is_model(composed(f"model={model}").model.name)


@pytest.mark.parametrize("model,data", [("small", "fashion_mnist"), ("digits", "digits")])
def test_small_models_build_and_fit_their_data(model, data):
    import torch

    config = composed(f"model={model}", f"data={data}")
    net = build(config.model)
    shape = (2, config.data.in_chans, config.data.image_size, config.data.image_size)
    assert net(torch.zeros(shape)).shape == (2, config.data.num_classes)


def test_default_targets_of_the_class_and_of_the_yaml_are_the_same():
    assert tuple(composed().switch.targets) == DEFAULT_TARGETS


@pytest.mark.parametrize("path", sorted((CONF.parent / "experiments").glob("*.yaml")))
def test_every_experiment_is_found_by_its_name(path):
    config = composed(f"+experiments={path.stem}")
    assert build(config.switch) and config.name == path.stem


def test_the_documented_files_of_ones_own_train_and_switch_from_a_folder_of_ones_own(tmp_path):
    text = (CONF.parent / "docs/your_own.md").read_text()
    files = re.findall(r"```(?:python|yaml)\n((?:# @.*?\n)?# (\S+)\n.*?)```", text, re.S)
    assert len(files) == text.count("```python") + text.count("```yaml")
    for content, name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    run = ["--config-dir", "conf", "+experiments=mine", "log=quiet", "log.figures=false"]
    shown = subprocess.run(
        [sys.executable, "-m", "switchlora", *run],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "all targets are still" in shown.stdout + shown.stderr
