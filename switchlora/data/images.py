"""Data sets of images: Digits, folders, those of torchvision, Fashion-MNIST from two sources."""

import gzip
import os
import shutil
import socket
import struct
import subprocess
import threading
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets import MNIST, FashionMNIST, ImageFolder
from torchvision.datasets.folder import is_image_file

from switchlora.data.split import open_image
from switchlora.names import near
from switchlora.process import any_rank, distributed, is_primary, say, together

FILES: dict[str, tuple[int, ...]] = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PATIENCE = 8.0  # seconds until a host that says nothing counts as unreachable
FAILURES = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    HTTPException,
    zlib.error,
    subprocess.SubprocessError,
)


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits: 8 x 8 grey PIL images, 10 classes, no download.

    The split is the same for all runs: 1,437 images to train, 360 to test. Both have the classes
    in the same proportion.
    """

    def __init__(self, train: bool) -> None:
        fit, held, of_fit, of_held = _digits()
        self.images = fit if train else held
        self.targets = of_fit if train else of_held

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.targets)


@cache
def _digits() -> list[np.ndarray]:
    """Return the pixels (images, 8, 8) to train on and to test on, then the labels of both."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, targets = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 255 / 16).round().astype("uint8")
    return train_test_split(pixels, targets, test_size=0.2, random_state=0, stratify=targets)


class Folder(ImageFolder):
    """Images in a folder for each class; what is hidden, or made by a system, is none of them."""

    def __init__(self, root: str) -> None:
        self.other: Counter[str] = Counter()
        """numbers of the files that are no images by their names, by ending"""
        super().__init__(root, loader=open_image, is_valid_file=self._is_image)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the classes, and the number of each."""
        found = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
        classes = sorted(name for name in found if not is_hidden(name))
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: number for number, name in enumerate(classes)}

    def _is_image(self, path: str) -> bool:
        inside = Path(path).relative_to(self.root).parts
        if any(map(is_hidden, inside)):
            return False
        if not is_image_file(path):
            self.other[Path(path).suffix or "no ending"] += 1
            return False
        return True


class Unlabelled(Dataset):
    """The images in a folder, in any nesting; nothing is known of their classes."""

    def __init__(self, root: str) -> None:
        if not Path(root).is_dir():
            raise ValueError(f"{root} is no folder of images")
        self.root = root
        self.loader = open_image
        self.samples: list[tuple[str, int]] = []
        for folder, inside, names in os.walk(root):
            inside[:] = [name for name in inside if not is_hidden(name)]
            for name in names:
                if is_image_file(name) and not is_hidden(name):
                    self.samples.append((os.path.join(folder, name), 0))
        self.samples.sort()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return self.loader(path), label

    def __len__(self) -> int:
        return len(self.samples)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or made by a system beside the user's."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def image_folder(root: str, split: str) -> Folder:
    """Return the images of ``root/split/CLASS/``; ValueError if there are none.

    One line tells of files that are no images by their names, such as ``.heic`` and ``.gif``.
    """
    if not Path(root, split).expanduser().is_dir():
        raise ValueError(
            f"data.root={root} has no folder {split}/: it must hold train/ and val/, with a "
            "folder of images for each class in both; set data.root, or SWITCHLORA_DATA"
        )
    try:
        found = Folder(f"{root}/{split}")
    except FileNotFoundError as error:
        raise ValueError(f"data.root={root}, folder {split}/: {first_line(error)}") from error
    if found.other and is_primary():
        kinds = ", ".join(f"{count} of {ending}" for ending, count in found.other.most_common(3))
        say(f"{root}/{split}: files that are no images by their names are left aside: {kinds}")
    return found


def torchvision_data(name: str, root: str, **options: Any) -> Dataset:
    """Return a data set of torchvision by its name; download it if it is not under ``root``.

    Of several processes the primary downloads, and the others wait. ValueError if it cannot be
    downloaded.
    """
    if name not in datasets.__all__:
        raise ValueError(f"torchvision has no data set '{name}'; {near(name, datasets.__all__)}")
    kind = getattr(datasets, name)

    def find() -> Dataset | None:
        try:
            return kind(root, **options)
        except RuntimeError:  # not there, or not whole
            return None

    return found_or_brought(find, lambda: download(kind, root, options))


def found_or_brought(find: Callable[[], Dataset | None], bring: Callable[[], None]) -> Dataset:
    """Return what ``find`` gives; before that let one process ``bring`` it where it is missing.

    That is the primary rank. Then it is the first rank of each machine whose disk still lacks it.
    """
    for brings in (is_primary(), distributed.local_rank() == 0):
        found = find()
        if any_rank(found is None) == [False]:
            break
        with together():
            if brings and found is None:
                bring()
    found = found or find()
    assert found is not None
    return found


def download(kind: type[Any], root: str, options: Mapping[str, Any]) -> None:
    """Say what is downloaded into ``root``, and do it; ValueError if that fails."""
    name = kind.__name__
    mirrors = getattr(kind, "mirrors", ["torchvision's host"])
    source = getattr(kind, "url", mirrors[0])
    archive = getattr(kind, "filename", "its files")
    folder = Path(root).expanduser()
    if (folder / archive).is_file():
        make_folder(folder, f"{name}: unpacking {archive}")
    else:
        make_folder(folder, f"{name}: downloading from {source}")
    try:
        with patience():
            kind(root, download=True, **options)
    except FAILURES as error:
        raise ValueError(
            f"{name} is not under {root} and could not be downloaded from {source} "
            f"({first_line(error)}); put {archive} from there into {root}, or use data=digits"
        ) from error


def fashion_mnist(root: str, train: bool, classes: Sequence[int] | None = None) -> Dataset:
    """Return Fashion-MNIST under ``root``; fetch it first if it is missing or damaged there.

    It comes from torchvision's host. If that is out of reach, it comes from Debian's package
    ``dataset-fashion-mnist``, which is unpacked without being installed. ValueError if neither
    works. Of several ranks one fetches. Several programs may call this at the same time: files
    appear whole or not at all.

    ``classes`` are the numbers of those to keep, all ten by default; see ``keep_classes``.
    """
    raw = Path(root).expanduser() / "FashionMNIST" / "raw"

    def find() -> Dataset | None:
        if any(problem(raw / name, shape) for name, shape in FILES.items()):
            return None
        return FashionMNIST(root, train=train)

    data = found_or_brought(find, lambda: fetch(raw))
    if classes is not None:
        keep_classes(data, classes)
    return data


def keep_classes(data: MNIST, classes: Sequence[int]) -> None:
    """Leave the images of some classes in ``data``, and number these from 0 in the given order.

    ValueError for a number that is no class, or is given twice.
    """
    known = range(len(data.classes))
    given = list(classes) if isinstance(classes, Sequence) else []
    if not given or len(set(given)) < len(given) or set(given) - set(known):
        raise ValueError(
            f"classes: {classes} are not some classes of {type(data).__name__}; give a list of "
            f"different numbers from 0 to {known[-1]}"
        )
    numbers = torch.full((len(known),), -1)
    numbers[given] = torch.arange(len(given))
    targets = numbers[data.targets]
    data.data, data.targets = data.data[targets >= 0], targets[targets >= 0]
    data.classes = [data.classes[number] for number in given]


def make_folder(folder: Path, purpose: str) -> None:
    """Make the folder of the data, and say what goes into it; ValueError if it cannot be made."""
    new = "" if folder.is_dir() else ", a new folder"
    if is_primary():
        print(f"{purpose} into {folder}{new}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.root: {folder} cannot be made ({error.strerror}); give a folder that you can "
            "write to by data.root, or SWITCHLORA_DATA"
        ) from error


def problem(path: Path, shape: tuple[int, ...]) -> str | None:
    """Return why ``path`` is not an idx file of bytes of this ``shape``, or None if it is one."""
    header = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
    if not path.is_file():
        return f"{path.name} is missing"
    with path.open("rb") as file:
        begin = file.read(len(header))
    if begin != header or path.stat().st_size != len(header) + prod(shape):
        return f"{path.name} is damaged"
    return None


def fetch(raw: Path) -> None:
    """Fill ``raw`` from the first source that works; say before which one is tried.

    ValueError if no source works.
    """
    failures = []
    sources = {
        FashionMNIST.mirrors[0]: from_torchvision,
        f"Debian's package {DEBIAN_PACKAGE}": from_debian,
    }
    for source, bring in sources.items():
        make_folder(raw, f"Fashion-MNIST: downloading from {source}")
        try:
            with TemporaryDirectory() as scratch:
                unpack(bring(Path(scratch)), raw)
            return
        except FAILURES as error:
            failures.append(f"{source}: {first_line(error)}")
    raise ValueError(
        f"Fashion-MNIST is not under {raw} and could not be fetched ({'; '.join(failures)}); "
        f"put the unpacked files {', '.join(FILES)} there, or use data=digits"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unpack(folder: Path, raw: Path) -> None:
    """Unpack the four ``.gz`` files of ``folder`` into ``raw``.

    Each is checked before it gets its final name. ValueError for one that lacks items.
    """
    raw.mkdir(parents=True, exist_ok=True)
    for name, shape in FILES.items():
        part = raw / f"{name}.part{os.getpid()}"
        try:
            with gzip.open(folder / f"{name}.gz") as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            if problem(part, shape):
                raise ValueError(f"{name}.gz does not hold {shape[0]:,} items")
            part.replace(raw / name)
        finally:
            part.unlink(missing_ok=True)


def from_torchvision(scratch: Path) -> Path:
    """Download with torchvision and return the folder of the files.

    First ask briefly whether one of its hosts answers. OSError if none does.
    """
    name, _ = FashionMNIST.resources[0]
    if not any(answers(mirror + name) for mirror in FashionMNIST.mirrors):
        raise OSError("its hosts do not answer")
    with patience():
        return Path(FashionMNIST(scratch, download=True).raw_folder)


@contextmanager
def patience() -> Iterator[None]:
    """Give up a connection after ``PATIENCE`` seconds of silence."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def answers(url: str) -> bool:
    """Return whether ``url`` can be opened within ``PATIENCE`` seconds, name look-up included."""
    opened = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD")).close()
            opened.set()
        except (OSError, HTTPException):
            pass
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    done.wait(PATIENCE)
    return opened.is_set()


def from_debian(scratch: Path) -> Path:
    """Return the folder of Debian's package: the installed one, else one in ``scratch``.

    The latter is downloaded and unpacked there. RuntimeError if a command fails.
    """
    if DEBIAN_FOLDER.is_dir():
        return DEBIAN_FOLDER
    command = ["apt-get", "-o", "Acquire::http::Timeout=10", "download", DEBIAN_PACKAGE]
    try:
        call(command, scratch)
    except RuntimeError:
        if os.geteuid() != 0:  # only root may update the lists
            raise
        call(["apt-get", "update"], scratch)
        call(command, scratch)
    package = next(scratch.glob("*.deb"))
    call(["dpkg-deb", "-x", package.name, "."], scratch)
    return scratch / DEBIAN_FOLDER.relative_to("/")


def call(command: list[str], folder: Path) -> None:
    """Run a command quietly in ``folder``; RuntimeError with its last line if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{command[0]}: {said}")
