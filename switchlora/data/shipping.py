"""Send batches to a device as bytes, and do there what a transform does last."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, MaybeToTensor
from torch import Tensor
from torchvision.transforms import Compose, Normalize

Batch = tuple[Tensor, Tensor]
SHARE_OF_DEVICE = 4
"""a data set stays on a GPU if it takes no more than one in so many free bytes"""


def of_channels(numbers: Sequence[float]) -> Tensor:
    """Return one number a channel as (C, 1, 1), to go with images."""
    return torch.tensor(list(numbers)).view(-1, 1, 1)


class Normalise:
    """Maps bytes (B, C, H, W) to float32: divided by 255, less ``mean``, divided by ``std``."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean = mean
        self.std = std
        self.white = torch.full_like(mean, 255)  # CUDA multiplies by the inverse of a number

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images as numbers."""
        return images.float().div_(self.white).sub_(self.mean).div_(self.std)

    def to(self, device: torch.device) -> "Normalise":
        """Return the same on a device."""
        return Normalise(self.mean.to(device), self.std.to(device))


class Move:
    """Brings the tensors of a batch to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, batch: Sequence[Tensor]) -> Batch:
        """Return inputs and targets on the device."""
        inputs, targets = batch
        return sent(inputs, self.device), sent(targets, self.device)


class Finish(Move):
    """Brings a batch of bytes to a device, and normalises and erases there.

    Each row of ``boxes`` (n, 5) is an image and the rows and columns of a box in it. ``pixels``
    holds their contents, one box after the other.
    """

    def __init__(self, device: torch.device, normalise: Normalise) -> None:
        super().__init__(device)
        self.normalise = normalise.to(device)

    def __call__(self, batch: Sequence[Tensor]) -> Batch:
        """Return inputs and targets on the device."""
        sources, targets, *erased = batch
        images = self.normalise(sent(sources, self.device))
        if erased:
            boxes, pixels = erased
            erase(images, boxes, sent(pixels, self.device))
        return images, sent(targets, self.device)


def erase(images: Tensor, boxes: Tensor, pixels: Tensor) -> None:
    """Write ``pixels`` into the ``boxes`` of ``images``; see ``Finish``."""
    first = 0
    for image, top, bottom, left, right in boxes.tolist():
        box = images[image, :, top:bottom, left:right]
        box.copy_(pixels[first : first + box.numel()].view_as(box))
        first += box.numel()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; on CUDA nobody waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fits(size: int, device: torch.device) -> bool:
    """Return whether a data set of ``size`` bytes may stay on ``device``."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size * SHARE_OF_DEVICE <= free


class Boxes:
    """Stands for an image (C, H, W) in timm's RandomErasing, and keeps what it would write."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.places: list[tuple[int, int, int, int]] = []
        self.pixels: list[Tensor] = []

    def size(self) -> torch.Size:
        """Return the shape of the image."""
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], pixels: Tensor) -> None:
        _, rows, columns = place
        size = (self.shape[0], rows.stop - rows.start, columns.stop - columns.start)
        self.places.append((rows.start, rows.stop, columns.start, columns.stop))
        self.pixels.append(pixels.expand(size).flatten())


class InBytes:
    """A transform of timm's up to bytes (C, H, W), with what is left for the device.

    ``normalise`` comes next. ``boxes`` draws what is erased last; it draws the same numbers as the
    whole transform.
    """

    def __init__(
        self, pictures: Callable[[Any], Tensor], normalise: Normalise, last: Sequence[Any]
    ) -> None:
        self.pictures = pictures
        self.normalise = normalise
        self.last = last

    def __call__(self, image: Any) -> tuple[Tensor, Boxes]:
        """Return the bytes of an image, and what is to be erased of it."""
        pixels = self.pictures(image)
        boxes = Boxes(pixels.shape)
        for erasing in self.last:
            erasing(boxes)
        return pixels, boxes


def in_bytes(transform: Any) -> InBytes | None:
    """Return a transform that leaves its end to the device; None if that is not timm's own end.

    timm's end is: to a tensor, normalised, and perhaps erased in part.
    """
    steps = list(getattr(transform, "transforms", ()))
    kinds = [type(step) for step in steps]
    if Normalize not in kinds:
        return None
    place = kinds.index(Normalize)
    if kinds[place - 1 : place] != [MaybeToTensor] or {*kinds[place + 1 :]} - {RandomErasing}:
        return None
    pictures = Compose([*steps[: place - 1], MaybePILToTensor()])
    end = steps[place]
    normalise = Normalise(of_channels(end.mean), of_channels(end.std))
    return InBytes(pictures, normalise, steps[place + 1 :])


def collected(boxes: Sequence[Boxes]) -> tuple[Tensor, ...]:
    """Return the boxes of a batch and their pixels, as ``Finish`` takes them; () without any."""
    places = []
    pixels: list[Tensor] = []
    for image, found in enumerate(boxes):
        places += [(image, *place) for place in found.places]
        pixels += found.pixels
    return (torch.tensor(places), torch.cat(pixels)) if places else ()
