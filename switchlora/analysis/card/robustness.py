"""Errors on corrupted images, of the model and of the runs that it is compared with."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchlora.analysis.card.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from switchlora.analysis.card.intervals import Interval, resampled_mean
from switchlora.analysis.card.sources import Say, Source
from switchlora.data import IGNORED

Found = dict[str, Any]
Wrong = dict[str, np.ndarray]
"""by corruption, whether each image is classified wrongly: (severities, images)"""


def measure_robustness(source: Source, against: Sequence[Source], count: int, say: Say) -> Found:
    """Return the errors of up to ``count`` test images, evenly taken, at each corruption.

    - ``error`` is in %, of each severity; ``mean`` over all of them, with its interval.
    - ``mce`` is that of Hendrycks and Dietterich: the error as a share of the reference's, in %,
      averaged over the corruptions. 100 is as good as the reference, more is worse.
    - ``difference`` is the difference of the mean errors, in points, paired by image.
    """
    why_not = source.why_no_images()
    if why_not is None and count == 0:
        why_not = "left out: --robustness 0"
    if why_not:
        return {"left_out": why_not}
    images, labels = sample(source, count)
    kinds = [kind for kind in CORRUPTIONS if kind.takes(images.shape[1])]
    same = [other for other in against if other.why_no_images() is None and alike(source, other)]
    wrong = errors([source, *same], images, labels, kinds, say)
    ours, *theirs = wrong
    clean = 100 * float((source.predict(images).argmax(1) != labels).float().mean())
    found: Found = {"images": len(labels), "severities": SEVERITIES, "clean_error": clean}
    found["corruptions"] = curves(ours)
    found["mean"] = resampled_mean(by_image(ours)).scaled(100).plain()
    skipped = [kind.name for kind in CORRUPTIONS if kind not in kinds]
    if skipped:
        found["not_for_these_channels"] = skipped
    if theirs:
        found |= beside(ours, theirs)
    unlike = [str(other.path) for other in against if other not in same]
    if unlike:
        found["not_compared"] = unlike
    return found


def alike(source: Source, other: Source) -> bool:
    """Return whether two models see images of the same size and channels."""
    keys = ("image_size", "in_chans", "eval_transform")
    return all(source.opened.data.get(key) == other.opened.data.get(key) for key in keys)


def sample(source: Source, count: int) -> tuple[Tensor, Tensor]:
    """Return up to ``count`` test images in bytes, evenly taken, and their labels."""
    view: Any = source.opened.loader.dataset
    rows = torch.arange(len(view))
    if len(rows) > count:
        rows = torch.arange(count) * len(rows) // count
    parts = [view[part, None] for part in rows.split(100)]
    images = torch.cat([source.bytes_of(part[0]) for part in parts])
    labels = torch.cat([part[1].cpu() for part in parts])
    return images[labels != IGNORED], labels[labels != IGNORED]


def errors(
    sources: Sequence[Source],
    images: Tensor,
    labels: Tensor,
    kinds: Sequence[Corruption],
    say: Say,
) -> list[Wrong]:
    """Return what each model classifies wrongly. A corruption is made once for all models."""
    found: list[Wrong] = [{} for _ in sources]
    start = time.monotonic()
    for number, kind in enumerate(kinds, 1):
        for severity in range(1, SEVERITIES + 1):
            corrupted = kind(images, severity)
            for source, wrong in zip(sources, found, strict=True):
                missed = (source.predict(corrupted).argmax(1) != labels).numpy()
                wrong.setdefault(kind.name, np.empty((SEVERITIES, len(labels)), bool))
                wrong[kind.name][severity - 1] = missed
        seconds = time.monotonic() - start
        say(f"robustness: {kind.name}, {number} of {len(kinds)}, {seconds:.0f} s")
    return found


def curves(wrong: Wrong) -> list[Found]:
    """Return of each corruption the error in % at each severity, and their mean."""
    found = []
    for name, missed in wrong.items():
        error = (100 * missed.mean(1)).tolist()
        found.append({"corruption": name, "error": error, "mean": float(100 * missed.mean())})
    return found


def by_image(wrong: Wrong) -> np.ndarray:
    """Return the error of each image, over all corruptions and severities."""
    return np.stack(list(wrong.values())).mean((0, 1))


def beside(ours: Wrong, theirs: Sequence[Wrong]) -> Found:
    """Return our errors relative to the mean of theirs."""
    ratios = []
    reference = []
    for name, missed in ours.items():
        there = np.mean([wrong[name].mean(1) for wrong in theirs], axis=0)
        reference.append({"corruption": name, "error": (100 * there).tolist()})
        if there.sum():
            ratios.append(100 * float(missed.mean(1).sum() / there.sum()))
    gap: Interval = resampled_mean(by_image(ours) - np.mean([by_image(w) for w in theirs], axis=0))
    return {
        "reference": reference,
        "mce": float(np.mean(ratios)) if ratios else None,
        "difference": gap.scaled(100).plain(),
    }
