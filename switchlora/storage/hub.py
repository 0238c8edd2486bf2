"""Make a run folder a layout of the Hugging Face hub: config.json for timm, and a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from scipy.stats import binomtest
from torch import nn

from switchlora import __version__
from switchlora.config import STARTS, TARGET, Config, leaves
from switchlora.storage.files import write_whole

HUB_CONFIG, CARD = "config.json", "README.md"
BUILDER = "switchlora.models.create_model"
VERSION = "switchlora_version"
"""key of config.json that says who wrote it"""
MARK = "<!-- Written by switchlora at the end of a run. Remove this line to keep your changes. -->"
OF_TIMM = ("first_conv", "classifier", "fixed_input_size")
"""what timm knows of the architecture and needs to load other heads and channels"""
IMAGE_KEYS = ("in_chans", "image_size", "mean", "std")
CONVERTED = (1, 3)
"""channels between which every version of timm converts a first convolution"""
IMAGE_TASK = "image-classification"
AS_THEY_ARE = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
DEFAULTS = {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}
"""of timm.data.create_transform"""


def save_hub_layout(
    folder: Path | str,
    model: nn.Module,
    config: Config,
    classes: Sequence[str],
    summary: Mapping[str, Any],
) -> list[str]:
    """Write ``config.json`` and ``README.md`` beside ``model.safetensors``.

    ``classes`` are the names of the classes, if they are known. A model that timm cannot build
    gets no ``config.json``; its card says why. A file that this program did not write stays as it
    is. Return a line for each of these.
    """
    folder = Path(folder)
    why_not = not_for_timm(model, config)
    has_adapter = (folder / "adapter").is_dir()
    texts = {CARD: model_card(model, config, summary, why_not, has_adapter)}
    if why_not is None:
        texts[HUB_CONFIG] = json.dumps(hub_config(model, config, classes), indent=2) + "\n"
    lines = []
    for name, text in texts.items():
        if is_ours(folder / name):
            write_whole(folder / name, text)
        else:
            lines.append(f"{name} was there and is left as it is: no other is written")
    return lines


def is_ours(path: Path) -> bool:
    """Return whether this program wrote a file, or there is none."""
    if not path.exists():
        return True
    marks = (MARK.encode(), f'"{VERSION}"'.encode())
    content = path.read_bytes() if path.is_file() else b""
    return any(mark in content for mark in marks)


def not_for_timm(model: nn.Module, config: Config) -> str | None:
    """Return why timm cannot build the model by itself, or None if it can."""
    builder = config["model"].get(TARGET)
    if builder != BUILDER:
        return f"{builder} builds it"
    if not type(model).__module__.startswith("timm."):
        return f"its class is {type(model).__module__}.{type(model).__name__}"
    if any(TARGET in key for key, _ in leaves(model_args(model))):
        return "its options are more than plain values"
    missing = [key for key in IMAGE_KEYS if key not in config["data"]]
    if missing:
        return f"data.{missing[0]} is not known"
    return None


def hub_config(model: Any, config: Config, classes: Sequence[str]) -> dict[str, Any]:
    """Return the content of ``config.json``, in timm's own form."""
    data = config["data"]
    found: dict[str, Any] = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
    }
    if len(classes) == model.num_classes:
        found["label_names"] = list(classes)
    found["model_args"] = model_args(model)
    found["pretrained_cfg"] = {
        **traits(model, data["in_chans"]),
        "num_classes": model.num_classes,
        "input_size": [data["in_chans"], data["image_size"], data["image_size"]],
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        **preprocessing(data),
    }
    return {**found, VERSION: __version__}


def model_args(model: Any) -> dict[str, Any]:
    """Return the options that timm builds the model with, besides name and classes.

    A model of a fixed size that was given none has the size that timm took by itself.
    """
    left_out = (*STARTS, "num_classes")
    known = model.pretrained_cfg
    args = {}
    if known.get("fixed_input_size"):
        args["img_size"] = known["input_size"][-1]
    for key, value in model.timm_options.items():
        if key not in left_out and value is not None:
            args[key] = value
    return args


def traits(model: Any, in_chans: int) -> dict[str, Any]:
    """Return what timm knows of the architecture.

    An older timm would draw the first convolution anew for channels that it cannot convert.
    """
    found = {}
    for key in OF_TIMM:
        converts = key != "first_conv" or in_chans in CONVERTED
        if converts and model.pretrained_cfg.get(key):
            found[key] = model.pretrained_cfg[key]
    return found


def preprocessing(data: Config) -> dict[str, Any]:
    """Return how images are resized and cropped before evaluation."""
    options = data.get("eval_transform")
    if options is None and data.get("train_transform") is None:
        return AS_THEY_ARE
    given = {key: value for key, value in (options or {}).items() if key in DEFAULTS and value}
    return {**DEFAULTS, **given}


def model_card(
    model: nn.Module,
    config: Config,
    summary: Mapping[str, Any],
    why_not: str | None,
    has_adapter: bool,
) -> str:
    """Return the model card: metadata of the hub, then what the run knows of its model."""
    name = config["model"].get("name") or type(model).__name__
    paragraphs = [
        f"---\n{metadata(name, config, summary, why_not)}---\n{MARK}",
        f"# {name} on {name_of_data(config['data'])}",
        introduction(summary),
        "## Intended use",
        intended_use(config["data"]),
        "## Results",
        results(summary),
        evaluation(config["data"], summary),
        "## Limits",
        LIMITS,
        "## Training",
        listed(facts(config, summary)),
        "## Cost",
        cost(summary),
        "## Provenance",
        listed(provenance(config, summary)),
        "## Use",
        use(config, why_not),
    ]
    if has_adapter:
        paragraphs.append(
            "`adapter/` holds the adapter alone, for PEFT, and `residual.safetensors`, the model "
            "that it belongs on."
        )
    return "\n\n".join(paragraphs) + "\n"


def metadata(name: str, config: Config, summary: Mapping[str, Any], why_not: str | None) -> str:
    """Return the metadata of a model card as YAML."""
    on_images = "image_size" in config["data"]
    top1 = (summary["test"] or {}).get("top1")
    results = None
    if on_images and top1 is not None:
        data = name_of_data(config["data"])
        result = EvalResult(
            task_type=IMAGE_TASK,
            dataset_type=data,
            dataset_name=data,
            dataset_split="test",
            metric_type="accuracy",
            metric_value=round(top1 / 100, 6),
        )
        results = [result]
    content = ModelCardData(
        model_name=name if results else None,
        eval_results=results,
        library_name="timm" if why_not is None else None,
        pipeline_tag=IMAGE_TASK if on_images else None,
        tags=["switchlora", *([IMAGE_TASK] if on_images else [])],
        metrics=["accuracy"],
    )
    return f"{content.to_yaml()}\n"


def intended_use(data: Config) -> str:
    """Return what the model is for, and what it is not for."""
    what = "Continuing text, byte by byte,"
    if "image_size" in data:
        what = f"Telling {data['num_classes']} classes of images apart,"
    return (
        f"{what} on inputs like those of {name_of_data(data)}. It was trained to study how it "
        "trains. It is not meant to decide about people, nor for inputs of another kind."
    )


LIMITS = (
    "The numbers above are of one run and one test split. They do not say how the model does on "
    "groups of inputs, on damaged images, or on inputs of another kind, nor whether its "
    "probabilities can be trusted. What a low-rank adapter changes besides accuracy is not in "
    "them either. `switchlora-runs card RUN --against FULL` measures all of these."
)


def evaluation(data: Config, summary: Mapping[str, Any]) -> str:
    """Return a sentence on the test split, with the interval of its top1."""
    count = (summary.get("images") or {}).get("test")
    top1 = (summary["test"] or {}).get("top1")
    if not count or top1 is None:
        return "There is no result on a test split."
    if "image_size" not in data:
        return f"The test split has {count:,} windows. No decision of the run is based on it."
    right = round(count * top1 / 100)
    found = binomtest(right, count).proportion_ci(method="wilson")
    return (
        f"The test split has {count:,} images: the 95 % interval of its top1 is "
        f"{100 * found.low:.2f} to {100 * found.high:.2f} % (Wilson). No decision of the run is "
        "based on it."
    )


def cost(summary: Mapping[str, Any]) -> str:
    """Return what training cost; energy is not measured, so it is not told."""
    flops = (summary.get("cost") or {}).get("train_flops")
    told = "FLOPs of training are not known." if flops is None else f"{flops:.3g} training FLOPs."
    return f"{told} Energy was not measured, and is not guessed here."


def provenance(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """Return what made the model, a line each; no path, user or host is told."""
    found = summary.get("environment") or {}
    versions = found.get("versions") or {}
    lines = [
        f"Commit: {found.get('git') or 'not known'}",
        f"Seed: {config['seed']}; `config.yaml` of the run holds every setting",
        f"Device: {found.get('device', 'not known')}",
    ]
    if versions:
        told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        lines.append(f"Versions: {told}")
    return lines


def listed(lines: Sequence[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {on_one_line(line)}" for line in lines)


def introduction(summary: Mapping[str, Any]) -> str:
    """Return a sentence on what the model is."""
    how = "in full"
    if summary["switch"]["fired"]:
        how = "in full at first, then as a low-rank adapter, which is merged here"
    return f"Trained {how}, by switchlora {__version__}."


def results(summary: Mapping[str, Any]) -> str:
    """Return a table of the metrics on validation and test."""
    rows = ["| split | loss | top1, % | top5, % |", "|---|---|---|---|"]
    for split in ("val", "test"):
        found = summary[split] or {}
        if "loss" in found:
            top5 = f"{found['top5']:.2f}" if "top5" in found else ""
            rows.append(f"| {split} | {found['loss']:.4f} | {found['top1']:.2f} | {top5} |")
    return "\n".join(rows)


def facts(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """Return what the run knows of its training, a line each."""
    data, switch = config["data"], summary["switch"]
    updates = f"{summary['num_updates']:,} updates of {data['batch_size']}"
    found = [f"Data: {described(data)}"]
    if config.get("init_checkpoint"):
        found.append(f"Start: `{config['init_checkpoint']}`")
    if config.get("init_adapter"):
        found.append(f"Start: the adapter `{config['init_adapter']}`, merged")
    found.append(f"Length: {updates}, seed {config['seed']}, {summary['status']}")
    if switch["fired"]:
        before, after = switch["trainable_before"], switch["trainable_after"]
        found += [
            f"Full phase: {switch['num_updates']:,} updates, {before:,} trained parameters",
            f"Switch: at update {switch['num_updates']:,}, epoch {switch['epoch']:.2f}: "
            f"{switch['reason']}",
            f"Trained parameters after it: {after:,}, {after / switch['parameters']:.1%} of the "
            "model",
        ]
    return found


def described(data: Config) -> str:
    """Return the name of the data and the size of its images; where they lie is not told."""
    name = name_of_data(data)
    if "image_size" not in data:
        return name
    size = f"{data['in_chans']} x {data['image_size']} x {data['image_size']}"
    return f"{name}, {data['num_classes']} classes, images of {size}"


def name_of_data(data: Config) -> str:
    """Return the name of torchvision's data set, or of what builds the data."""
    train = data.get("train") or data
    return train.get("name") or str(train.get(TARGET)).rpartition(".")[2]


def use(config: Config, why_not: str | None) -> str:
    """Return how to load the model."""
    if why_not is None:
        return (
            "```python\nimport timm\n\n"
            'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()\n'
            "settings = timm.data.resolve_model_data_config(model)\n"
            "transform = timm.data.create_transform(**settings)\n```"
        )
    return (
        f"timm cannot build this model by itself: {why_not}. Build it as `config.yaml` says under "
        "`model`, then load its weights:\n\n```python\nfrom safetensors.torch import load_file\n\n"
        'model.load_state_dict(load_file("THIS_FOLDER/model.safetensors"))\n```'
    )


def on_one_line(text: str) -> str:
    """Return a text without line breaks."""
    return " ".join(text.split())
