"""Text as a data set: windows of bytes, with the next byte as the target of each.

Sampler, loaders and resume treat a window as they treat an image.
"""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from switchlora.data.batches import EpochSampler, Key, digest_of
from switchlora.data.loaders import Data, make_loaders
from switchlora.data.shipping import Batch, Move, fits, sent
from switchlora.errors import check_range


class Windows(Dataset[Batch]):
    """Windows of ``context`` bytes that touch but do not overlap.

    An incomplete last window is left out. ``text`` is (n,) uint8. The key of an item is a whole
    batch of rows. Its inputs are (B, context) int64. Its targets are the same bytes, one place
    further on.
    """

    def __init__(self, text: Tensor, context: int) -> None:
        self.text = text
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, key: Key) -> Batch:
        rows, _ = key
        firsts = sent(rows, self.device).unsqueeze(1) * self.context
        places = firsts + torch.arange(self.context, device=self.device)
        return self.text[places].long(), self.text[places + 1].long()

    def to(self, device: torch.device) -> Move:
        """Move the text to ``device`` if it fits there. Return what brings items there."""
        if fits(self.text.nbytes, device):
            self.text = self.text.to(device)
        return Move(device)

    @property
    def device(self) -> torch.device:
        """Where the text is."""
        return self.text.device

    def digest(self) -> str:
        """Return a digest of all bytes, and of where windows begin."""
        return digest_of(self.text.cpu().numpy().tobytes(), b"%d" % self.context)


class TokenCrossEntropy(nn.Module):
    """Cross entropy, in nats, averaged over all tokens of all sequences."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits (B, T, vocabulary) and targets (B, T) int64 to a scalar."""
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def build_text(
    *,
    context: int,
    batch_size: int,
    path: str | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    train_size: int | None = None,
    leakage: str = "warn",
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Data:
    """Return loaders of the windows of one text, cut into pieces to train, validate and test on.

    - ``path`` is the file with the text. Without it the text is Python's own reference on its
      language, which is English and comes with Python.
    - ``batch_size`` counts the windows of one update over all ``world_size`` processes.
    - ``train_size`` keeps only the first windows to train on.
    - ``leakage`` is not read here: see ``build_data``.

    ValueError if the text is too short for that, or cannot be read.
    """
    check_range("data.context", context, 1)
    text = read(path)
    train, val, test = windows_of(text, context, val_fraction, test_fraction)
    size = len(train) if train_size is None else train_size
    if not 0 < size <= len(train):
        raise ValueError(f"data.train_size={size}, but the text has {len(train)} windows to train")
    sampler = EpochSampler(size, batch_size, seed, rank, world_size, items="windows")
    loaders = make_loaders((train, val, test), sampler, workers, pin_memory)
    return Data(
        train=loaders[0],
        val=loaders[1],
        test=loaders[2],
        mixup=None,
        loss=TokenCrossEntropy(),
        num_classes=int(text.max()) + 1,
    )


def windows_of(
    text: Tensor, context: int, val_fraction: float, test_fraction: float
) -> list[Windows]:
    """Return the windows to train, validate and test on; ValueError if a piece has none."""
    pieces = cut(text, val_fraction, test_fraction)
    views = [Windows(piece, context) for piece in pieces]
    if min(map(len, views)) == 0:
        sizes = " + ".join(str(len(piece)) for piece in pieces)
        raise ValueError(
            f"data.context={context} leaves no window in {sizes} bytes to train, validate and "
            "test on: shorten it, or give a longer data.path"
        )
    return views


def read(path: str | None) -> Tensor:
    """Return the bytes (n,) uint8 of a file, or of Python's reference if ``path`` is None.

    The reference changes with Python's version. Its topics quote each other: a paragraph is kept
    where it stands first. ValueError if the file cannot be read.
    """
    if path is None:
        paragraphs = "\n".join(topics.values()).split("\n\n")
        text = "\n\n".join(dict.fromkeys(paragraphs)).encode()
    else:
        try:
            text = Path(path).expanduser().read_bytes() or b"\0"
        except OSError as error:
            raise ValueError(
                f"data.path={path} cannot be read ({error.strerror}): give a file of text, or "
                "leave it out for Python's own reference"
            ) from error
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def cut(text: Tensor, val_fraction: float, test_fraction: float) -> tuple[Tensor, ...]:
    """Return three pieces of the text, in order: to train, validate and test on.

    Validation gets ``val_fraction``, test the last ``test_fraction``, training the beginning.
    ValueError unless all three have a share of the text.
    """
    train_fraction = 1 - val_fraction - test_fraction
    if min(train_fraction, val_fraction, test_fraction) <= 0:
        raise ValueError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} must both "
            "be positive and leave something to train on"
        )
    val = round(len(text) * val_fraction)
    test = round(len(text) * test_fraction)
    return text.split([len(text) - val - test, val, test])
