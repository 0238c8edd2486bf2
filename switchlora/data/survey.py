"""Read all images of the splits once, and keep of each what a report on the data needs."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from switchlora.data.batches import generators_kept, seed_generators
from switchlora.data.contents import (
    PIXELS,
    THREADS,
    Contents,
    channels_first,
    counted,
    of_split,
    pixels_digest,
)
from switchlora.data.duplicates import SIDE
from switchlora.data.pixels import check_range_is_known
from switchlora.data.split import Split
from switchlora.errors import UnreadableImage

ASPECT = 5
"""sides of an image that differ by more than this factor are odd"""
USUAL = {1: ("L",), 2: ("LA",), 3: ("RGB",), 4: ("RGBA", "CMYK")}
"""by channels, the modes of files that need no conversion"""
CHUNK = 4096


@dataclass(frozen=True)
class Described:
    """What is kept of one image."""

    digest: bytes
    """of its pixels, as a run reads them"""
    label: int
    thumbnail: np.ndarray
    """(C, SIDE, SIDE) uint8"""
    mean: np.ndarray
    """of each channel, from 0 to 1"""
    deviation: np.ndarray
    blank: bool
    """whether it has one colour"""


@dataclass(frozen=True)
class Survey:
    """What is known of the images of a split that can be read."""

    split: Split
    places: np.ndarray
    """of the images in the split"""
    digests: Sequence[bytes]
    labels: np.ndarray
    thumbnails: np.ndarray
    means: np.ndarray
    deviations: np.ndarray
    unreadable: Sequence[str]
    """a line on each image that cannot be read"""
    odd: Mapping[str, Sequence[str]]
    """by what is odd, the names of such images"""

    def name(self, item: int) -> str:
        """Return what a user can find the image by that is the ``item``-th readable one."""
        return self.split.name_of(int(self.places[item]))


def survey(split: Split) -> Survey:
    """Return what is known of the images of a split.

    An image that cannot be read is named and left out. DataUnusable for a label that is no class.
    """
    with generators_kept():
        seed_generators(0)
        if split.arrays is not None:
            return of_arrays(split)
        return of_images(split)


def of_images(split: Split) -> Survey:
    """Read images one by one."""
    places, images, unreadable = [], [], []
    for place in range(len(split)):
        try:
            image, label = split.read_once(place)
        except UnreadableImage as error:
            unreadable.append(str(error).rpartition(";")[0])
            continue
        places.append(place)
        images.append(described(channels_first(image, split.channels), label))
    if not images:
        raise UnreadableImage(f"no {split.name} image can be read; the first: {unreadable[0]}")
    return Survey(
        split=split,
        places=np.array(places),
        digests=[image.digest for image in images],
        labels=np.array([image.label for image in images]),
        thumbnails=np.stack([image.thumbnail for image in images]),
        means=np.stack([image.mean for image in images]),
        deviations=np.stack([image.deviation for image in images]),
        unreadable=unreadable,
        odd=odd_images(split, places, images),
    )


def described(pixels: np.ndarray, label: int) -> Described:
    """Return what is kept of an image (C, H, W)."""
    shares = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
    thumbnail = pixels
    if pixels.shape[1:] != (SIDE, SIDE):
        thumbnail = np.stack([thumbnail_of(channel) for channel in pixels])
    return Described(
        digest=pixels_digest(pixels),
        label=label,
        thumbnail=thumbnail,
        mean=shares.mean(1),
        deviation=shares.std(1),
        blank=is_blank(pixels),
    )


def is_blank(pixels: np.ndarray) -> bool:
    """Return whether each channel (C, H, W) has one value."""
    return bool((pixels == pixels[:, :1, :1]).all())


def thumbnail_of(channel: np.ndarray) -> np.ndarray:
    """Return one channel (H, W) in the size of thumbnails."""
    small = Image.fromarray(np.ascontiguousarray(channel)).resize(
        (SIDE, SIDE), Image.Resampling.BILINEAR
    )
    return np.asarray(small)


def of_arrays(split: Split) -> Survey:
    """Read images that lie in an array, many at once."""
    assert split.arrays is not None
    images, _ = split.arrays
    rows = split.rows.numpy()
    digests: list[bytes] = []
    thumbnails, means, deviations = [], [], []
    blank: list[bool] = []
    for first in range(0, len(rows), CHUNK):
        pixels = many_channels_first(images[rows[first : first + CHUNK]], split.channels)
        digests += map(pixels_digest, pixels)
        blank += map(is_blank, pixels)
        shares = torch.from_numpy(pixels).float()
        thumbnails.append(made_small(shares))
        means.append((shares.mean((2, 3)) / 255).numpy())
        deviations.append((shares.std((2, 3), correction=0) / 255).numpy())
    named = [split.name_of(place) for place, found in enumerate(blank) if found]
    return Survey(
        split=split,
        places=np.arange(len(rows)),
        digests=digests,
        labels=np.array(split.labels()),
        thumbnails=np.concatenate(thumbnails),
        means=np.concatenate(means),
        deviations=np.concatenate(deviations),
        unreadable=[],
        odd={"one colour": named} if named else {},
    )


def many_channels_first(images: np.ndarray, channels: int) -> np.ndarray:
    """Return images (n, H, W) or (n, H, W, C) as (n, channels, H, W)."""
    if images.ndim == 3:
        return np.repeat(images[:, np.newaxis], channels, axis=1)
    return np.moveaxis(images, -1, 1).copy()


def hashed(survey: Survey, in_memory: bool) -> Contents:
    """Return the contents of a split with the hash that a run keeps of it.

    A run that keeps images ``in_memory`` hashes their pixels.
    """
    split = survey.split
    if not in_memory:
        return of_split(split)
    return counted(split.name, PIXELS, survey.digests, survey.labels.tolist(), survey.name)


def made_small(pixels: torch.Tensor) -> np.ndarray:
    """Return thumbnails (n, C, SIDE, SIDE) uint8 of pixels from 0 to 255."""
    small = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    return small.round().to(torch.uint8).numpy()


def odd_images(
    split: Split, places: Sequence[int], images: Sequence[Described]
) -> dict[str, list[str]]:
    """Return, by what is odd about them, the names of images that can be read."""
    found: dict[str, list[str]] = defaultdict(list)
    for place, image in zip(places, images, strict=True):
        if image.blank:
            found["one colour"].append(split.name_of(place))
    if split.files is not None:
        paths = [split.files[int(split.rows[place])] for place in places]
        with ThreadPoolExecutor(THREADS) as pool:
            told = pool.map(lambda path: list(oddities(path, split.channels)), paths)
            for place, kinds in zip(places, told, strict=True):
                for kind in kinds:
                    found[kind].append(split.name_of(place))
    return dict(found)


def oddities(path: str, channels: int) -> Iterator[str]:
    """Yield what is odd about a file of an image, by its header."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            check_range_is_known(image)
            width, height = image.size
            if image.mode not in USUAL.get(channels, ()):
                yield f"mode {image.mode}, which is converted"
            if getattr(image, "is_animated", False):
                yield "several frames, of which the first is read"
            if min(width, height) == 1:
                yield "one pixel wide or high"
            elif max(width, height) > ASPECT * min(width, height):
                yield f"sides that differ by a factor above {ASPECT}"
    except (OSError, ValueError):
        return
