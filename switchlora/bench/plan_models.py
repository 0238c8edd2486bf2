"""Models by name on the meta device, and models of a few of their blocks that stand for all."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchlora.models import CausalTransformer, create_model
from switchlora.names import near

DECODERS = {
    "gpt3-125m": (768, 12, 12),
    "gpt3-350m": (1024, 24, 16),
    "gpt3-760m": (1536, 24, 16),
    "gpt3-1.3b": (2048, 24, 16),
    "gpt3-2.7b": (2560, 32, 32),
    "gpt3-6.7b": (4096, 32, 32),
    "gpt3-13b": (5120, 40, 40),
    "gpt3-175b": (12288, 96, 96),
}
"""width, depth and heads of decoders (Brown et al., arXiv 2005.14165, table 2.1)"""
VOCABULARY, CONTEXT = 50257, 2048
FIRST = "vit_tiny_patch16_224"
OWN: dict[str, dict[str, Any]] = {
    "small": {"img_size": 28, "in_chans": 1, "patch_size": 7, "embed_dim": 128, "depth": 4},
    "digits": {"img_size": 8, "in_chans": 1, "patch_size": 2, "embed_dim": 64, "depth": 3},
}
"""this project's models of images: options of a timm model"""
OWN_HEADS = {"small": 4, "digits": 2}
BYTES: dict[str, Any] = {"context": 128, "vocabulary": 256, "embed_dim": 128, "depth": 6}
MANY_BLOCKS = 4
"""a stack of fewer equal blocks is not shortened"""


@dataclass(frozen=True)
class Example:
    """The shape of one example, and the loss of a batch of them."""

    inputs: Callable[[int], Tensor]
    """number of examples -> inputs on the meta device"""
    labels: Callable[[int], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    bytes: int
    """bytes of one example as a loader hands it over, as uint8 or token numbers"""
    unit: str


@dataclass(frozen=True)
class Planned:
    """A model without content, and what it learns from."""

    model: nn.Module
    example: Example
    stack: str | None
    """name of its equal blocks; None: it is traced whole"""
    depth: int
    """number of equal blocks"""

    def with_blocks(self, number: int) -> nn.Module:
        """Return a copy that has ``number`` of the equal blocks. The others are not copied."""
        if self.stack is None:
            return copy.deepcopy(self.model)
        parent, _, name = self.stack.rpartition(".")
        holder = self.model.get_submodule(parent)
        blocks = getattr(holder, name)
        setattr(holder, name, blocks[:number])
        try:
            return copy.deepcopy(self.model)
        finally:
            setattr(holder, name, blocks)


def planned(name: str, options: Mapping[str, Any], context: int | None = None) -> Planned:
    """Build a model by its name; ValueError with near names for an unknown one.

    It is one of timm, of this project (small, digits, bytes), or a decoder of GPT-3's shapes.
    """
    with torch.device("meta"):
        if name in DECODERS or name == "bytes":
            model, example = _decoder(name, options, context)
        else:
            model, example = _of_images(name, options)
    stack, depth = _stack_of(model)
    return Planned(model.train(), example, stack, depth)


def _decoder(
    name: str, options: Mapping[str, Any], context: int | None
) -> tuple[nn.Module, Example]:
    known = dict(BYTES)
    if name in DECODERS:
        embed_dim, depth, num_heads = DECODERS[name]
        known = {"context": CONTEXT, "vocabulary": VOCABULARY, "embed_dim": embed_dim}
        known |= {"depth": depth, "num_heads": num_heads}
    known |= options
    known |= {} if context is None else {"context": context}
    try:
        model = CausalTransformer(**known)
    except TypeError as error:
        raise ValueError(f"model '{name}' refuses its options: {error}") from error
    return model, _sequences(known["context"])


def _sequences(context: int) -> Example:
    def tokens(number: int) -> Tensor:
        return torch.empty(number, context, dtype=torch.long, device="meta")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    return Example(tokens, tokens, loss, 4 * context, "sequences")


def _of_images(name: str, options: Mapping[str, Any]) -> tuple[nn.Module, Example]:
    known: dict[str, Any] = {"num_classes": 1000}
    if name in OWN:
        known = {**OWN[name], "num_heads": OWN_HEADS[name], "num_classes": 10}
    elif not timm.is_model(name):
        every = [*timm.list_models(), *DECODERS, *OWN, "bytes"]
        raise ValueError(f"model '{name}' is not known; {near(name, every)}")
    model = create_model(FIRST if name in OWN else name, **{**known, **options})
    shape = _image_shape(model, {**known, **options})
    classes = int(model.num_classes)  # type: ignore[arg-type]

    def images(number: int) -> Tensor:
        return torch.empty(number, *shape, device="meta")

    def labels(number: int) -> Tensor:
        return torch.empty(number, classes, device="meta")

    size = shape[0] * shape[1] * shape[2]
    return model, Example(images, labels, F.cross_entropy, size, "images")


def _image_shape(model: nn.Module, options: Mapping[str, Any]) -> tuple[int, int, int]:
    usual: Any = getattr(model, "default_cfg", {}).get("input_size") or (3, 224, 224)
    channels = options.get("in_chans", usual[0])
    size = options.get("img_size", usual[1])
    return channels, size, size


def _stack_of(model: nn.Module) -> tuple[str | None, int]:
    """Return the name and the length of the longest list of equal blocks of ``model``."""
    best: tuple[str | None, int] = (None, 1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and _all_equal(module):
            best = max(best, (name, len(module)), key=lambda found: found[1])
    return best if best[1] >= MANY_BLOCKS else (None, 1)


def _all_equal(blocks: nn.Sequential | nn.ModuleList) -> bool:
    """Return whether blocks, each with linears, have equal parameters and parts."""
    kinds = {_kind(block) for block in blocks}
    return len(kinds) == 1 and any(isinstance(m, nn.Linear) for m in blocks.modules())


def _kind(block: nn.Module) -> tuple:
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    parts = tuple(type(module).__name__ for module in block.modules() if _acts(module))
    return type(block), shapes, parts


def _acts(module: nn.Module) -> bool:
    """Leave out what drops: paths of the first block are often never dropped."""
    return not isinstance(module, nn.Identity) and "Drop" not in type(module).__name__
