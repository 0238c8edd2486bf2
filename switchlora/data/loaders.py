"""Build the loaders of a data config: splits, transforms, Mixup and the loss that fits them."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import Dataset

from switchlora.data.augment import build_transform
from switchlora.data.batches import (
    EpochMixup,
    EpochSampler,
    InMemory,
    Key,
    Transformed,
    digest_of,
    eval_batches,
)
from switchlora.data.shipping import Batch
from switchlora.data.split import Split, classes_of
from switchlora.data.workers import Loader
from switchlora.errors import check_range
from switchlora.names import near
from switchlora.process import from_primary

Options = Mapping[str, Any]
View = InMemory | Transformed
TRIED = 8
"""images of each split that are read before training"""
HEADERS = 20_000
"""training files whose headers are read before training"""


@dataclass(frozen=True)
class Data:
    """The three loaders of a run, and the loss that fits their batches.

    A batch has inputs and targets, such as images (B, C, H, W) float32 and classes (B,) int64.

    - ``train`` leaves out its last incomplete batch.
    - ``val`` is cut from the training set, in the same way for every seed.
    - ``test`` is the official split.
    - ``mixup`` maps (images, targets) to mixed images and soft targets.
    - ``num_classes`` is above every label.
    - ``classes`` are the names of the classes, in their order; none if the data do not tell them.
    - ``loss`` expects the targets that ``mixup`` makes, if there is a ``mixup``.

    With several processes each loader yields this process's share: sum over processes before you
    divide.
    """

    train: Loader
    val: Loader
    test: Loader
    mixup: EpochMixup | None
    loss: nn.Module
    num_classes: int
    classes: tuple[str, ...] = ()
    _known: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def views(self) -> list[Any]:
        """The data sets of the three loaders."""
        return [loader.dataset for loader in (self.train, self.val, self.test)]

    def digest(self) -> str:
        """Return a digest of the data, the same wherever they lie. It is computed once.

        Of images that are decoded anew for each batch it knows files by their names and sizes,
        and some by their contents.
        """
        if "digest" not in self._known:
            self._known["digest"] = digest_of(*(view.digest().encode() for view in self.views))
        return self._known["digest"]

    def skipped(self) -> list[str]:
        """Return the names of the images that this process could not read so far."""
        names: list[str] = []
        for view in self.views:
            if isinstance(view, View):
                names += view.skipped()
        return names

    def to(self, device: torch.device) -> None:
        """Let batches come on ``device``, and keep data sets there that fit in its memory.

        Draws and bits are those of a CPU. On a CPU nothing changes.
        """
        for loader in (self.train, self.val, self.test):
            loader.to(device)

    def example(self, count: int) -> Batch:
        """Return ``count`` inputs and targets, as the loss gets them, without their contents.

        They are on the meta device, which has shapes only.
        """
        inputs, targets = self.val.finished(
            self.val.dataset[torch.zeros(1, dtype=torch.long), None]
        )
        if self.mixup is not None:
            targets = torch.empty(1, self.mixup.num_classes)
        return on_meta(inputs, count), on_meta(targets, count)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Make the next pass over ``train`` that of ``epoch``, from its batch ``start`` on."""
        begin(self.train.sampler, self.mixup, epoch, start)

    def first_batch(self, epoch: int) -> Batch:
        """Return this process's first batch of ``epoch``, mixed as in training.

        A pass over ``train`` that is under way goes on as if nobody had asked.
        """
        sampler, mixup = copy(self.train.sampler), copy(self.mixup)
        begin(sampler, mixup, epoch, start=0)
        inputs, targets = self.train.finished(self.train.dataset[next(iter(sampler))])
        return (inputs, targets) if mixup is None else mixup(inputs, targets)


def begin(sampler: Any, mixup: EpochMixup | None, epoch: int, start: int) -> None:
    """Let both go on from batch ``start`` of ``epoch``."""
    assert isinstance(sampler, EpochSampler)
    sampler.epoch = epoch
    sampler.start = start
    if mixup is not None:
        mixup.epoch = epoch
        mixup.calls = start


def on_meta(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor like ``tensor``, with ``count`` rows, on the meta device."""
    return tensor.new_empty((count, *tensor.shape[1:]), device="meta")


def build_data(
    train: Dataset,
    test: Dataset,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    val_fraction: float = 0.1,
    train_size: int | None = None,
    eval_size: int | None = None,
    crop_padding: int = 0,
    hflip: float = 0.0,
    train_transform: Options | None = None,
    eval_transform: Options | None = None,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    label_smoothing: float = 0.0,
    skip_unreadable: bool = False,
    root: str | None = None,
    leakage: str = "warn",
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Data:
    """Cut the validation split, attach transforms and make the loaders.

    - ``train`` and ``test`` yield (PIL image, class number).
    - ``train_transform`` and ``eval_transform`` are options of ``timm.data.create_transform``.
      With either, ``workers`` processes decode images each time. With neither, images are decoded
      once and kept as bytes: see ``in_memory``.
    - ``batch_size`` counts the images of one optimizer update over all ``world_size`` processes.
    - ``train_size`` limits training to a fixed subset of what validation leaves.
    - ``eval_size`` limits both validation and test to a fixed subset.
    - ``skip_unreadable`` lets another image stand for one that cannot be read. Evaluation does not
      count it.
    - ``root`` is not read. It is the key that ``train`` and ``test`` refer to in a config.
    - ``leakage`` is not read here. It says what the start of a run does about images of test that
      are in train.

    Some images of each split are read at once, and the headers of files. ValueError if sizes,
    channels, labels or options do not fit together.
    """
    splits = build_splits(
        *(train, test),
        in_chans=in_chans,
        num_classes=num_classes,
        val_fraction=val_fraction,
        train_size=train_size,
        eval_size=eval_size,
        skip_unreadable=skip_unreadable,
    )
    sampler = EpochSampler(len(splits[0]), batch_size, seed, rank, world_size)
    mixup = build_mixup(mixup_alpha, cutmix_alpha, label_smoothing, num_classes, sampler)
    check_normalisation(mean, std, in_chans)
    for each in splits:
        each.check_labels()
    views: list[View]
    if train_transform is None and eval_transform is None:
        workers = 0
        shape = (in_chans, image_size, image_size)
        views = in_memory(splits, shape, mean, std, crop_padding, hflip)
    elif crop_padding or hflip:
        raise ValueError("with data.train_transform, data.crop_padding and data.hflip must be 0")
    else:
        common = {"input_size": image_size, "mean": tuple(mean), "std": tuple(std)}
        views = transformed(splits, common, train_transform or {}, eval_transform or {})
    loss = build_loss(mixup, label_smoothing)
    loaders = make_loaders(views, sampler, workers, pin_memory)
    classes = tuple(classes_of(train))
    return Data(loaders[0], loaders[1], loaders[2], mixup, loss, num_classes, classes)


def build_splits(
    train: Dataset,
    test: Dataset,
    *,
    in_chans: int,
    num_classes: int | None = None,
    val_fraction: float = 0.1,
    train_size: int | None = None,
    eval_size: int | None = None,
    skip_unreadable: bool = False,
    **_: Any,
) -> list[Split]:
    """Return the splits to train, validate and test on, as ``build_data`` cuts them.

    The other keys of a data config are not read. ValueError for sizes or names of classes that do
    not fit.
    """
    fit, val = split(length(train), val_fraction, train_size)
    held_out = limited(torch.arange(length(test)), eval_size)
    numbers = same_numbers(classes_of(train), test)
    options: dict[str, Any] = {
        "channels": in_chans,
        "num_classes": num_classes,
        "skip_unreadable": skip_unreadable,
    }
    return [
        Split("train", train, fit, **options),
        Split("val", train, limited(val, eval_size), **options),
        Split("test", test, held_out, numbers=numbers, **options),
    ]


def build_test(
    test: Dataset, classes: Sequence[str], *, eval_size: int | None = None, **options: Any
) -> Loader:
    """Return the loader of a test split alone, the same as that of ``build_data``.

    ``classes`` are the names of the classes of training; labels are numbered as these. The other
    keys of a data config are not read.
    """
    rows = limited(torch.arange(length(test)), eval_size)
    return held_out("test", test, rows, same_numbers(classes, test), **options)


def build_val(
    train: Dataset,
    *,
    val_fraction: float = 0.1,
    train_size: int | None = None,
    eval_size: int | None = None,
    **options: Any,
) -> Loader:
    """Return the loader of a validation split alone, the same as that of ``build_data``."""
    _, rows = split(length(train), val_fraction, train_size)
    return held_out("val", train, limited(rows, eval_size), None, **options)


def held_out(
    name: str,
    dataset: Dataset,
    rows: Tensor,
    numbers: dict[int, int] | None,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    train_transform: Options | None = None,
    eval_transform: Options | None = None,
    skip_unreadable: bool = False,
    workers: int = 0,
    **_: Any,
) -> Loader:
    """Return the loader of the ``rows`` of a data set that are not trained on; see ``Split``."""
    check_normalisation(mean, std, in_chans)
    split = Split(
        name,
        dataset,
        rows,
        channels=in_chans,
        num_classes=num_classes,
        numbers=numbers,
        skip_unreadable=skip_unreadable,
    )
    split.check_labels()
    view: View
    if train_transform is None and eval_transform is None:
        workers = 0
        view = InMemory(split, (in_chans, image_size, image_size), mean, std)
    else:
        common = {"input_size": image_size, "mean": tuple(mean), "std": tuple(std)}
        view = Transformed(split, transform_of(common, eval_transform or {}))
        try_views([view])
    return Loader(view, sampler=eval_batches(len(view), batch_size), num_workers=workers)


def check_normalisation(mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
    """Raise ValueError unless there is a mean and a deviation for each channel."""
    if not len(mean) == len(std) == in_chans:
        raise ValueError(f"data.mean and data.std need {in_chans} numbers each, one a channel")


def same_numbers(classes: Sequence[str], test: Dataset) -> dict[int, int] | None:
    """Return the number in training of each class of ``test``, by its name.

    ``classes`` are those of training. None if the numbers are the same, or if one of both does not
    name its classes. ValueError for a class that training lacks, or a name that stands for two
    classes.
    """
    known, found = list(classes), classes_of(test)
    place = getattr(test, "root", None)
    where = f" in {place}" if place else ""
    if not known or not found or known == found:
        return None
    for name in found:
        if known.count(name) != 1 or found.count(name) != 1:
            raise ValueError(
                f"the test split{where} has a class '{name}' that the training split has not, or "
                f"not once; {near(name, known)}; give both the same names of classes (folders)"
            )
    return {number: known.index(name) for number, name in enumerate(found)}


def make_loaders(
    views: Sequence[Dataset], sampler: EpochSampler, workers: int, pin_memory: bool
) -> list[Loader]:
    """Return the loaders of three views: to train, to validate and to test on.

    ``sampler`` gives the batches to train on. Workers outlive a pass, except
    those of the one test.
    """
    orders: list[Iterable[Key]] = [sampler]
    for view in views[1:]:
        size = length(view)
        orders.append(eval_batches(size, sampler.share, sampler.rank, sampler.world_size))
    loaders = []
    for view, order in zip(views, orders, strict=True):
        loader = Loader(
            view,
            sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0 and view is not views[-1],
            pin_memory=pin_memory and torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(sampler.seed),  # torch's own stays as it is
        )
        loaders.append(loader)
    return loaders


def length(dataset: Dataset) -> int:
    """Return the number of images; ValueError for a data set that is empty or cannot tell."""
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise ValueError(f"data set {type(dataset).__name__} has no length, or is empty")
    return len(dataset)


def split(size: int, val_fraction: float, train_size: int | None) -> tuple[Tensor, Tensor]:
    """Return the rows to train on and the rows to validate on.

    They are shuffled by a fixed seed, not by the run's. ValueError if a size or a share does not
    fit.
    """
    held = round(size * val_fraction)
    if not 0 < val_fraction < 1 or not 0 < held < size:
        raise ValueError(
            f"data.val_fraction={val_fraction} cuts {held} of {size} images; it must lie between "
            "0 and 1 and leave images on both sides"
        )
    if train_size is not None and not 0 < train_size <= size - held:
        raise ValueError(
            f"data.train_size={train_size}, but validation leaves {size - held} of {size} images"
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order[held:][:train_size], order[:held]


def limited(rows: Tensor, size: int | None) -> Tensor:
    """Return ``size`` of ``rows``, chosen by a fixed seed, in their order.

    All rows are returned if ``size`` is None or larger. ValueError for a size below 1.
    """
    if size is None:
        return rows
    check_range("data.eval_size", size, 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    chosen, _ = order[:size].sort()
    return rows[chosen]


def in_memory(
    splits: Sequence[Split],
    shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crop_padding: int,
    hflip: float,
) -> list[View]:
    """Return views on images decoded once; those to train on are randomly cropped and flipped.

    A crop is taken after padding each side with ``crop_padding`` black pixels. ``hflip`` is the
    probability of a flip.
    """
    train, *plain = splits
    views: list[View] = [InMemory(train, shape, mean, std, crop_padding, hflip)]
    for split in plain:
        views.append(InMemory(split, shape, mean, std))
    return views


def transformed(
    splits: Sequence[Split], common: Options, train_options: Options, eval_options: Options
) -> list[View]:
    """Return views through ``timm.data.create_transform``; the options of training augment.

    ValueError for options that timm refuses. DataUnusable if the primary rank finds files that
    cannot be used.
    """
    train, *plain = splits
    augment = transform_of({**common, "is_training": True}, train_options)
    keep = transform_of(common, eval_options)
    views = [Transformed(train, augment), *(Transformed(split, keep) for split in plain)]
    from_primary(lambda: try_views(views))
    return [*views]


def transform_of(common: Options, options: Options) -> Any:
    """Return timm's transform with both options; ValueError for what timm refuses."""
    try:
        return build_transform(**common, **options)
    except (TypeError, AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"data.train_transform or data.eval_transform: {error}") from error


def try_views(views: Sequence[Transformed]) -> None:
    """Read the headers of files, and transform a few images of each split.

    DataUnusable for an image that cannot be used.
    """
    for view in views:
        view.split.check_headers(HEADERS if view.split.name == "train" else None)
    for view in views:
        rows = torch.arange(min(TRIED, len(view)))
        view[rows, torch.zeros_like(rows)]


def build_mixup(
    mixup_alpha: float,
    cutmix_alpha: float,
    label_smoothing: float,
    num_classes: int,
    sampler: EpochSampler,
) -> EpochMixup | None:
    """Return Mixup and CutMix with these alphas for the sampler's batches, or None if both are 0.

    ValueError if each process gets an odd number of images, which timm cannot pair.
    """
    if mixup_alpha == cutmix_alpha == 0:
        return None
    if sampler.share % 2:
        raise ValueError(
            f"mixup needs an even batch, but a process gets {sampler.share} images of it"
        )
    return EpochMixup(
        sampler.seed,
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )


def build_loss(mixup: EpochMixup | None, label_smoothing: float) -> nn.Module:
    """Return the training loss: for soft targets, for smoothed ones, or plain cross entropy."""
    if mixup is not None:
        return SoftTargetCrossEntropy()
    if label_smoothing > 0:
        return LabelSmoothingCrossEntropy(label_smoothing)
    return nn.CrossEntropyLoss()
