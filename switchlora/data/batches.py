"""Form one batch: its order, its decoding and its augmentation, each a function of a seed.

The sampler gives every image of an epoch an integer of its own, its *draw*. The augmentation of
that image follows from its draw alone. So a batch does not depend on the number of workers, on the
number of processes, or on random numbers drawn before.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from switchlora.data.shipping import (
    Batch,
    Boxes,
    Finish,
    InBytes,
    Move,
    Normalise,
    collected,
    fits,
    in_bytes,
    of_channels,
    sent,
)
from switchlora.data.split import Split

Key = tuple[Tensor, Tensor | None]  # rows of one batch, and their draws when training


class EpochSampler(Sampler[Key]):
    """This process's rows and draws of each batch of ``epoch``, from batch ``start`` on.

    A batch has ``batch_size`` of ``size`` items. Process ``rank`` of ``world_size`` gets ``share``
    of them, which are contiguous. An incomplete last batch is left out. The length is that of a
    whole epoch. ValueError if no batch can be made, or shared equally; the message calls the items
    ``items``.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        items: str = "images",
    ) -> None:
        if not 0 < batch_size <= size:
            raise ValueError(
                f"data.batch_size={batch_size} must lie between 1 and the {size} training {items}"
            )
        if batch_size % world_size:
            raise ValueError(
                f"data.batch_size={batch_size} cannot be shared equally by {world_size} processes"
            )
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.share = batch_size // world_size
        self.epoch = 0
        self.start = 0

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
        parts = rows.split(batch_size)
    else:
        fewest = math.ceil(size / (world_size * batch_size))
        parts = rows.tensor_split(min(fewest, size // world_size))
    return [(part, None) for part in parts]


class InMemory(Dataset[Batch]):
    """The images of a split, decoded once: N * C * H * W bytes.

    ``shape`` is (C, H, W). ValueError if an image has another one. The key of an item is a whole
    batch. Rows with draws are cropped and flipped, rows without draws are not.

    After ``to`` the images lie on a device, and items are bytes there.
    """

    def __init__(
        self,
        split: Split,
        shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 0,
        hflip: float = 0.0,
    ) -> None:
        self.images, self.targets = decode(split, shape)
        self.unread = split.skipped()
        self.readable = ~split.unreadable
        self.names = split.names
        self.normalise: Normalise | None = Normalise(of_channels(mean), of_channels(std))
        self.crop_padding = crop_padding
        self.hflip = hflip

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: Key) -> Batch:
        rows, draws = key
        device = self.images.device
        rows = sent(rows, device)
        images = self.images[rows]
        if draws is not None:
            images = crop_and_flip(images, sent(draws, device), self.crop_padding, self.hflip)
        if self.normalise is not None:
            images = self.normalise(images)
        return images, self.targets[rows]

    def to(self, device: torch.device) -> Finish:
        """Move the images to ``device`` if they fit there. Return what makes items batches."""
        normalise, self.normalise = self.normalise, None
        assert normalise is not None, "the images were moved before"
        if fits(self.images.nbytes, device):
            self.images, self.targets = self.images.to(device), self.targets.to(device)
        return Finish(device, normalise)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def skipped(self) -> list[str]:
        """Return the names of the images that could not be read."""
        return self.unread

    def digest(self) -> str:
        """Return a digest of all pixels and classes."""
        return digest_of(self.images.cpu().numpy().data, self.targets.cpu().numpy().data)


class Transformed(Dataset[tuple[Tensor, ...]]):
    """The images of a split, decoded and transformed each time.

    The key of an item is a whole batch. A row with a draw is read and transformed with random
    numbers that follow from the draw.

    After ``to`` items are bytes, and the boxes to erase: a quarter of what the numbers
    take on their way.
    """

    def __init__(self, split: Split, transform: Callable[[Any], Tensor]) -> None:
        self.split = split
        self.split.pictures = True
        self.transform = transform
        self.in_bytes: InBytes | None = None

    def __len__(self) -> int:
        return len(self.split)

    def to(self, device: torch.device) -> Move:
        """Leave the end of the transform to ``device``. Return what makes items batches."""
        self.in_bytes = in_bytes(self.transform)
        return Finish(device, self.in_bytes.normalise) if self.in_bytes else Move(device)

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        rows, draws = key
        images: list[Tensor] = []
        targets: list[int] = []
        boxes: list[Boxes] = []
        with generators_kept():
            for place, row in enumerate(rows.tolist()):
                if draws is not None:
                    seed_generators(int(draws[place]))
                image, target = self.split.read(row)
                targets.append(target)
                if self.in_bytes is None:
                    images.append(self.transform(image))
                    continue
                pixels, erased = self.in_bytes(image)
                images.append(pixels)
                boxes.append(erased)
        return torch.stack(images), torch.tensor(targets), *collected(boxes)

    def skipped(self) -> list[str]:
        """Return the names of the images that could not be read so far."""
        return self.split.skipped()

    def digest(self) -> str:
        """Return a digest of what is known of the images: see ``Split.digest_parts``."""
        with generators_kept():
            seed_generators(0)
            return digest_of(*self.split.digest_parts())


class EpochMixup(timm.data.Mixup):
    """timm's Mixup and CutMix, with the n-th call of an epoch a function of (seed, epoch, n).

    Call it once per batch on (images, targets). Targets become (B, num_classes) and sum to one.
    """

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.seed = seed
        self.epoch = 0
        self.calls = 0

    def __call__(self, images: Tensor, targets: Tensor) -> Batch:
        """Return the images, mixed in place, and soft targets."""
        self.calls += 1
        with generators_kept():
            seed_generators(seed_of(self.seed, self.epoch, self.calls))
            return super().__call__(images, targets)


def digest_of(*parts: bytes | memoryview) -> str:
    """Return the SHA-256 of the parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def decode(split: Split, shape: tuple[int, int, int]) -> Batch:
    """Return all images (N, C, H, W) uint8 and targets (N,) int64 of a split.

    ``shape`` is (C, H, W). ValueError for an image of another shape.
    """
    channels, height, width = shape
    images = np.empty((len(split), height, width, channels), dtype=np.uint8)
    targets = np.empty(len(split), dtype=np.int64)
    for place in range(len(split)):
        image, targets[place] = split.read(place)
        pixels = np.asarray(image)
        if pixels.ndim == 2:  # grey
            pixels = pixels[:, :, np.newaxis]
        found = pixels.shape
        if found[:2] != (height, width) or found[2:] not in ((channels,), (1,)):
            raise ValueError(
                f"{split.name_of(place)}: it has {found[-1]} channels of {found[0]} x {found[1]} "
                f"pixels, but data.in_chans={channels} and data.image_size={height}; change "
                "these, or let data.eval_transform={} resize"
            )
        images[place] = pixels
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    return channels_first.contiguous(), torch.from_numpy(targets)


def crop_and_flip(images: Tensor, draws: Tensor, padding: int, hflip: float) -> Tensor:
    """Shift each image by up to ``padding`` pixels, filled with zeros, and flip some of them.

    images (B, C, H, W), draws (B,) below 2^62. The bits of a draw decide:

    - 0-15: the row where the image is cropped.
    - 16-31: the column.
    - 32-47: whether to flip. They are compared with ``hflip``, the probability of a horizontal
      flip.
    """
    if hflip:
        flipped = bits(draws, 32) < hflip * 2**16
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    if padding:
        places = 2 * padding + 1
        top = bits(draws, 0) % places
        left = bits(draws, 16) % places
        height, width = images.shape[2:]
        padded = F.pad(images, [padding] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(len(images), device=images.device), :, top, left]
    return images


def bits(draws: Tensor, first: int) -> Tensor:
    """Return 16 bits of each draw, from bit ``first`` on, as a number."""
    return draws >> first & 0xFFFF


def seed_of(*numbers: int) -> int:
    """Return one 63-bit seed from several non-negative integers."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state) >> 1


def seed_generators(seed: int) -> None:
    """Seed the generators of random, numpy and torch on the CPU; CUDA's generators stay."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the generators of random, numpy and torch on the CPU afterwards."""
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    of_torch = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
