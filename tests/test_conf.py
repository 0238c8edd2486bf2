"""Every yaml composes and builds; the same through the installed command's search path."""

import dataclasses
import inspect
import re

import pytest
import torch
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf
from torch import nn

from conf_yamls import CONF, build, by_hydra, composed, names
from starts import Started, program_in
from switchlora.adapters import DEFAULT_TARGETS
from switchlora.config import as_plain
from switchlora.learner import Recipe, build_learner
from switchlora.policy import SwitchPolicy
from switchlora.process import check_values, checked


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
    with Started(tmp_path / "said", program_in, tmp_path, *run) as started:
        shown = started.finish()
    assert shown.returncode == 0, shown.stderr
    assert "all targets are still" in shown.stdout + shown.stderr
    assert "the summary has " in shown.stdout


def built_here(content, group, name):
    """(where, class or function, its arguments) of all that a yaml builds of this package."""
    if isinstance(content, dict):
        target = content.get("_target_", "")
        if target.startswith("switchlora."):
            yield f"{group}={name}", get_object(target), content
        for value in content.values():
            yield from built_here(value, group, name)
    if isinstance(content, list):
        for value in content:
            yield from built_here(value, group, name)


def all_that_yamls_build():
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.parent.relative_to(CONF).as_posix()
        yield from built_here(yaml.safe_load(path.read_text()), group, path.stem)


MEANT_TO_DIFFER = {
    "method/prelora_bug=micro_batch_counter": {"counter"},  # the bug
    "method/prelora_bug=shared_output": {"shared_output"},  # the bug
    "switch/criterion=cuttlefish": {"epsilon", "relaxed", "integer"},  # published constants
    "switch/rank=cuttlefish": {"of", "scaled", "lowest"},  # published constants
    "recipe=base": {"compile", "precision"},  # a run knows its device, a recipe does not
    "recipe=adapter": {"rewarmup_updates"},  # of a full phase there is none
    "switch/guard=full": {"fraction"},  # the switch after one that was taken back comes later
    "switch/guard=warn": {"act"},  # the name of the choice
    "switch/restart=update_svd": {"init"},  # the name of the choice
}


def test_a_default_of_the_code_is_that_of_the_yaml():
    differ = {}
    for where, made, given in all_that_yamls_build():
        for name, parameter in inspect.signature(made).parameters.items():
            default = parameter.default
            if name not in given or default is parameter.empty or "$" in str(given[name]):
                continue
            default = list(default) if isinstance(default, tuple) else default
            if default != given[name]:
                differ.setdefault(where, set()).add(name)
    assert differ == MEANT_TO_DIFFER


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_every_field_of_a_recipe_is_a_key_with_a_comment(name):
    text = (CONF / f"recipe/{name}.yaml").read_text()
    commented = set(re.findall(r"^(\w+):.*(?:#|\$\{full)", text, re.M))
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert fields - commented <= {"optimizer", "scheduler"}


@pytest.mark.parametrize(
    "key", ["switch.guard", "switch.stages", "switch.restart", "adapter.refactoring"]
)
def test_an_empty_group_is_shown_as_null(key):
    section, name = key.split(".")
    assert f"{name}: null" in OmegaConf.to_yaml(composed()[section])


@pytest.mark.parametrize("recipe", ["adamw", "sgd"])
def test_each_key_of_the_adapters_optimizer_and_schedule_is_set_by_itself_or_follows(recipe):
    words = ["full.optimizer.lr=0.5", "full.scheduler.lr_min=0.25", f"recipe@full={recipe}"]
    both = composed(*words)
    assert both.adapter.optimizer == both.full.optimizer
    assert both.adapter.scheduler == both.full.scheduler
    own = composed("adapter.optimizer.lr=1e-4", "adapter.scheduler.warmup_t=7", *words)
    assert own.full == both.full
    assert own.adapter.optimizer == {**both.full.optimizer, "lr": 1e-4}
    assert own.adapter.scheduler == {**both.full.scheduler, "warmup_t": 7}


def test_the_adapters_own_rate_is_that_of_its_optimizer():
    adapter = build(composed("adapter.optimizer.lr=1e-4").adapter)
    optimizer = adapter.optimizer([nn.Parameter(torch.zeros(1))])
    assert optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize(
    "words",
    [["+full.optimizer.eps=1e-6"], ["++full.optimizer.eps=1e-6"], ["~full.optimizer.betas"]],
    ids=" ".join,
)
def test_a_key_that_the_command_line_adds_or_deletes_is_followed(words):
    config = composed(*checked(words))
    assert config.adapter.optimizer == config.full.optimizer
    assert ("eps" in config.adapter.optimizer) == ("eps" in words[0])


def test_an_added_key_that_the_adapter_phase_would_not_follow_is_refused():
    config = as_plain(composed("+full.optimizer.eps=1e-6"))
    with pytest.raises(ValueError, match="does not follow full.optimizer.eps.*adapter.optimizer"):
        check_values(config)
    check_values(as_plain(composed("+full.optimizer.eps=1e-6", "recipe@adapter=sgd")))


@pytest.mark.parametrize(
    "value,options", [("true", {}), ("{backend:eager}", {"backend": "eager"}), ("{}", {})]
)
def test_the_model_is_compiled_when_the_recipe_says_so(monkeypatch, value, options):
    given = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: given.append(options) or model)
    recipe = build(composed(f"full.compile={value}").full)
    assert recipe.compiles and build_learner(nn.Linear(2, 2), recipe, 10)
    assert given == [options]


@pytest.mark.parametrize("value", ["false", "null"])
def test_the_model_is_not_compiled_when_the_recipe_does_not_say_so(monkeypatch, value):
    monkeypatch.delattr(torch, "compile")
    recipe = build(composed(f"full.compile={value}").full)
    assert not recipe.compiles and build_learner(nn.Linear(2, 2), recipe, 10)


def test_options_that_torch_compile_does_not_have_are_told_by_their_key():
    recipe = build(composed("full.compile={mood: default}").full)
    with pytest.raises(ValueError, match="full.compile is {'mood': 'default'}: torch says .*mood"):
        build_learner(nn.Linear(2, 2), recipe, 10)


@pytest.mark.parametrize(
    "words",
    [
        ("+method=prelora", "epochs=3", "+model.drop_rate=0.1", "~log.wandb.tags"),
        ("switch.rank.rank=3", "switch/rank=fixed", "recipe@full=sgd", "+experiments=demo"),
        ("data=digits", "data.train_transform={}", "switch.freeze=[a,'b,c']", "name=${data.root}"),
    ],
)
def test_what_the_tests_compose_in_two_steps_is_what_hydra_composes(words):
    whole = by_hydra(*words)
    assert composed(*words) == whole
    assert OmegaConf.to_yaml(composed(*words)) == OmegaConf.to_yaml(whole)
