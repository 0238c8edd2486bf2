"""What goes in: images and text, batches that follow from a seed, loaders."""

from switchlora.data.batches import crop_and_flip, decode
from switchlora.data.images import Digits, fashion_mnist
from switchlora.data.loaders import Data, build_data
from switchlora.data.text import build_text
from switchlora.data.workers import Loader

__all__ = [
    "Data",
    "Digits",
    "Loader",
    "build_data",
    "build_text",
    "crop_and_flip",
    "decode",
    "fashion_mnist",
]
