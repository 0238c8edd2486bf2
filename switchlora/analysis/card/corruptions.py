"""Common corruptions of images at five severities, sized by the image and drawn from a seed.

The kinds follow Hendrycks and Dietterich (2019). Their strengths are for images of any size: what
they give in pixels of 224 is a share of the image's side here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

SEVERITIES = 5
GREY = 0.5
LEAST_BLURRED = 28
"""side of images on which a share of it is a deviation that reaches other pixels"""
UNIFORM_STD = 1 / math.sqrt(3)
"""deviation of the numbers from -1 to 1 that ElasticTransform smooths"""
Corrupt = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Corruption:
    """One kind: maps bytes (B, C, H, W) and a strength to bytes.

    ``strengths`` are those of the severities. So many images ``share`` what is drawn at random.
    """

    name: str
    corrupt: Corrupt
    strengths: tuple[float, float, float, float, float]
    share: int = 1000
    channels: tuple[int, ...] = ()
    """the numbers of channels that it takes; any without an entry"""

    def takes(self, channels: int) -> bool:
        """Return whether it takes images of so many channels."""
        return not self.channels or channels in self.channels

    def __call__(self, images: Tensor, severity: int, seed: int = 0) -> Tensor:
        """Return bytes (B, C, H, W), corrupted with ``severity`` 1 to 5; the same for a seed."""
        strength = self.strengths[severity - 1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = [self.corrupt(part, strength) for part in images.split(self.share)]
        return torch.cat(parts)


def add_noise(images: Tensor, sigma: float) -> Tensor:
    """Add Gaussian noise; ``sigma`` is a share of white."""
    return in_bytes(v2.GaussianNoise(0.0, sigma)(images.float() / 255))


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blur; ``sigma`` is a share of the side, of ``LEAST_BLURRED`` pixels where it is shorter."""
    side = side_of(images)
    pixels = sigma * max(side, LEAST_BLURRED)
    widest = 2 * side - 1
    kernel = min(odd(6 * pixels), widest)
    return functional.gaussian_blur(images, kernel, [pixels, pixels])


def pixelate(images: Tensor, size: float) -> Tensor:
    """Resize to a share ``size`` of the side, and back to squares of one colour."""
    height, width = images.shape[2:]
    small = [max(1, round(size * height)), max(1, round(size * width))]
    shrunk = functional.resize(images, small, antialias=True)
    return functional.resize(shrunk, [height, width], InterpolationMode.NEAREST_EXACT)


def warp(images: Tensor, shift: float) -> Tensor:
    """Displace pixels along a smooth field; ``shift`` is its deviation, a share of the side."""
    side = side_of(images)
    smooth = max(0.5, 0.06 * side)
    left_of_noise = UNIFORM_STD / (2 * math.sqrt(math.pi) * smooth)
    return v2.ElasticTransform(shift * side / left_of_noise, smooth)(images)


def occlude(images: Tensor, area: float) -> Tensor:
    """Lay a grey square over a share ``area`` of the image."""
    erase = v2.RandomErasing(1.0, (area, area), (1.0, 1.0), value=GREY)
    return in_bytes(erase(images.float() / 255))


def compress(images: Tensor, quality: float) -> Tensor:
    """Compress as JPEG and decode."""
    found = [through_jpeg(image, int(quality)) for image in images]
    return torch.stack(found)


def through_jpeg(image: Tensor, quality: int) -> Tensor:
    """Return one image (C, H, W) in bytes as it comes back from a JPEG file."""
    file = BytesIO()
    functional.to_pil_image(image).save(file, "JPEG", quality=quality)
    return functional.pil_to_tensor(Image.open(file))


def side_of(images: Tensor) -> int:
    """Return the shorter side of the images."""
    return min(images.shape[2:])


def odd(size: float) -> int:
    """Return the odd size of a kernel, at least 3."""
    return max(3, 2 * round(size / 2) + 1)


def in_bytes(images: Tensor) -> Tensor:
    """Return numbers from 0 to 1 as bytes."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


COLOURED = (1, 3)
CORRUPTIONS = (
    Corruption("noise", add_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    Corruption("blur", blur, (0.01, 0.015, 0.02, 0.03, 0.045)),
    Corruption(
        *("contrast", functional.adjust_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)), channels=COLOURED
    ),
    Corruption(
        *("brightness", functional.adjust_brightness, (1.25, 1.5, 1.75, 2.0, 2.5)),
        channels=COLOURED,
    ),
    Corruption("jpeg", compress, (25, 18, 15, 10, 7), channels=COLOURED),
    Corruption("pixelation", pixelate, (0.7, 0.6, 0.5, 0.4, 0.25)),
    Corruption("elastic", warp, (0.01, 0.015, 0.02, 0.03, 0.04), share=50),
    Corruption("occlusion", occlude, (0.05, 0.1, 0.2, 0.3, 0.4), share=1),
)
