"""timm's transforms, in the form that works with every version of Pillow."""

from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize as timm_posterize


def build_transform(**options: Any) -> Any:
    """Return ``timm.data.create_transform(**options)``, which may also keep 0 bits of a colour."""
    transform = create_transform(**options)
    for operation in operations(transform):
        if operation.aug_fn is timm_posterize:
            operation.aug_fn = posterize
    return transform


def operations(part: Any) -> Iterator[AugmentOp]:
    """Yield the random operations inside a transform, however deep."""
    if isinstance(part, AugmentOp):
        yield part
    elif isinstance(part, list | tuple):
        for each in part:
            yield from operations(each)
    else:
        for name in ("transforms", "ops", "policy"):
            yield from operations(getattr(part, name, ()))


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Keep the first bits of each colour; none or fewer leave black.

    Pillow refuses 0 bits since version 13, and gave black before.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return timm_posterize(image, bits_to_keep, **options)
