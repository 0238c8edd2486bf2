"""Data sets beyond torchvision: Digits, and Fashion-MNIST from several sources."""

import gzip
import os
import shutil
import socket
import struct
import subprocess
import threading
import urllib.request
import zlib
from http.client import HTTPException
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import FashionMNIST

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
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, targets = load_digits(return_X_y=True)
        pixels = (images.reshape(-1, 8, 8) * 255 / 16).round().astype("uint8")
        parts = train_test_split(pixels, targets, test_size=0.2, random_state=0, stratify=targets)
        self.images, self.targets = (parts[0], parts[2]) if train else (parts[1], parts[3])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.targets)


def fashion_mnist(root: str, train: bool) -> FashionMNIST:
    """Return Fashion-MNIST under ``root``; fetch it first if it is missing or damaged there.

    It comes from torchvision's host. If that is out of reach, it comes from Debian's package
    ``dataset-fashion-mnist``, which is unpacked without being installed. ValueError if neither
    works. Several processes may call this at the same time: files appear whole or not at all.
    """
    raw = Path(root) / "FashionMNIST" / "raw"
    if any(problem(raw / name, shape) for name, shape in FILES.items()):
        fetch(raw)
    return FashionMNIST(root, train=train)


def problem(path: Path, shape: tuple[int, ...]) -> str | None:
    """Return why ``path`` is not an idx file of bytes of this ``shape``, or None if it is one."""
    header = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
    if not path.is_file():
        return f"{path.name} is missing"
    with path.open("rb") as file:
        whole = file.read(len(header)) == header
    if not whole or path.stat().st_size != len(header) + prod(shape):
        return f"{path.name} is damaged"
    return None


def fetch(raw: Path) -> None:
    """Fill ``raw`` from the first source that works, and print which one it was.

    ValueError if no source works.
    """
    failures = []
    for source, bring in (("torchvision", from_torchvision), ("Debian's package", from_debian)):
        try:
            with TemporaryDirectory() as scratch:
                unpack(bring(Path(scratch)), raw)
            print(f"Fashion-MNIST: fetched from {source} into {raw}", flush=True)
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
    name = FashionMNIST.resources[0][0]
    if not any(answers(mirror + name) for mirror in FashionMNIST.mirrors):
        raise OSError("its hosts do not answer")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        return Path(FashionMNIST(scratch, download=True).raw_folder)
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
        if os.geteuid() != 0:
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
