"""Read the items of one split: the one place where an image is read, named, checked, left out."""

import errno
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, MNIST, DatasetFolder
from torchvision.datasets.folder import default_loader

from switchlora.data.pixels import as_picture, check_channels, check_range_is_known, standard
from switchlora.errors import DataUnusable, UnreadableImage
from switchlora.process import is_primary, say

IGNORED = -100
"""torch's label of what no loss and no metric counts"""
TRIES = 100
"""images in a row that may be unreadable"""
NO_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""errors of the machine, not of a file"""
DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
"""what Pillow raises for files that it cannot decode"""
WAY_OUT = "repair or remove it, or leave it out by data.skip_unreadable=true"
FILE_LISTS = ("samples", "_samples", "imgs", "_image_files", "_images")
"""where the data sets of torchvision keep paths, or pairs that begin with one"""
SIZES, CONTENTS, ITEMS = 20_000, 200, 32
"""how many files of a split a digest knows by size and by content; how many items without files"""


@dataclass(frozen=True)
class Names:
    """What a user can find the images of a split by: the split, and a file or a number."""

    split: str
    rows: Tensor = field(repr=False)
    files: Sequence[str] | None = field(repr=False)
    """the file of each row of the data set; None if it does not tell them"""
    kind: str
    """the class of the data set"""

    def of(self, place: int) -> str:
        """Return the name of the image in a place of the split."""
        row = int(self.rows[place])
        if self.files is not None:
            return f"{self.split} image {self.files[row]}"
        return f"{self.split} image, item {row} of {self.kind}"


class Split:
    """The ``rows`` of a data set of (image, class) that training, validation or test uses.

    ``name`` is 'train', 'val' or 'test'. Images have ``channels`` channels of 8 bits. ``numbers``
    maps the data set's class numbers to those of training (None: they are the same). With
    ``skip_unreadable`` another image stands for one that cannot be read, and evaluation does not
    count it.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        rows: Tensor,
        channels: int,
        num_classes: int | None = None,
        numbers: Mapping[int, int] | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.rows = rows
        self.channels = channels
        self.num_classes = num_classes
        self.numbers = numbers
        self.skips = skip_unreadable
        self.pictures = False
        """whether arrays become PIL images"""
        self.unreadable = torch.zeros(len(rows), dtype=torch.bool)
        if skip_unreadable:
            self.unreadable.share_memory_()  # workers mark what they could not read
        self.files = files_of(dataset)
        self.names = Names(name, rows, self.files, type(dataset).__name__)
        self.arrays = None
        if in_arrays(dataset):
            self.arrays = np.asarray(dataset.data), np.asarray(dataset.targets)
        if isinstance(dataset, DatasetFolder) and dataset.loader is default_loader:
            dataset.loader = open_image  # torchvision's own clips 16 bits

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, place: int) -> tuple[Image.Image | np.ndarray, int]:
        """Return image and class of the ``place``-th row, as ``standard`` makes them.

        With ``skip_unreadable`` the next readable one is returned. Outside of training its class
        is IGNORED then. DataUnusable for an image that cannot be read, and for a label that is no
        class.
        """
        if not self.skips:
            return self.read_once(place)
        for other in range(place, place + TRIES):
            try:
                image, label = self.read_once(other % len(self))
            except UnreadableImage as error:
                self.unreadable[other % len(self)] = True
                last = error
                continue
            counts = other == place or self.name == "train"
            return image, label if counts else IGNORED
        raise DataUnusable(f"{TRIES} images in a row cannot be read; the last is {last}")

    def read_once(self, place: int) -> tuple[Image.Image | np.ndarray, int]:
        """Return image and class of this very row; UnreadableImage where it cannot be read."""
        try:
            item, label = self._item(int(self.rows[place]))
            image = standard(item, self.channels)
            if self.pictures:
                image = as_picture(image, self.channels)
        except DataUnusable:
            raise
        except DAMAGE as error:
            if getattr(error, "errno", None) in NO_DAMAGE:
                raise
            raise UnreadableImage(self.complaint(place, error)) from error
        return image, self._class(label, place)

    def _item(self, row: int) -> tuple[Any, Any]:
        if self.arrays is not None:
            images, labels = self.arrays
            return images[row], labels[row]
        return self.dataset[row]

    def _class(self, label: Any, place: int) -> int:
        """Return the number of a class; DataUnusable for what is none."""
        try:
            number = int(label)
            is_whole = bool(number == label)
        except (TypeError, ValueError, RuntimeError):
            is_whole = False
        if not is_whole:
            raise DataUnusable(f"{self.name_of(place)}: its label is {label!r}, no class number")
        if self.numbers is not None:
            number = self.numbers.get(number, number)
        if self.num_classes is not None and not 0 <= number < self.num_classes:
            raise DataUnusable(
                f"{self.name_of(place)}: its label is {number}{self._called(int(label))}, but "
                f"data.num_classes={self.num_classes} allows 0 to {self.num_classes - 1}"
            )
        return number

    def _called(self, number: int) -> str:
        classes = classes_of(self.dataset)
        return f" ('{classes[number]}')" if 0 <= number < len(classes) else ""

    def complaint(self, place: int, error: Exception | str) -> str:
        """Return a line on an image that cannot be used: which one, why, and what to do."""
        said = str(error).strip() or type(error).__name__
        return f"{self.name_of(place)}: {' '.join(said.split())}; {WAY_OUT}"

    def name_of(self, place: int) -> str:
        """Return what a user can find an image by: the split, and its file or its number."""
        return self.names.of(place)

    def skipped(self) -> list[str]:
        """Return the names of the images that could not be read so far."""
        return [self.name_of(place) for place in self.unreadable.nonzero().flatten().tolist()]

    def check_labels(self) -> None:
        """Raise ValueError if a label that is known without reading images is no class number."""
        labels = self.known_labels()
        if labels is None or self.num_classes is None:
            return
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= self.num_classes:
            worst = lowest if lowest < 0 else highest
            raise ValueError(
                f"{self.name} labels run from {lowest} to {highest}{self._called(worst)}, but "
                f"data.num_classes={self.num_classes} allows 0 to {self.num_classes - 1}"
            )
        named = len(classes_of(self.dataset))
        if self.name == "train" and 0 < named < self.num_classes and is_primary():
            say(f"warning: data.num_classes={self.num_classes}, but the data have {named} classes")

    def known_labels(self) -> Tensor | None:
        """Return the class number of every row; None if reading images alone tells them.

        None too where the numbers are not those of training: see ``labels``.
        """
        return self._own_labels() if self.numbers is None else None

    def labels(self) -> list[int] | None:
        """Return the class number in training of every row; None if images alone tell them."""
        own = self._own_labels()
        if own is None:
            return None
        numbers = self.numbers or {}
        return [numbers.get(label, label) for label in own.tolist()]

    def _own_labels(self) -> Tensor | None:
        known = getattr(self.dataset, "targets", None)
        if known is None or getattr(self.dataset, "target_transform", None) is not None:
            return None
        try:
            labels = torch.as_tensor(known)[self.rows]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return None
        return labels if labels.ndim == 1 else None

    def check_headers(self, most: int | None = None) -> None:
        """Raise UnreadableImage for a file whose header cannot be read or used.

        ``most`` limits how many files are opened, evenly over the split.
        """
        ours = getattr(self.dataset, "loader", None) is open_image
        if self.files is None or self.skips or not ours:
            return
        places = evenly(len(self), most)
        paths = [str(self.files[int(self.rows[place])]) for place in places]
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda path: header_problem(path, self.channels), paths)
            for place, problem in zip(places, found, strict=True):
                if problem:
                    raise UnreadableImage(self.complaint(place, problem))

    def digest_parts(self) -> Iterable[bytes]:
        """Yield what a digest of the split is made of, without its place on the disk.

        These are rows and labels; of files also names, sizes of up to ``SIZES`` and contents of up
        to ``CONTENTS``; else arrays, or pixels of up to ``ITEMS``.
        """
        yield self.rows.numpy().tobytes()
        labels = self.known_labels()
        if labels is not None:
            yield labels.numpy().tobytes()
        pixels = array_of(self.dataset)
        if self.files is not None:
            yield from self._of_files(self.files)
        elif pixels is not None:
            yield pixels.tobytes()
        else:
            for place in evenly(len(self), ITEMS):
                image, label = self.read(place)
                yield np.asarray(image).tobytes() + b"%d" % label

    def _of_files(self, files: Sequence[str]) -> Iterable[bytes]:
        used = [files[row] for row in self.rows.tolist()]
        above = len(os.path.commonprefix(used))
        yield "\0".join(path[above:] for path in used).encode(errors="surrogateescape")
        for place in evenly(len(used), SIZES):
            yield b"%d," % size_of(used[place])
        for place in evenly(len(used), CONTENTS):
            yield content_of(used[place])


def open_image(path: str) -> Image.Image:
    """Return the image of a file, decoded and in its own mode; OSError if it is damaged."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            image.load()
            return image
    except OSError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise OSError(str(error) or type(error).__name__) from error


def header_problem(path: str, channels: int) -> str | None:
    """Return why the header of an image file cannot be used, or None."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            check_range_is_known(image)
            check_channels(image, channels)
    except Exception as error:  # see open_image
        return str(error) or type(error).__name__
    return None


def files_of(dataset: Dataset) -> list[str] | None:
    """Return the path of each item's file, or None if the data set does not tell it."""
    for name in FILE_LISTS:
        entries = getattr(dataset, name, None)
        if not isinstance(entries, list) or not entries:
            continue
        paths = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
        if all(isinstance(path, str | os.PathLike) for path in paths):
            return [os.fspath(path) for path in paths]
    return None


def classes_of(dataset: Dataset) -> list[str]:
    """Return the names of a data set's classes, [] if it does not know them."""
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def array_of(dataset: Dataset) -> np.ndarray | None:
    """Return all images of a data set that keeps them in one array of numbers."""
    data = getattr(dataset, "data", None)
    if not isinstance(data, np.ndarray | Tensor):
        return None
    array = np.asarray(data)
    return None if array.dtype.hasobject else array


def in_arrays(dataset: Dataset) -> TypeGuard[MNIST | CIFAR10]:
    """Return whether all images lie in arrays, and are given out as they are."""
    if not isinstance(dataset, MNIST | CIFAR10) or dataset.transforms is not None:
        return False
    return type(dataset).__getitem__ in (MNIST.__getitem__, CIFAR10.__getitem__)


def evenly(size: int, most: int | None) -> list[int]:
    """Return up to ``most`` of the places below ``size``, evenly spread (None: all of them).

    >>> evenly(10, 3)
    [0, 3, 6]
    """
    if most is None or size <= most:
        return list(range(size))
    return [place * size // most for place in range(most)]


def size_of(path: str) -> int:
    """Return the size of a file in bytes, -1 if it cannot be told."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def content_of(path: str) -> bytes:
    """Return the bytes of a file, none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
