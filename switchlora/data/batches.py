"""Form one batch: its order, its decoding and its augmentation, each a function of a seed.

The sampler gives every image of an epoch an integer of its own, its *draw*. The augmentation of
that image follows from its draw alone. So a batch does not depend on the number of workers, on the
number of processes, or on random numbers drawn before.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from torchvision.datasets import CIFAR10, MNIST

Key = tuple[Tensor, Tensor | None]  # rows of one batch, and their draws when training
Batch = tuple[Tensor, Tensor]  # inputs and targets: images (B, C, H, W) float32 and (B,) int64


class EpochSampler(Sampler[Key]):
    """This process's rows and draws of each batch of ``epoch``, from batch ``start`` on.

    A batch has ``batch_size`` items. Process ``rank`` of ``world_size`` gets an equal, contiguous
    share of them. An incomplete last batch is left out. The length is that of a whole epoch.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.share = rank, batch_size // world_size
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator)
        draws = torch.randint(2**62, (self.size,), generator=generator)
        for batch in range(self.start, len(self)):
            first = batch * self.batch_size + self.rank * self.share
            rows = slice(first, first + self.share)
            yield order[rows], draws[rows]

    def __len__(self) -> int:
        return self.size // self.batch_size


def eval_batches(size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Key]:
    """Return batches of every ``world_size``-th row from ``rank`` on, in order and without draws.

    All ranks get the same number of batches, since a sharded model computes them together.
    ValueError for fewer rows than ranks.
    """
    if size < world_size:
        raise ValueError(f"{size} items cannot be shared by {world_size} processes")
    rows = torch.arange(size)[rank::world_size]
    if world_size == 1:
        return [(part, None) for part in rows.split(batch_size)]
    number = min(math.ceil(size / (world_size * batch_size)), size // world_size)
    return [(part, None) for part in rows.tensor_split(number)]


class InMemory(Dataset[Batch]):
    """Rows of a data set of (PIL image, class), decoded once: N * C * H * W bytes.

    ``shape`` is (C, H, W). ValueError if an image has another one. The key of an item is a whole
    batch. Rows with draws are cropped and flipped, rows without draws are not.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: Tensor,
        shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 0,
        hflip: float = 0.0,
    ) -> None:
        self.images, self.targets = decode(dataset, rows, shape)
        self.mean, self.std = (torch.tensor(list(x)).view(-1, 1, 1) for x in (mean, std))
        self.crop_padding, self.hflip = crop_padding, hflip

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: Key) -> Batch:
        rows, draws = key
        images = self.images[rows]
        if draws is not None:
            images = crop_and_flip(images, draws, self.crop_padding, self.hflip)
        return images.float().div_(255).sub_(self.mean).div_(self.std), self.targets[rows]

    def digest(self) -> str:
        """Return a digest of all pixels and classes."""
        return _digest(self.images.numpy().data, self.targets.numpy().data)


class Transformed(Dataset[Batch]):
    """Rows of a data set of (PIL image, class), decoded and transformed each time.

    The key of an item is a whole batch. A row with a draw is read and transformed with random
    numbers that follow from the draw. ValueError if images do not have ``in_chans`` channels.
    """

    def __init__(
        self, dataset: Dataset, rows: Tensor, in_chans: int, transform: Callable[[Any], Tensor]
    ) -> None:
        self.dataset, self.rows, self.transform = dataset, rows, transform
        channels = len(dataset[int(rows[0])][0].getbands())
        if channels != in_chans:
            raise ValueError(f"images have {channels} channels, but data.in_chans={in_chans}")

    @property
    def targets(self) -> Tensor | None:
        """The class of every row; None if the data set knows it only by decoding images."""
        known = getattr(self.dataset, "targets", None)
        return None if known is None else torch.as_tensor(known)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> Batch:
        rows, draws = key
        with generators_kept():
            items = [
                self.read(row, None if draws is None else int(draws[i]))
                for i, row in enumerate(self.rows[rows].tolist())
            ]
        return torch.stack([image for image, _ in items]), torch.tensor([t for _, t in items])

    def digest(self) -> str:
        """Return a digest of the rows and of what the data set knows without decoding.

        That is pixels, or names and classes.
        """
        known = [getattr(self.dataset, name, None) for name in ("root", "samples", "targets")]
        pixels = np.asarray(getattr(self.dataset, "data", ()))
        return _digest(self.rows.numpy().data, repr(known).encode(), pixels.tobytes())

    def read(self, row: int, draw: int | None) -> tuple[Tensor, int]:
        """Return the transformed image of a row of the data set, and its class."""
        if draw is not None:
            seed_generators(draw)
        image, target = self.dataset[row]
        return self.transform(image), int(target)


class EpochMixup(timm.data.Mixup):
    """timm's Mixup and CutMix, with the n-th call of an epoch a function of (seed, epoch, n).

    Call it once per batch on (images, targets). Targets become (B, num_classes) and sum to one.
    """

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.seed, self.epoch, self.calls = seed, 0, 0

    def __call__(self, images: Tensor, targets: Tensor) -> Batch:
        """Return the images, mixed in place, and soft targets."""
        self.calls += 1
        with generators_kept():
            seed_generators(seed_of(self.seed, self.epoch, self.calls))
            return super().__call__(images, targets)


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def decode(dataset: Dataset, rows: Tensor, shape: tuple[int, int, int]) -> Batch:
    """Return images (N, C, H, W) uint8 and targets (N,) int64 of the given rows.

    ``shape`` is (C, H, W). ValueError for an image of another shape.
    """
    channels, height, width = shape
    images = np.empty((len(rows), height, width, channels), dtype=np.uint8)
    targets = np.empty(len(rows), dtype=np.int64)
    for i, (image, target) in enumerate(items(dataset, rows)):
        pixels = np.asarray(image)
        found = (*pixels.shape, 1)[:3]
        if found != images.shape[1:]:
            raise ValueError(
                f"an image has {found[2]} channels of {found[0]} x {found[1]} pixels, but "
                f"data.in_chans={channels} and data.image_size={height}; change these, or let "
                "data.eval_transform={} resize"
            )
        images[i], targets[i] = pixels.reshape(found), int(target)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(targets)


def items(dataset: Dataset, rows: Tensor) -> Iterable[tuple[Any, Any]]:
    """Return (image, class) of each row.

    For the MNIST and CIFAR families they come from the arrays at once.
    """
    plain = type(dataset).__getitem__ in (MNIST.__getitem__, CIFAR10.__getitem__)
    if plain and isinstance(dataset, MNIST | CIFAR10) and dataset.transforms is None:
        return zip(np.asarray(dataset.data)[rows], np.asarray(dataset.targets)[rows], strict=True)
    return (dataset[row] for row in rows.tolist())


def crop_and_flip(images: Tensor, draws: Tensor, padding: int, hflip: float) -> Tensor:
    """Shift each image by up to ``padding`` pixels, filled with zeros, and flip some of them.

    images (B, C, H, W), draws (B,) below 2^62. The bits of a draw decide:

    - 0-15: the row where the image is cropped.
    - 16-31: the column.
    - 32-47: whether to flip. They are compared with ``hflip``, the probability of a horizontal
      flip.
    """
    low, middle, high = (draws >> shift & 0xFFFF for shift in (0, 16, 32))
    if hflip:
        flipped = (high < hflip * 2**16).view(-1, 1, 1, 1)
        images = torch.where(flipped, images.flip(-1), images)
    if padding:
        top, left = low % (2 * padding + 1), middle % (2 * padding + 1)
        height, width = images.shape[2:]
        windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(len(images)), :, top, left]
    return images


def seed_of(*numbers: int) -> int:
    """Return one 63-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seed_generators(seed: int) -> None:
    """Seed the generators of random, numpy and torch on the CPU; CUDA's generators stay."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the generators of random, numpy and torch on the CPU afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
