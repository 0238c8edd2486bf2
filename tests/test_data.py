"""Data sets, splits, loaders and what they promise."""

import gzip
import inspect
import random
import re
import socket
import struct
import time
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import FakeData

from starts import Started, torchrun
from switchlora.data import (
    Split,
    build_data,
    crop_and_flip,
    decode,
    images as datasets,
    torchvision_data,
)
from switchlora.process import distributed, one_line

CONF = Path(__file__).parents[1] / "conf"
YAMLS = sorted({path.stem for path in (CONF / "data").glob("*.yaml")} - {"base", "bytes"})
RANDOM = {
    "scale": (0.3, 1.0),
    "color_jitter": None,
    "auto_augment": "rand-m9-mstd0.5",
    "re_prob": 1,
}
build = partial(instantiate, _convert_="all")


class Numbered(Dataset):
    """Image i is grey, of value i, with one white column; its class is i modulo 10."""

    def __init__(self, size=60, side=8, mode="L", seen=None):
        self.size, self.side, self.mode, self.seen = size, side, mode, seen
        self.targets = [i % 10 for i in range(size)]

    def __getitem__(self, index):
        if self.seen is not None:
            self.seen.append(index)
        image = Image.new("L", (self.side, self.side), index)
        image.paste(255, (0, 0, 1, self.side))
        return image.convert(self.mode), self.targets[index]

    def __len__(self):
        return self.size


def make(train=Numbered(), test=Numbered(20), **options):  # noqa: B008
    standard = {
        "num_classes": 10,
        "in_chans": 1,
        "image_size": 8,
        "mean": [0.0],
        "std": [1 / 255],
        "batch_size": 8,
        "val_fraction": 0.2,
        "seed": 3,
    }
    return build_data(train, test, **{**standard, **options})


def compose_data(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=[f"+data={name}", *overrides])


def epoch(data, number, start=0):
    data.set_epoch(number, start)
    return list(data.train)


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def names(loader):
    return sorted(int(image[0, 0, -1].round()) for images, _ in loader for image in images)


def test_loaders_yield_float_images_and_integer_targets():
    images, targets = next(iter(make().train))
    assert images.shape == (8, 1, 8, 8) and images.dtype == torch.float32
    assert targets.shape == (8,) and targets.dtype == torch.int64


def test_the_validation_split_is_cut_from_train_and_never_augmented():
    plain, augmented = make(batch_size=1), make(batch_size=1, crop_padding=3, hflip=1.0, seed=9)
    train, val = names(plain.train), names(plain.val)
    assert len(val) == 12 and sorted(train + val) == list(range(60))
    assert same(list(plain.val), list(augmented.val))
    assert same(list(plain.test), list(augmented.test))
    assert not same(epoch(plain, 0), epoch(augmented, 0))
    loaded = list(make(train_transform=RANDOM, eval_transform={"crop_pct": 1.0}, batch_size=1).val)
    assert same(loaded, list(plain.val))


def test_the_split_does_not_follow_the_seed_of_the_run():
    assert names(make(seed=1).val) == names(make(seed=2).val)
    few, fewer = (make(batch_size=1, train_size=n, seed=n) for n in (20, 10))
    assert set(names(fewer.train)) < set(names(few.train))


def test_evaluation_on_a_subset_is_on_the_same_one_for_every_seed():
    few, fewer = (make(batch_size=1, eval_size=n, seed=n) for n in (8, 4))
    for split in ("val", "test"):
        shown = names(getattr(few, split))
        assert len(shown) == 8 and set(names(getattr(fewer, split))) < set(shown)
    assert names(few.train) == names(make(batch_size=1, seed=8).train)
    assert len(names(make(eval_size=1000, batch_size=1).val)) == 12


def test_only_the_images_that_are_used_are_decoded():
    seen = []
    make(Numbered(seen=seen), train_size=10)
    assert len(seen) == 10 + 12


def test_test_is_the_official_split_in_order_and_complete():
    assert torch.cat([t for _, t in make().test]).tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize(
    "options", [{"crop_padding": 2, "hflip": 0.5}, {"train_transform": RANDOM}]
)
def test_order_of_an_epoch_depends_only_on_seed_and_epoch(options):
    first, second = make(**options), make(**options)
    list(second.train)
    torch.rand(5), np.random.rand(5), random.random()
    assert same(epoch(first, 4), epoch(second, 4))
    assert not same(epoch(first, 4), epoch(first, 5))
    assert not same(epoch(first, 4), epoch(make(**options, seed=4), 4))


@pytest.mark.parametrize(
    "options", [{"crop_padding": 2, "hflip": 0.5}, {"train_transform": RANDOM}]
)
def test_loading_leaves_the_generators_of_the_run_alone(options):
    data = make(**options)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    list(data.train), list(data.val)
    assert random.getstate() == before[0] and str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_workers_do_not_change_the_batches():
    alone, helped = (make(train_transform=RANDOM, workers=w) for w in (0, 2))
    for number in (0, 1):
        assert same(epoch(alone, number), epoch(helped, number))


@pytest.mark.parametrize(
    "options", [{"crop_padding": 2, "hflip": 0.5}, {"train_transform": RANDOM}]
)
def test_processes_share_each_batch_and_do_not_change_it(options):
    whole = make(**options)
    shares = [make(**options, rank=rank, world_size=2) for rank in (0, 1)]
    pairs = zip(*(epoch(share, 1) for share in shares), strict=True)
    joined = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in pairs]
    assert same(joined, epoch(whole, 1))
    assert sorted(names(shares[0].val) + names(shares[1].val)) == names(whole.val)


@pytest.mark.parametrize(
    "options", [{"crop_padding": 2}, {"train_transform": RANDOM, "workers": 1}]
)
def test_an_epoch_can_start_in_its_middle(options):
    data = make(**options)
    assert same(epoch(data, 2, start=3), epoch(data, 2)[3:])


def test_a_crop_shifts_by_at_most_the_padding_and_a_flip_mirrors():
    images = torch.randint(1, 256, (200, 2, 5, 6), dtype=torch.uint8)
    draws = torch.randint(2**62, (200,))
    assert torch.equal(crop_and_flip(images, draws, 0, 1.0), images.flip(-1))
    share = (crop_and_flip(images, draws, 0, 0.25) != images).flatten(1).any(1).float().mean()
    assert 0.1 < share < 0.4
    padded = nn.functional.pad(images, [1] * 4)
    shifts = set()
    for image, frame in zip(crop_and_flip(images, draws, 1, 0.0), padded, strict=True):
        places = [(y, x) for y in range(3) for x in range(3)]
        found = [p for p in places if torch.equal(image, frame[:, p[0] :, p[1] :][:, :5, :6])]
        shifts.add(*found)
    assert len(shifts) == 9


def test_arrays_and_images_decode_to_the_same_bytes(fashion_root):
    rows = torch.tensor([5, 2, 59_999])
    known = datasets.FashionMNIST(fashion_root, train=True)
    images = [known[int(row)] for row in rows]
    fast = decode(Split("train", known, rows, 1), (1, 28, 28))
    slow = decode(Split("train", images, torch.arange(3), 1), (1, 28, 28))
    assert same([fast], [slow]) and fast[1].tolist() == [5, 2, 9]


def test_colour_images_keep_their_channels_in_order():
    coloured = [(Image.new("RGB", (8, 8), (1, 2, 3)), 0)]
    images, _ = decode(Split("train", coloured, torch.arange(1), 3), (3, 8, 8))
    assert images[0, :, 4, 4].tolist() == [1, 2, 3]


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
def test_mixup_gives_soft_targets_that_sum_to_one(options):
    data = make(**options, label_smoothing=0.1)
    images, targets = data.mixup(*next(iter(data.train)))
    assert images.shape == (8, 1, 8, 8) and targets.shape == (8, 10)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    assert data.loss(torch.zeros(8, 10), targets).item() == pytest.approx(np.log(10), rel=1e-5)


def test_mixing_depends_only_on_seed_epoch_and_batch():
    data = make(mixup_alpha=0.8, cutmix_alpha=1.0)
    whole = [data.mixup(*batch) for batch in epoch(data, 1)]
    np.random.rand(7)
    again = [data.mixup(*batch) for batch in epoch(data, 1, start=2)]
    assert same(whole[2:], again)
    other = [data.mixup(*batch) for batch in epoch(data, 2)]
    assert not same(whole, other)


def test_the_loss_follows_mixup_and_smoothing():
    assert type(make().loss) is nn.CrossEntropyLoss and make().mixup is None
    assert type(make(label_smoothing=0.1).loss) is LabelSmoothingCrossEntropy
    assert type(make(label_smoothing=0.1, mixup_alpha=0.2).loss) is SoftTargetCrossEntropy


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"val_fraction": 0.0}, "val_fraction=0.0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": 0.001}, "cuts 0 of 60"),
        ({"batch_size": 49}, "batch_size=49 .* 48 training images"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 9, "world_size": 2}, "shared equally by 2"),
        ({"train_size": 49}, "train_size=49"),
        ({"train_size": 0}, "train_size=0"),
        ({"eval_size": 0}, "data.eval_size is 0"),
        ({"image_size": 9}, "8 x 8 pixels, but .*image_size=9"),
        ({"train": Numbered(mode="RGB")}, "3 channels .*in_chans=1"),
        ({"train": Numbered(mode="RGB"), "eval_transform": {}}, "3 channels.*in_chans=1"),
        ({"mean": [0, 0, 0]}, "data.mean and data.std need 1"),
        ({"num_classes": 9}, "0 to 9, but data.num_classes=9"),
        ({"num_classes": 9, "eval_transform": {}}, "0 to 9, but data.num_classes=9"),
        ({"batch_size": 7, "mixup_alpha": 1.0}, "even batch"),
        ({"hflip": 0.5, "train_transform": {}}, "data.hflip"),
        ({"train_transform": {"nonsense": 1}}, "nonsense"),
        ({"train": iter("abc")}, "no length"),
        ({"test": Numbered(0)}, "empty"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, says):
    with pytest.raises(ValueError, match=says) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", YAMLS)
def test_every_data_config_composes_and_has_the_keys_of_build_data(name):
    config = OmegaConf.to_container(compose_data(name, "data.num_classes=10").data, resolve=True)
    known = set(inspect.signature(build_data).parameters)
    given_by_the_run = {"seed", "workers", "pin_memory", "rank", "world_size"}
    assert config.pop("_target_") == "switchlora.data.build_data"
    assert known - set(config) <= given_by_the_run | {"root"}
    assert set(config) <= known - given_by_the_run
    for split in ("train", "test"):
        assert "root" in config or "root" not in config[split]


def test_the_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SWITCHLORA_DATA", "/somewhere")
    assert compose_data("fashion_mnist").data.train.root == "/somewhere"
    monkeypatch.delenv("SWITCHLORA_DATA")
    assert compose_data("fashion_mnist").data.test.root == "data"
    assert compose_data("cifar10", "data.root=/here").data.train.root == "/here"


def test_digits_are_split_four_to_one_with_every_class_on_both_sides():
    data = build(compose_data("digits").data, seed=0)
    assert len(data.train.dataset) + len(data.val.dataset) == 1437
    targets = torch.cat([t for _, t in data.test])
    assert len(targets) == 360 and targets.bincount().min() >= 33
    pixels = torch.cat([images for images, _ in data.train])
    assert abs(pixels.mean()) < 0.02 and abs(pixels.std() - 1) < 0.02


def test_fake_data_follow_the_sizes_of_the_config():
    overrides = ("data.image_size=16", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]")
    data = build(compose_data("fake", *overrides, "data.num_classes=7").data, seed=0)
    images, targets = next(iter(data.train))
    assert images.shape == (8, 1, 16, 16) and targets.max() < 7
    assert len(data.train) == 6 and len(data.test) == 1
    shapes = {images.shape[1:] for images, _ in build(compose_data("fake").data).val}
    assert shapes == {(3, 224, 224)}


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
def test_folders_of_images_of_any_size_are_resized_and_augmented(name, tmp_path):
    for part, count in (("train", 10), ("val", 2)):
        for folder in ("cat", "dog"):
            (tmp_path / part / folder).mkdir(parents=True)
            for i in range(count):
                image = FakeData(size=count, image_size=(3, 40 + i, 50))[i][0]
                image.save(tmp_path / part / folder / f"{i}.png")
    sizes = ("data.num_classes=2", "data.image_size=32", "data.batch_size=4")
    config = compose_data(name, f"data.root={tmp_path}", "data.val_fraction=0.1", *sizes).data
    data = build(config, seed=0)
    assert [len(loader.dataset) for loader in (data.train, data.val, data.test)] == [18, 2, 4]
    assert next(iter(data.train))[0].shape == (4, 3, 32, 32)
    assert torch.cat([targets for _, targets in data.test]).tolist() == [0, 0, 1, 1]


class Hosted(Numbered):
    """A data set that is there once it was downloaded, as those of torchvision are."""

    url = "https://host/numbered.tar.gz"
    filename = "numbered.tar.gz"

    def __init__(self, root, train=True, download=False):
        super().__init__(60 if train else 20)
        if download:
            print("downloads")
            (root / "numbers").touch()
        if not (root / "numbers").exists():
            raise RuntimeError("not there")


def test_a_download_is_told_before_it_begins_and_what_is_there_is_read_without_a_word(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Hosted)
    root = tmp_path / "nonexistent"
    assert len(torchvision_data("CIFAR10", root, train=True)) == 60
    told = f"Hosted: downloading from {Hosted.url} into {root}, a new folder\ndownloads\n"
    assert capsys.readouterr().out == told
    assert len(torchvision_data("CIFAR10", root, train=False)) == 20
    assert capsys.readouterr().out == ""


def test_grey_images_become_colour_where_three_channels_are_asked_for():
    data = make(in_chans=3, mean=[0.0] * 3, std=[1 / 255] * 3)
    images, _ = next(iter(data.test))
    assert images.shape == (8, 3, 8, 8) and torch.equal(images[:, 0], images[:, 2])


def fetch_together(folder):
    """On each rank: bring a data set that is missing, slowly; note who did."""
    distributed.join()
    there = folder / "set"

    def bring():
        time.sleep(0.5)
        there.write_text(f"brought by rank {distributed.rank()}")
        with (folder / "brings").open("a") as file:
            file.write(f"{distributed.rank()}\n")

    def find():
        return there.read_text() if there.exists() else None

    found = datasets.found_or_brought(find, bring)
    (folder / f"found-{distributed.rank()}").write_text(found)
    distributed.leave()


def test_of_several_ranks_the_primary_downloads_and_the_others_wait(tmp_path):
    with Started(tmp_path / "said", torchrun, 2, fetch_together, tmp_path) as started:
        done = started.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "brings").read_text() == "0\n"
    assert {(tmp_path / f"found-{rank}").read_text() for rank in (0, 1)} == {"brought by rank 0"}


def mistake(name, *overrides):
    """The one line on data that cannot be built."""
    with pytest.raises(InstantiationException) as caught:
        build(compose_data(name, *overrides).data)
    return one_line(caught.value)


def test_without_a_network_it_is_told_which_file_to_put_where(tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
    said = mistake("cifar10", f"data.root={tmp_path}")
    assert said.startswith(
        f"CIFAR10 is not under {tmp_path} and could not be downloaded from {url}"
    )
    assert f"put cifar-10-python.tar.gz from there into {tmp_path}" in said


def test_a_file_that_a_user_put_there_is_unpacked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Hosted)
    (tmp_path / "numbered.tar.gz").touch()
    torchvision_data("CIFAR10", tmp_path, train=True)
    assert "Hosted: unpacking numbered.tar.gz" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_a_root_that_cannot_be_made_is_told(name, tmp_path):
    (tmp_path / "file").touch()
    said = mistake(name, f"data.root={tmp_path}/file/data")
    assert said.startswith(f"data.root: {tmp_path}/file/data") and "cannot be made" in said


def test_a_data_set_that_torchvision_lacks_is_told_with_its_neighbours(tmp_path):
    said = mistake("cifar10", "data.train.name=CIFAR11", f"data.root={tmp_path}")
    assert re.match("torchvision has no data set 'CIFAR11'; near names: .*CIFAR100", said)


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
def test_folders_without_images_are_refused_with_what_they_must_hold(name, tmp_path):
    words = (f"data.root={tmp_path}", "data.num_classes=2")
    assert "has no folder train/: it must hold train/ and val/" in mistake(name, *words)
    (tmp_path / "train").mkdir()
    assert f"{tmp_path}, folder train/: Couldn't find any class folder" in mistake(name, *words)
    (tmp_path / "train" / "cat").mkdir()
    assert "Found no valid file for the classes cat" in mistake(name, *words)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "0.png")
    assert "has no folder val/" in mistake(name, *words)


# Fashion-MNIST: the files below have its true sizes, and images of zeros.


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    for name, shape in datasets.FILES.items():
        header = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
        body = bytes(prod(shape)) if len(shape) == 3 else bytes(range(10)) * (shape[0] // 10)
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + body, compresslevel=1))
    return folder


@pytest.fixture(scope="module")
def fashion_root(package, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    datasets.unpack(package, root / "FashionMNIST" / "raw")
    return root


@pytest.fixture
def closed(monkeypatch, tmp_path):
    """No network, no installed package, and no other program than those of the test."""
    monkeypatch.setattr(datasets, "answers", lambda url: False)
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", Path("/usr/share/datasets/not-here"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(path, script):
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    path.chmod(0o755)


def test_fashion_mnist_in_its_place_is_read_without_a_word(fashion_root, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "fetch", lambda raw: pytest.fail("fetched"))
    assert len(datasets.fashion_mnist(str(fashion_root), train=True)) == 60_000
    assert len(datasets.fashion_mnist(str(fashion_root), train=False)) == 10_000
    assert capsys.readouterr().out == ""


def test_some_classes_of_fashion_mnist_are_kept_and_numbered_as_they_are_given(fashion_root):
    data = datasets.FashionMNIST(fashion_root, train=False)
    data.data += data.targets[:, None, None].byte()  # a pixel tells the class
    datasets.keep_classes(data, [7, 2])
    assert len(data) == 2_000 and data.classes == ["Sneaker", "Pullover"]
    assert data.targets[:4].tolist() == [1, 0, 1, 0]
    assert torch.equal(torch.tensor([7, 2])[data.targets], data.data[:, 0, 0].long())


def test_a_run_on_some_classes_has_labels_and_names_of_these(fashion_root):
    words = ("+data.train.classes=[5,9]", "+data.test.classes=[5,9]", "data.num_classes=2")
    data = build(compose_data("fashion_mnist", *words, f"data.root={fashion_root}").data, seed=0)
    assert data.classes == ("Sandal", "Ankle boot")
    assert len(data.val.dataset) == 1_200 and len(data.test.dataset) == 2_000


@pytest.mark.parametrize("classes", [[], [3, 3], [10], [-1, 2], 5, "Bag", ["Bag"]])
def test_classes_that_there_are_not_are_told(classes, fashion_root):
    with pytest.raises(ValueError, match=r"are not some classes of FashionMNIST; give .* 0 to 9"):
        datasets.fashion_mnist(str(fashion_root), train=False, classes=classes)


def test_the_default_data_are_fashion_mnist_with_the_official_split(fashion_root):
    data = build(compose_data("fashion_mnist", f"data.root={fashion_root}").data, seed=0)
    sizes = [len(loader.dataset) for loader in (data.train, data.val, data.test)]
    assert sizes == [54_000, 6_000, 10_000] and len(data.train) == 421


def test_fashion_mnist_comes_from_an_installed_package(package, closed, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", package)
    assert len(datasets.fashion_mnist(str(closed / "data"), train=False)) == 10_000
    raw = closed / "data" / "FashionMNIST" / "raw"
    assert capsys.readouterr().out.splitlines() == [
        f"Fashion-MNIST: downloading from {datasets.FashionMNIST.mirrors[0]} into {raw}, "
        "a new folder",
        f"Fashion-MNIST: downloading from Debian's package dataset-fashion-mnist into {raw}",
    ]
    assert sorted(path.name for path in raw.iterdir()) == sorted(datasets.FILES)


def test_fashion_mnist_comes_from_a_package_that_is_downloaded_and_not_installed(package, closed):
    program(closed / "bin" / "apt-get", "touch fashion.deb")
    target = datasets.DEBIAN_FOLDER.relative_to("/")
    program(
        closed / "bin" / "dpkg-deb",
        f'test "$*" = "-x fashion.deb ." && mkdir -p {target} && cp {package}/*.gz {target}',
    )
    assert len(datasets.fashion_mnist(str(closed / "data"), train=True)) == 60_000


@pytest.mark.parametrize("user", [0, 1000])
def test_only_root_updates_the_package_lists(user, closed, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: user)
    program(closed / "bin" / "apt-get", f'echo "$*" >> {closed}/calls; echo "E: no" >&2; exit 100')
    with pytest.raises(RuntimeError, match="apt-get: E: no"):
        datasets.from_debian(closed)
    assert ("update" in (closed / "calls").read_text().split()) == (user == 0)


def test_a_damaged_file_is_fetched_again_and_an_unpack_leaves_no_half_file(
    package, closed, monkeypatch
):
    raw = closed / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(bytes(10))
    broken = closed / "broken"
    broken.mkdir()
    for path in package.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", broken)
    with pytest.raises(ValueError):
        datasets.fashion_mnist(str(closed / "data"), train=False)
    assert [path.name for path in raw.iterdir()] == ["t10k-labels-idx1-ubyte"]
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", package)
    assert datasets.fashion_mnist(str(closed / "data"), train=False)[7][1] == 7


def test_one_line_says_what_was_tried_when_every_source_fails(closed):
    with pytest.raises(ValueError) as caught:
        datasets.fashion_mnist(str(closed / "data"), train=True)
    message = str(caught.value)
    assert "\n" not in message
    assert "do not answer" in message and "apt-get" in message
    assert "data=digits" in message and "FashionMNIST/raw" in message


def test_a_host_that_never_answers_costs_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        mirror = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [mirror])
        start = time.monotonic()
        with pytest.raises(OSError, match="do not answer"):
            datasets.from_torchvision(tmp_path)
    assert time.monotonic() - start < 5
