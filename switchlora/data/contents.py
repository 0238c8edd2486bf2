"""What splits hold, item by item: digests, labels, names, one hash of each, and what they share.

An item is an image, or a passage of text. The hash of a split does not depend on the order of its
images, on names of files, on the folder or on the machine. One pixel or one label changes it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from switchlora.data.batches import (
    InMemory,
    Transformed,
    digest_of,
    generators_kept,
    seed_generators,
)
from switchlora.data.loaders import Data
from switchlora.data.split import Split, size_of
from switchlora.data.text import Windows
from switchlora.errors import UnreadableImage

SPLITS = ("train", "val", "test")
MOST_FILES = 50_000
"""files of a split that are read to the end at the start of a run"""
MOST_BYTES = 512 * 2**20
"""bytes of the files of a split that are read at the start of a run"""
MOST_ITEMS = 1000
"""images that are decoded at the start of a run, where there are neither files nor arrays"""
MOST_TEXT = 32 * 2**20
"""bytes of a split of text whose passages are compared at the start of a run"""
PASSAGE = 5
"""lines of a passage of text; empty ones do not count"""
THREADS = 8
PIXELS, FILES, TEXT, SAMPLE = "pixels", "files", "text", "sample"
"""what a hash is made of: see ``Contents.of``"""


@dataclass(frozen=True)
class Contents:
    """The digests and labels of the items of a split, and a hash of all of it.

    ``of`` says what the hash is made of: the ``pixels`` as a run reads them, the bytes of
    ``files``, the ``text``, or names, sizes and a ``sample`` where all of it would take too long.
    """

    split: str
    of: str
    sha256: str
    digests: Sequence[bytes] = field(default=(), repr=False)
    """of each item, where each is known"""
    labels: Sequence[int] = field(default=(), repr=False)
    name: Callable[[int], str] = field(default=str, repr=False)
    """maps the place of an item to what a user can find it by"""
    known: bool = True
    """whether each item is known, so that splits can be compared"""
    unit: str = "images"


@dataclass(frozen=True)
class Shared:
    """Items of ``split`` that stand in the split ``inside`` too, each with one of its equals."""

    split: str
    inside: str
    pairs: Sequence[tuple[int, int]]
    """places in ``split``, and in ``inside``"""


def contents_of(data: Data, thorough: bool = False) -> list[Contents]:
    """Return the contents of the three splits of a run.

    Where that would take long, only a sample of a split is read, unless it has to be ``thorough``.
    No random number is drawn.
    """
    with generators_kept():
        seed_generators(0)
        return [of_view(*named, thorough) for named in zip(SPLITS, data.views, strict=True)]


def of_view(name: str, view: Any, thorough: bool) -> Contents:
    """Return the contents of the data set of a loader."""
    if isinstance(view, InMemory):
        return of_images(name, view)
    if isinstance(view, Transformed):
        return of_split(view.split, thorough)
    if isinstance(view, Windows):
        return of_text(name, view.text, thorough or view.text.nbytes <= MOST_TEXT)
    return Contents(name, SAMPLE, view.digest(), known=False, unit="items")


def of_images(name: str, view: InMemory) -> Contents:
    """Return the contents of decoded images; those that could not be read are no part of it."""
    places = view.readable.nonzero().flatten().tolist()
    images = view.images.cpu().numpy()
    digests = [pixels_digest(images[place]) for place in places]
    labels = view.targets.cpu()[view.readable].tolist()
    return counted(name, PIXELS, digests, labels, lambda item: view.names.of(places[item]))


def of_split(split: Split, thorough: bool = False) -> Contents:
    """Return the contents of images that are decoded anew for each batch."""
    labels = split.labels()
    if split.files is not None and labels is not None:
        return of_files(split, labels, thorough)
    if thorough or split.arrays is not None or len(split) <= MOST_ITEMS:
        return of_items(split)
    return sampled(split)


def of_files(split: Split, labels: Sequence[int], thorough: bool) -> Contents:
    """Return the contents of files by their bytes, or a sample where these are too many."""
    assert split.files is not None
    paths = [split.files[row] for row in split.rows.tolist()]
    if not thorough and (len(paths) > MOST_FILES or sum(map(size_of, paths)) > MOST_BYTES):
        return sampled(split)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(file_digest, paths))
    return counted(split.name, FILES, digests, labels, split.name_of)


def of_items(split: Split) -> Contents:
    """Return the contents of images by their pixels, which are read one by one."""
    digests, labels, places = [], [], []
    for place in range(len(split)):
        try:
            image, label = split.read_once(place)
        except UnreadableImage:
            if not split.skips:
                raise
            continue
        digests.append(pixels_digest(channels_first(image, split.channels)))
        labels.append(label)
        places.append(place)
    return counted(split.name, PIXELS, digests, labels, lambda item: split.name_of(places[item]))


def sampled(split: Split) -> Contents:
    """Return the hash of what is known of a split at once: see ``Split.digest_parts``."""
    return Contents(split.name, SAMPLE, digest_of(*split.digest_parts()), known=False)


def of_text(name: str, text: Tensor, known: bool = True) -> Contents:
    """Return the passages of a text, each ``PASSAGE`` lines long, one from each line on.

    They are left out unless they are to be ``known``.
    """
    content = text.cpu().numpy().tobytes()
    if not known:
        return Contents(name, TEXT, digest_of(content), known=False, unit="passages")
    lines = [(number, line.strip()) for number, line in enumerate(content.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    digests = []
    for first in range(len(lines) - PASSAGE + 1):
        passage = [line for _, line in lines[first : first + PASSAGE]]
        digests.append(hashlib.sha256(b"\n".join(passage)).digest())
    return Contents(
        name,
        TEXT,
        digest_of(content),
        digests,
        name=lambda item: f"{name} text, from its line {lines[item][0]} on",
        unit="passages",
    )


def counted(
    name: str,
    of: str,
    digests: Sequence[bytes],
    labels: Sequence[int],
    named: Callable[[int], str],
) -> Contents:
    """Return the contents of a split with its hash, which no order of the images changes."""
    items = sorted(digest + b"%d;" % label for digest, label in zip(digests, labels, strict=True))
    return Contents(name, of, digest_of(*items), digests, labels, named)


def pixels_digest(pixels: np.ndarray) -> bytes:
    """Return the SHA-256 of an image (C, H, W) uint8, its shape included."""
    digest = hashlib.sha256(b"%d,%d,%d;" % pixels.shape)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def file_digest(path: str) -> bytes:
    """Return the SHA-256 of the bytes of a file; of its name where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return hashlib.sha256(os.path.basename(path).encode(errors="surrogateescape")).digest()


def channels_first(image: Image.Image | np.ndarray, channels: int) -> np.ndarray:
    """Return the pixels (channels, H, W) of an image; a grey one has each channel alike."""
    pixels = np.asarray(image)
    pixels = pixels[np.newaxis] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    return np.repeat(pixels, channels, axis=0) if len(pixels) == 1 else pixels


def shared_items(contents: Sequence[Contents]) -> list[Shared]:
    """Return what each split shares with those before it: val and test with train, test with val.

    None of it unless each item is known, in the same way in all splits.
    """
    if not comparable(contents):
        return []
    return [matches(later, earlier) for earlier, later in combinations(contents, 2)]


def comparable(contents: Sequence[Contents]) -> bool:
    """Return whether each item of the splits is known, in the same way in all of them."""
    return all(each.known for each in contents) and len({each.of for each in contents}) == 1


def matches(one: Contents, other: Contents) -> Shared:
    """Return the items of ``one`` that stand in ``other`` too."""
    places = first_places(other.digests)
    pairs = []
    for place, digest in enumerate(one.digests):
        if digest in places:
            pairs.append((place, places[digest]))
    return Shared(one.split, other.split, pairs)


def first_places(digests: Iterable[bytes]) -> dict[bytes, int]:
    """Return, by digest, the first place that has it."""
    places: dict[bytes, int] = {}
    for place, digest in enumerate(digests):
        places.setdefault(digest, place)
    return places
