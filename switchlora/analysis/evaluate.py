"""Evaluate a saved model: ``switchlora-runs eval PATH [data=NAME] [data.KEY=VALUE ...]``.

PATH is a run folder, a checkpoint, ``model.safetensors``, an adapter beside its residual, or a
folder as timm puts it on the hub. The test split of the run is evaluated, or that of the data that
the words name. Images are normalised, sized and cropped as the model learned them, and labels go
by the names of the classes, unless a word says otherwise.
"""

import argparse
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from switchlora.analysis.formats import markdown
from switchlora.config import (
    TARGET,
    Config,
    as_plain,
    build,
    build_saved,
    check_saved,
    folder_of,
    names_in_yamls,
)
from switchlora.data import Data, build_test, build_val, classes_of
from switchlora.learner import evaluate, precision_of as precision_on
from switchlora.models import eval_mode
from switchlora.names import near
from switchlora.process import USER_ERRORS, check_keys, checked, find_device, one_line
from switchlora.storage import Saved, load_saved, warn

IMAGES = "switchlora.data.build_data"
FIXED = ("num_classes", "in_chans")
"""keys of the data that belong to the model"""
LEARNED = (*FIXED, "image_size", "mean", "std", "eval_transform")
"""keys of the data that other data take over from those of training, where these have them"""
BASE = "evaluated_data"
CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
"""a word that may be the name of a class in a module"""


def main() -> None:
    """Evaluate what the command line names. Exit with one line on a mistake in it."""
    options = parse(sys.argv[1:])
    try:
        found = evaluated(
            *(options.path, options.overrides, options.config_dir, options.allow, options.device)
        )
    except USER_ERRORS as error:
        sys.exit(f"eval: {one_line(error)}")
    print(json.dumps(found, indent=2) if options.json else table(found))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, metavar="PATH", help="what holds the model")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="data=NAME or data.KEY=VALUE"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_loading_options(parser)
    return parser.parse_intermixed_args(words)


def add_loading_options(parser: argparse.ArgumentParser, words: bool = True) -> None:
    """Add the options of a command that loads a saved model, and perhaps data by ``words``."""
    if words:
        parser.add_argument("--config-dir", type=Path, help="a folder with yamls of your own")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="your class that a file names"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: the GPU if there is one"
    )


def evaluated(
    path: Path,
    words: Sequence[str] = (),
    config_dir: Path | None = None,
    allow: Collection[str] = (),
    device: str = "auto",
) -> dict[str, Any]:
    """Return the metrics of the model in ``path`` on a ``device``, and what was evaluated.

    ``words`` choose or change the data. ValueError for a mistake in them, or in the files.
    """
    found = opened(path, words, config_dir, allow, device)
    metrics = evaluate(found.saved.model, found.loader, precision_of(found.saved))
    view: Any = found.loader.dataset
    skipped = view.skipped() if hasattr(view, "skipped") else []
    inputs = "images" if "image_size" in found.data else "windows"
    return {
        "model": str(found.saved.source),
        "data": " ".join(words) or "its own test split",
        inputs: len(view) - len(skipped),
        **metrics,
    }


@dataclass(frozen=True)
class Opened:
    """A saved model on its device, and what it is evaluated on."""

    saved: Saved
    data: Config
    """configuration of the data"""
    loader: DataLoader
    """batches of the test split"""


def opened(
    path: Path,
    words: Sequence[str] = (),
    config_dir: Path | None = None,
    allow: Collection[str] = (),
    device: str = "auto",
) -> Opened:
    """Return the model in ``path``, on a ``device``, with the data that the ``words`` choose.

    ValueError for a mistake in the words, in the files, or for data that the model cannot take.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise ValueError(f"--config-dir {config_dir} is no folder")
    allowed = {*allow, *(names_in_yamls(config_dir) if config_dir else ())}
    place = find_device("--device", device)
    saved = load_saved(path, allowed)
    data = data_of(saved, words, config_dir, allowed)
    loader = test_loader(saved, data, allowed, own=not is_chosen(words))
    check_fits(saved.model.to(place), loader)
    return Opened(saved, data, loader)


def table(found: Mapping[str, Any]) -> str:
    """Return the result as a table of one row."""
    cells = []
    for value in found.values():
        cells.append(f"{value:.4f}" if isinstance(value, float) else str(value))
    return markdown([list(found), cells])


def precision_of(saved: Saved) -> str:
    """Return the precision in which the run evaluated the model, or would where the model is."""
    phase = saved.config.get("adapter" if saved.adapted else "full") or {}
    device = next(saved.model.parameters()).device
    return precision_on(phase.get("precision", "fp32"), device)


def is_chosen(words: Sequence[str]) -> bool:
    """Return whether the words choose other data than those of the run."""
    return any(word.startswith("data=") for word in words)


def data_of(
    saved: Saved, words: Sequence[str], config_dir: Path | None, allow: Collection[str]
) -> Config:
    """Return the configuration of the data to evaluate on, from the model's own and the words."""
    for word in words:
        if not word.startswith(("data=", "data.", "+data.", "++data.")):
            if CLASS.fullmatch(word):
                raise ValueError(f"{word}: repeat --allow for each name, as in --allow {word}")
            raise ValueError(
                f"{word}: write data=NAME or data.KEY=VALUE; the model stays as it is"
            )
    own = saved.config.get("data") or {}
    check_saved(own, "data", allow)
    places = ["--config-dir", str(config_dir)] if config_dir else []
    words = checked([*places, *words])[len(places) :]
    if is_chosen(words):
        data = chosen(own, words, config_dir)
    elif TARGET in own:
        data = changed(own, words)
    else:
        raise ValueError(
            f"{saved.source} does not say which data it is to be evaluated on: give data=NAME, "
            "such as data=imagefolder data.root=FOLDER"
        )
    check_keys({"data": data}, "")
    for key in FIXED:
        if key in own and data.get(key) != own[key]:
            raise ValueError(f"data.{key} is {data.get(key)}, but the model has {own[key]}")
    return data


def chosen(own: Config, words: Sequence[str], config_dir: Path | None) -> Config:
    """Return the data that a word chooses, with what the model learned of its own data."""
    choices = [word.partition("=")[2] for word in words if word.startswith("data=")]
    learned = {key: own[key] for key in LEARNED if own.get(key) is not None}
    changes = [word for word in words if not word.startswith("data=")]
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    with initialize_config_dir(str(folder_of("conf")), version_base="1.3"):
        base = {"defaults": [{"data": choices[-1]}, "_self_"], "data": learned}
        ConfigStore.instance().store(BASE, base)
        return as_plain(compose(BASE, overrides=[*changes, *search]))["data"]


def changed(own: Config, words: Sequence[str]) -> Config:
    """Return the run's own data with the changes of the words.

    A saved configuration has no references. So a key of ``train`` and ``test`` that had the value
    of the same key above, such as ``root``, follows it.
    """
    config: DictConfig = OmegaConf.create({"data": own})
    for override in OverridesParser.create().parse_overrides(list(words)):
        change(config, own, override)
    return as_plain(config)["data"]


def change(config: DictConfig, own: Config, override: Override) -> None:
    """Apply one word to the data of a run."""
    key = override.key_or_group
    name, *deeper = key.removeprefix("data.").split(".")
    if name not in own:
        raise ValueError(f"the data of the run have no {key}; {near(name, own)}")
    if override.is_sweep_override():
        raise ValueError(f"{override.input_line}: give one value")
    OmegaConf.update(config, key, override.value(), force_add=True)
    for part in ("train", "test"):
        section = own.get(part)
        follows = isinstance(section, Mapping) and section.get(name, ...) == own[name]
        if follows and not deeper:
            OmegaConf.update(config, f"data.{part}.{name}", override.value())


def test_loader(saved: Saved, data: Config, allow: Collection[str], own: bool) -> DataLoader:
    """Return the loader of the test split of ``data``, and of nothing else where that is possible.

    Whether they are the model's ``own`` data decides where the names of its classes come from.
    """
    if data.get(TARGET) != IMAGES:
        return all_splits(saved, data, allow).test
    workers = workers_of(saved)
    test = build_saved(data["test"], "data.test", allow)
    classes: Sequence[str] = saved.classes
    if not classes and own:
        classes = classes_of(build_saved(data["train"], "data.train", allow))
    if not classes and classes_of(test):
        warn("the names of the model's classes are not known: labels go by their numbers")
    return build_test(**{**data, "test": test, "classes": classes, "workers": workers})


def validation_loader(
    found: Opened, words: Sequence[str], allow: Collection[str] = ()
) -> DataLoader | None:
    """Return the loader of the validation split of the run's own data; None if it names none.

    ``words`` are those that it was ``opened`` with. Those that choose other data are left aside,
    and those that would hold other images out than the run did.
    """
    saved = found.saved
    own = saved.config.get("data") or {}
    if TARGET not in own:
        return None
    cut = {key: own[key] for key in ("val_fraction", "train_size") if key in own}
    data = own if is_chosen(words) else {**found.data, **cut}
    if data.get(TARGET) != IMAGES:
        return all_splits(saved, data, allow).val
    train = build_saved(data["train"], "data.train", allow)
    return build_val(**{**data, "train": train, "workers": workers_of(saved)})


def all_splits(saved: Saved, data: Config, allow: Collection[str]) -> Data:
    """Return the data that are no images in folders or arrays, as the run built them."""
    check_saved(data, "data", allow)
    seed = saved.config.get("seed", 0)
    options = {"workers": workers_of(saved), "pin_memory": False, "rank": 0, "world_size": 1}
    return build(data, seed=seed, **options)


def workers_of(saved: Saved) -> int:
    """Return how many processes loaded the images of the run."""
    return (saved.config.get("system") or {}).get("workers", 0)


@torch.no_grad()
def check_fits(model: nn.Module, loader: DataLoader) -> None:
    """Raise ValueError unless the model takes the inputs."""
    inputs, _ = loader.dataset[torch.zeros(1, dtype=torch.long), None]
    device = next(model.parameters()).device
    try:
        with eval_mode(model):
            model(inputs.to(device))
    except (RuntimeError, AssertionError, IndexError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        shape = " x ".join(map(str, inputs.shape[1:]))
        raise ValueError(f"the model does not take inputs of {shape}: {said}") from error
