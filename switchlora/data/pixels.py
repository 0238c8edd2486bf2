"""Bring images of any mode and depth to 8 bits and the channels of a run: the one place for it."""

from typing import Any

import numpy as np
from PIL import Image

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", "La")
MODES = {1: ("L",), 2: ("LA",), 3: ("RGB",), 4: ("RGBA", "CMYK")}
"""by channels, the modes that stay as they are; others become the first"""
TIFF_BITS, TIFF_PHOTOMETRIC, BLACK_IS_ZERO = 258, 262, 1


def standard(image: Any, channels: int) -> Image.Image | np.ndarray:
    """Return an image with 8 bits a channel and, where nothing is invented, ``channels`` of them.

    - Grey becomes colour, a palette becomes its colours, transparency is dropped.
    - 16 bits are scaled to 8.
    - An array (H, W) or (H, W, C) stays an array.

    ValueError for pixels of an unknown range, and for colour where grey is wanted.
    """
    if not isinstance(image, Image.Image):
        return eight_bits(np.asarray(image))
    check_range_is_known(image)
    image.load()
    if image.mode in SIXTEEN_BITS or image.mode == "I":
        pixels = np.asarray(image)
        image = Image.fromarray(eight_bits(pixels.astype(np.uint16)))
    return with_channels(image, channels)


def as_picture(image: Image.Image | np.ndarray, channels: int) -> Image.Image:
    """Return a PIL image of what ``standard`` gave; ValueError for an array of other channels."""
    if isinstance(image, Image.Image):
        return image
    pixels = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    try:
        return with_channels(Image.fromarray(pixels), channels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"it is an array of shape {image.shape}: {error}") from error


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Return pixels of 1, 8 or 16 bits as uint8; ValueError for others, such as floats."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        rounded = (pixels.astype(np.uint32) + 128) // 257
        return rounded.astype(np.uint8)
    raise ValueError(
        f"its pixels are {pixels.dtype}, whose range is not known: give PIL images, or arrays of "
        "uint8 or uint16"
    )


def check_range_is_known(image: Image.Image) -> None:
    """Raise ValueError for an image whose least and largest values only its author knows.

    A header is enough for that. Pillow opens 16-bit PNG and PGM files as mode I in some versions.
    """
    known = image.mode not in ("I", "F")
    if image.mode == "I":
        known = image.format in ("PNG", "PPM")
    if image.mode in SIXTEEN_BITS and image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        is_plain = tags.get(TIFF_PHOTOMETRIC, BLACK_IS_ZERO) == BLACK_IS_ZERO
        known = is_plain and tags.get(TIFF_BITS) == (16,)
    if not known:
        raise ValueError(
            f"its pixels (mode {image.mode}) have a range that is not known: save it with 8 or 16 "
            "bits a channel, from black to white"
        )


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Return an image of 8 bits with ``channels`` channels; ValueError if colour would be lost."""
    check_channels(image, channels)
    modes = MODES[channels]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns on any other way
    return image if image.mode in modes else image.convert(modes[0])


def check_channels(image: Image.Image, channels: int) -> None:
    """Raise ValueError for an image that cannot have ``channels`` channels; a header is enough."""
    is_grey = image.mode in (*GREY, *SIXTEEN_BITS, "I")
    if channels not in MODES or (channels <= 2 and not is_grey):
        found = 3 if image.mode in ("P", "PA") else len(image.getbands())
        raise ValueError(
            f"it has {found} channels (mode {image.mode}), but data.in_chans={channels}"
        )
