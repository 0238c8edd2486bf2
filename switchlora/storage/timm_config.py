"""Read ``config.json`` of timm: which model it describes, and how that sees images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config

from switchlora.config import TARGET, Config
from switchlora.storage.hub import AS_THEY_ARE, BUILDER
from switchlora.storage.reading import FileDamaged

KNOWN = "pretrained_cfg"


def config_of_timm(content: Mapping[str, Any], path: Path) -> Config:
    """Return the model that a file describes, and what its data have to be, as a run has them.

    FileDamaged for a file that describes no model.
    """
    try:
        known = _known(content)
        seen = resolve_data_config(pretrained_cfg=known)
        channels, height, width = seen["input_size"]
        data = {
            "in_chans": channels,
            "image_size": height,
            "mean": list(seen["mean"]),
            "std": list(seen["std"]),
            "num_classes": {**known, **content}["num_classes"],
        }
        model = {
            **_filled_in(known, dict(content.get("model_args") or {})),
            TARGET: BUILDER,
            "name": content["architecture"],
            "num_classes": data["num_classes"],
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileDamaged(f"{path} does not describe a model of timm ({error})") from error
    if height != width:
        raise ValueError(f"{path}: images of {height} x {width} pixels are not square")
    cropped = {key: seen[key] for key in AS_THEY_ARE}
    if cropped != AS_THEY_ARE:
        data["eval_transform"] = cropped
    return {"model": model, "data": data}


def classes_in(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes by their numbers, if a file has them.

    timm writes a list, or a mapping of numbers where some have no name, which counts as none.
    """
    known = content.get(KNOWN)
    inner = known if isinstance(known, Mapping) else {}
    for names in (content.get("label_names"), inner.get("label_names"), content.get("labels")):
        if isinstance(names, list):
            return tuple(map(str, names))
        if isinstance(names, Mapping) and list(names) == list(map(str, range(len(names)))):
            return tuple(map(str, names.values()))
    return ()


def _known(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm knows of the weights; in older files it stands beside the architecture."""
    return dict(content.get(KNOWN, content))


def _filled_in(known: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a model with those that timm takes from what it knows."""
    size = known.get("input_size")
    if size:
        options.setdefault("in_chans", size[0])
    if size and known.get("fixed_input_size"):
        options.setdefault("img_size", size[-1])
    if known.get("global_pool"):
        options.setdefault("global_pool", known["global_pool"])
    return options
