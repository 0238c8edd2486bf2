"""Out-of-distribution detection: do images of another data set look less certain?"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor

from switchlora.analysis.card.intervals import Interval, ends
from switchlora.analysis.card.sources import Source
from switchlora.analysis.evaluate import chosen
from switchlora.analysis.figures import run_labels
from switchlora.config import TARGET, build_saved
from switchlora.data import Split
from switchlora.process import checked

IMAGES = 2000
"""images of each data set, at most"""
RESAMPLES = 200
MODES = {1: "L", 3: "RGB"}
Found = dict[str, Any]


def measure_ood(
    source: Source,
    against: Sequence[Source],
    words: Sequence[str],
    config_dir: Path | None,
    allow: Collection[str],
) -> Found:
    """Return the AUROC of telling test images from those of the data that the ``words`` name.

    Two scores are taken: the largest probability, and the energy (Liu et al. 2020), the log of the
    sum of the exponentials of the logits. 0.5 is a guess, 1 tells all apart.
    """
    if not words:
        return {"left_out": "left out: give --ood data=NAME"}
    why_not = source.why_no_images()
    channels = source.opened.data.get("in_chans")
    if why_not is None and channels not in MODES:
        why_not = f"left out: images of {channels} channels"
    if why_not:
        return {"left_out": why_not}
    images = foreign_images(source, words, config_dir, allow)
    found: Found = {"data": " ".join(words), "images": len(images), **aurocs(source, images)}
    found["against"] = []
    for label, other in zip(run_labels([each.path for each in against]), against, strict=True):
        if sees_same(source, other):
            found["against"].append({"name": label, **aurocs(other, images)})
    return found


def sees_same(source: Source, other: Source) -> bool:
    """Return whether both take images of the same size and channels."""
    keys = ("image_size", "in_chans")
    return all(source.opened.data.get(key) == other.opened.data.get(key) for key in keys)


def foreign_images(
    source: Source, words: Sequence[str], config_dir: Path | None, allow: Collection[str]
) -> Tensor:
    """Return test images of other data in bytes, in the model's size and channels."""
    data = foreign_data(words, config_dir, allow)
    dataset = build_saved(data["test"], "--ood: data.test", allow)
    rows = torch.arange(len(dataset))
    if len(rows) > IMAGES:
        rows = torch.arange(IMAGES) * len(rows) // IMAGES
    if len(rows) < 2:
        raise ValueError(f"--ood {words[0]}: it has {len(rows)} images: at least 2 are needed")
    split = Split("test", dataset, rows, channels=data["in_chans"])
    split.pictures = True
    mode, size = MODES[source.opened.data["in_chans"]], source.opened.data["image_size"]
    pixels = []
    for place in range(len(split)):
        picture, _ = split.read(place)
        assert isinstance(picture, Image.Image)
        fitted = picture.convert(mode).resize((size, size), Image.Resampling.BILINEAR)
        pixels.append(np.asarray(fitted).reshape(size, size, -1))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def foreign_data(
    words: Sequence[str], config_dir: Path | None, allow: Collection[str]
) -> Mapping[str, Any]:
    """Return the configuration of other data; their classes are not read."""
    for word in words:
        if not word.startswith(("data=", "data.", "+data.")):
            raise ValueError(f"--ood {word}: write data=NAME, then data.KEY=VALUE")
    if not any(word.startswith("data=") for word in words):
        raise ValueError(f"--ood {words[0]}: name the other data by data=NAME")
    places = ["--config-dir", str(config_dir)] if config_dir else []
    words = checked([*places, *words])[len(places) :]
    data = chosen({"num_classes": 1}, words, config_dir)
    if TARGET not in (data.get("test") or {}) or "image_size" not in data:
        raise ValueError(f"--ood {words[0]}: these are no images")
    return data


def aurocs(source: Source, foreign: Tensor) -> Found:
    """Return the AUROC of both scores, with their intervals."""
    known = source.test.logits
    if len(known) > IMAGES:
        known = known[torch.arange(IMAGES) * len(known) // IMAGES]
    other = source.predict(foreign)
    found = {}
    for name, score in SCORES.items():
        found[name] = auroc(score(known), score(other)).plain()
    return found


def max_softmax(logits: Tensor) -> np.ndarray:
    """Return the largest probability of each input."""
    return logits.double().softmax(1).amax(1).numpy()


def energy(logits: Tensor) -> np.ndarray:
    """Return the negative energy of each input, at temperature 1."""
    return logits.double().logsumexp(1).numpy()


SCORES = {"max_softmax": max_softmax, "energy": energy}


def auroc(known: np.ndarray, other: np.ndarray) -> Interval:
    """Return the AUROC of scores that are to be higher for what is known, with its interval."""
    low, high = ends((known, other), area, vectorized=False, resamples=RESAMPLES)
    return Interval(area(known, other), low, high)


def area(known: np.ndarray, other: np.ndarray) -> float:
    """Return the share of pairs in which the known one scores higher; ties count one half."""
    ranks = rankdata(np.concatenate([known, other]))[: len(known)].sum()
    return float((ranks - len(known) * (len(known) + 1) / 2) / (len(known) * len(other)))
