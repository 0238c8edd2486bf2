"""Load a saved model, whatever form it was saved in, without trusting its files."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from switchlora.adapters import merge
from switchlora.config import Config, build_saved, without_start
from switchlora.models import RESIDUAL, converted, read_file
from switchlora.storage.checkpoint import STATE, read, rebuild
from switchlora.storage.export import ADAPTER, ADAPTER_CONFIG
from switchlora.storage.hub import HUB_CONFIG
from switchlora.storage.peft import load_adapter
from switchlora.storage.reading import FileDamaged, content_of, parse_json
from switchlora.storage.records import read_config
from switchlora.storage.retention import find_all
from switchlora.storage.runlog import CONFIG
from switchlora.storage.tensors import check_weights
from switchlora.storage.timm_config import classes_in, config_of_timm

MERGED = ("model.safetensors", "pytorch_model.bin")
FORMS = (
    f"a run folder, a checkpoint, {MERGED[0]}, an adapter beside its {RESIDUAL}, or a folder with "
    f"{HUB_CONFIG} of timm"
)


@dataclass(frozen=True)
class Saved:
    """A saved model, and what its files say of it."""

    model: nn.Module
    config: Config
    """the run's configuration; of ``config.json`` alone, ``model`` and a part of ``data``"""
    source: Path
    """what the weights were read from"""
    classes: tuple[str, ...]
    """names of the classes, if they are known"""
    adapted: bool
    """whether the model has adapters, or had them before they were merged"""


def load_saved(path: Path | str, allow: Collection[str] = ()) -> Saved:
    """Return the model of a run folder, a checkpoint, a file of merged weights, or an adapter.

    ``config.yaml`` of the run, or ``config.json`` of timm, says what to build. ValueError, with
    the path, for what holds no model, half of one or another one. ValueError also for a class or
    function that is no part of this program, unless ``allow`` has its name.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder; give {FORMS}")
    if path.name == STATE:
        path = path.parent
    if path.is_file():
        is_adapter = (path.parent / ADAPTER_CONFIG).is_file()
        return _adapter(path.parent, allow) if is_adapter else _merged(path, allow)
    if (path / STATE).is_file():
        return _checkpoint(path, allow)
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter(path, allow)
    for name in MERGED:
        if (path / name).is_file():
            return _merged(path / name, allow)
    checkpoints = find_all(path)
    if not checkpoints:
        raise ValueError(f"{path} holds no model; give {FORMS}")
    return _checkpoint(checkpoints[0], allow)


def _checkpoint(path: Path, allow: Collection[str]) -> Saved:
    state = read(path)
    model = rebuild(path, state, allow)
    classes = _classes(path.parent.parent)
    return Saved(model, state["config"], path, classes, bool(state["adapters"]))


def _merged(path: Path, allow: Collection[str]) -> Saved:
    config, folder = _description(path.parent)
    try:
        weights = read_file(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    model = _model(config, folder, weights, path, allow)
    return Saved(model, config, path, _classes(folder), (folder / "adapter").is_dir())


def _adapter(folder: Path, allow: Collection[str]) -> Saved:
    config, described = _description(folder, folder.parent)
    if not (folder / RESIDUAL).is_file():
        raise ValueError(
            f"{folder / RESIDUAL} is missing: an adapter needs {ADAPTER} and its base model"
        )
    model = _built(config, described, allow)
    merge(load_adapter(model, folder))
    return Saved(model.eval(), config, folder, _classes(described), adapted=True)


def _description(*folders: Path) -> tuple[Config, Path]:
    """Return what says which model to build, and the folder in which it stands."""
    for folder in folders:
        if (folder / CONFIG).is_file():
            return read_config(folder), folder
        if (folder / HUB_CONFIG).is_file():
            path = folder / HUB_CONFIG
            return config_of_timm(parse_json(content_of(path), path), path), folder
    raise ValueError(
        f"{folders[0]} does not say which model its weights belong to: put {CONFIG} of the run, "
        f"or {HUB_CONFIG} of timm, beside them"
    )


def _classes(folder: Path) -> tuple[str, ...]:
    """Return the names of classes that ``config.json`` in a folder holds, if there are any."""
    path = folder / HUB_CONFIG
    if not path.is_file():
        return ()
    with suppress(FileDamaged):  # a file of somebody else's
        return classes_in(parse_json(content_of(path), path))
    return ()


def _model(
    config: Config,
    folder: Path,
    weights: Mapping[str, Tensor],
    source: Path,
    allow: Collection[str],
) -> nn.Module:
    """Build the model that ``config`` of a folder describes, with exactly these weights."""
    model = _built(config, folder, allow)
    try:
        weights = _with_names_of(model, weights)
        check_weights(model, weights)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{source} is no model as the configuration in {folder} describes it: {error.args[0]}"
        ) from error
    model.load_state_dict(weights)
    return model.eval()


def _built(config: Config, folder: Path, allow: Collection[str]) -> nn.Module:
    """Build the model that ``config`` of a folder describes."""
    described = config.get("model")
    if not isinstance(described, Mapping):
        raise FileDamaged(f"{folder / CONFIG} is damaged: it has no 'model'")
    return build_saved(without_start(described), f"{folder}: model", allow)


def _with_names_of(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the weights as timm converts them for ``model``, if they have other names."""
    if weights.keys() == model.state_dict().keys():
        return weights
    try:
        return converted(weights, model)
    except Exception:  # whatever a filter raises on the weights of another model
        return weights
