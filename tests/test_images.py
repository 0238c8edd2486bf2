"""Images of every mode, depth and state of repair, and the labels and folders that they are in."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from conf_yamls import CONF, build, composed
from switchlora.data import image_folder
from switchlora.data.augment import build_transform
from switchlora.data.loaders import build_data
from switchlora.data.pixels import standard
from switchlora.errors import DataUnusable
from switchlora.learner import evaluate
from switchlora.run import prepare

SIDE = 8
SIXTEEN = np.uint16(257)
PLAIN = {"train_transform": {"no_aug": True}, "eval_transform": {"crop_pct": 1.0}}


def grey(value, mode="L"):
    return Image.new("L", (SIDE, SIDE), value).convert(mode)


def deep(value):
    """A 16-bit image as bright as an 8-bit one of this value."""
    return Image.fromarray(np.full((SIDE, SIDE), value * SIXTEEN, dtype=np.uint16))


def folders(root, counts=(6, 2), save=lambda value: grey(value, "RGB"), ending="png"):
    """``root``/{train,val}/{a,b,c}, of 0, 100 and 200 in brightness."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for value, name in zip((0, 100, 200), "abc", strict=True):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                save(value).save(folder / f"{number}.{ending}")
    return root


def make(train, test, **options):
    standard_options = {
        "num_classes": 3,
        "in_chans": 3,
        "image_size": SIDE,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "batch_size": 2,
        "val_fraction": 0.25,
    }
    return build_data(train, test, **{**standard_options, **options})


def of_folders(root, **options):
    return make(image_folder(str(root), "train"), image_folder(str(root), "val"), **options)


class Items(Dataset):
    """Images, or what is said to be one, with the labels 0, 1, 2, 0, ..."""

    def __init__(self, images, labels=None):
        self.images = images
        self.labels = labels or [number % 3 for number in range(len(images))]

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def __len__(self):
        return len(self.images)


def brightness(loader):
    """{class: mean pixel, from 0 to 255}"""
    found = {}
    for images, labels in loader:
        for image, label in zip(images, labels.tolist(), strict=True):
            found.setdefault(label, []).append(float(image.mean()) * 255)
    return {label: float(np.mean(found[label])) for label in sorted(found)}


# Mode and depth


SAVED = {
    "L": ("png", grey),
    "P": ("png", lambda value: grey(value).convert("P")),
    "LA": ("png", lambda value: grey(value, "LA")),
    "RGBA": ("png", lambda value: grey(value, "RGBA")),
    "16 bit PNG": ("png", deep),
    "16 bit TIFF": ("tiff", deep),
    "16 bit PGM": ("pgm", deep),
    "CMYK": ("tiff", lambda value: grey(value, "RGB").convert("CMYK")),
    "CMYK JPEG": ("jpg", lambda value: grey(value, "RGB").convert("CMYK")),
    "BMP": ("bmp", grey),
    "WebP": ("webp", lambda value: grey(value, "RGB")),
}


@pytest.mark.parametrize("transforms", [{}, PLAIN], ids=["in memory", "transformed"])
@pytest.mark.parametrize("kind", SAVED)
def test_every_mode_and_depth_in_a_folder_is_as_bright_as_it_was_saved(kind, transforms, tmp_path):
    ending, save = SAVED[kind]
    data = of_folders(folders(tmp_path, save=save, ending=ending), **transforms)
    assert list(brightness(data.test).values()) == pytest.approx([0, 100, 200], abs=2)


GIVEN = {
    "16 bit array": lambda value: np.full((SIDE, SIDE), value * SIXTEEN, dtype=np.uint16),
    "16 bit image": deep,
    "array": lambda value: np.full((SIDE, SIDE, 3), value, dtype=np.uint8),
    "grey array": lambda value: np.full((SIDE, SIDE, 1), value, dtype=np.uint8),
    "tensor": lambda value: torch.full((SIDE, SIDE), value, dtype=torch.uint8),
    "palette": lambda value: grey(value).convert("P"),
}


@pytest.mark.parametrize("transforms", [{}, PLAIN], ids=["in memory", "transformed"])
@pytest.mark.parametrize("kind", GIVEN)
def test_a_data_set_of_ones_own_is_read_in_the_same_way(kind, transforms):
    items = Items([GIVEN[kind](value) for value in (0, 100, 200)] * 4)
    data = make(items, items, **transforms)
    assert list(brightness(data.test).values()) == pytest.approx([0, 100, 200], abs=1)


def test_torchvisions_own_folders_are_read_in_the_same_way(tmp_path):
    folders(tmp_path, save=deep)
    train, test = (ImageFolder(tmp_path / split) for split in ("train", "val"))
    assert list(brightness(make(train, test).test).values()) == pytest.approx([0, 100, 200])


@pytest.mark.parametrize("transforms", [{}, PLAIN], ids=["in memory", "transformed"])
@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((SIDE, SIDE), 0.5, dtype=np.float32)),
        Image.fromarray(np.full((SIDE, SIDE), 70_000, dtype=np.int32)),
        np.full((SIDE, SIDE, 3), 0.5),
        torch.zeros(3, SIDE, SIDE),
        "image.png",
        None,
    ],
    ids=["mode F", "mode I", "array of floats", "tensor of floats", "path", "nothing"],
)
def test_pixels_of_an_unknown_range_are_refused_by_name(image, transforms):
    items = Items([grey(1, "RGB")] * 12)
    other = Items([image] * 12)
    with pytest.raises(DataUnusable, match=r"test image, item 0 of Items: .*range") as caught:
        make(items, other, **transforms)
    assert "\n" not in str(caught.value)


def test_a_float_image_in_a_folder_is_refused_by_its_header_before_training(tmp_path):
    folders(tmp_path, (20, 12))
    last = tmp_path / "val" / "c" / "9.tiff"
    Image.fromarray(np.zeros((SIDE, SIDE), dtype=np.float32)).save(last)
    with pytest.raises(DataUnusable, match=f"test image {last}: .*mode F.*save it with 8 or 16"):
        of_folders(tmp_path, **PLAIN)


def test_a_tiff_of_12_bits_or_with_white_as_zero_is_not_taken_for_one_of_16(tmp_path):
    deep(100).save(tmp_path / "white.tiff", tiffinfo={262: 0})
    with Image.open(tmp_path / "white.tiff") as image:
        if image.tag_v2[262] == 0:
            with pytest.raises(ValueError, match="range"):
                standard(image, 1)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_a_late_image_of_another_mode_is_converted(mode, tmp_path):
    folders(tmp_path)
    saved = grey(255, "RGB").convert(mode)
    saved.save(tmp_path / "train" / "c" / ("5.tiff" if mode == "CMYK" else "5.png"))
    aug = {"train_transform": {"auto_augment": "rand-m9-mstd0.5-inc1"}, "eval_transform": {}}
    data = of_folders(tmp_path, **aug)
    for _ in range(3):
        assert all(images.shape == (2, 3, SIDE, SIDE) for images, _ in data.train)


@pytest.mark.parametrize("transforms", [{}, PLAIN], ids=["in memory", "transformed"])
def test_late_colour_in_grey_data_is_refused_by_name(transforms):
    items = Items([grey(9)] * 12)
    coloured = Items([grey(9)] * 7 + [grey(9, "RGB")])
    words = {"in_chans": 1, "mean": [0.0], "std": [1.0], **transforms}
    with pytest.raises(DataUnusable, match=r"item 7 of Items: it has 3 channels .*in_chans=1"):
        make(items, coloured, **words)


# Folders and classes


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    folders(tmp_path)
    for name in (".ipynb_checkpoints", "__MACOSX", "a/.thumbnails", "a/@eaDir"):
        (tmp_path / "train" / name).mkdir()
        grey(9).save(tmp_path / "train" / name / "0.png")
    (tmp_path / "train" / "b" / "._0.png").write_bytes(b"Mac OS X")
    found = image_folder(str(tmp_path), "train")
    assert found.classes == ["a", "b", "c"] and len(found) == 18


def test_files_that_are_no_images_by_their_names_are_told(tmp_path, capsys):
    folders(tmp_path)
    for name in ("0.heic", "1.heic", "2.gif", "._3.gif", "Thumbs"):
        (tmp_path / "train" / "a" / name).write_bytes(b"x")
    assert len(image_folder(str(tmp_path), "train")) == 18
    said = capsys.readouterr().out
    assert "no images by their names are left aside: 2 of .heic" in said
    assert "1 of .gif" in said and "1 of no ending" in said
    image_folder(str(tmp_path), "val")
    assert not capsys.readouterr().out


def test_more_classes_than_the_folders_are_told(tmp_path, capsys):
    of_folders(folders(tmp_path), num_classes=5)
    assert "warning: data.num_classes=5, but the data have 3 classes" in capsys.readouterr().out
    of_folders(tmp_path)
    assert "warning" not in capsys.readouterr().out


def test_names_of_classes_may_hold_any_letters(tmp_path):
    folders(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "b").rename(tmp_path / split / "zwei Wörter, = ✓")
    assert brightness(of_folders(tmp_path).test) == pytest.approx({0: 0, 1: 200, 2: 100}, abs=1)


def test_odd_images_of_one_folder_are_read_without_a_warning(tmp_path):
    """A palette with transparency, one pixel, a turned photograph, a file in capitals."""
    folders(tmp_path)
    inside = tmp_path / "train" / "a"
    noise(1).quantize(16).save(inside / "6.png", transparency=bytes(range(0, 160, 10)))
    noise(2).resize((1, 1)).save(inside / "7.PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(3).resize((8, 4)).save(inside / "8.jpg", exif=turned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = of_folders(tmp_path, **PLAIN, batch_size=1)
        assert sum(len(images) for images, _ in data.train) + len(data.val.dataset) == 21


def test_a_root_below_a_hidden_folder_is_read(tmp_path):
    folders(tmp_path / ".cache" / "set")
    assert len(image_folder(str(tmp_path / ".cache" / "set"), "val")) == 6


@pytest.mark.parametrize("transforms", [{}, PLAIN], ids=["in memory", "transformed"])
def test_the_classes_of_test_are_those_of_train_by_name(transforms, tmp_path):
    folders(tmp_path)
    shutil.rmtree(tmp_path / "val" / "a")
    found = brightness(of_folders(tmp_path, **transforms).test)
    assert found == pytest.approx({1: 100, 2: 200}, abs=1)


def test_a_class_that_training_lacks_is_refused_by_its_name(tmp_path):
    folders(tmp_path)
    (tmp_path / "val" / "a").rename(tmp_path / "val" / "A")
    with pytest.raises(
        ValueError, match="the test split in .*/val has a class 'A' that the train"
    ):
        of_folders(tmp_path)


# Labels


@pytest.mark.parametrize("transforms", [{}, PLAIN], ids=["in memory", "transformed"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"mixup_alpha": 0.5}])
@pytest.mark.parametrize("label", [3, -1, 0.5, "cat", None, torch.tensor(7)], ids=str)
def test_a_label_that_is_no_class_is_told_before_a_device_sees_it(label, options, transforms):
    good, bad = (Items([grey(1, "RGB")] * 12, [1] * 11 + [last]) for last in (1, label))
    for place, pair in {"train": (bad, good), "test": (good, bad)}.items():
        with pytest.raises(DataUnusable, match="item 11 of Items: its label is") as caught:
            data = make(*pair, val_fraction=0.1, batch_size=2, **options, **transforms)
            list(data.train), list(data.val), list(data.test)
        assert str(caught.value).startswith(place) or place == "train"
        assert "allows 0 to 2" in str(caught.value) or "no class number" in str(caught.value)


def test_labels_that_are_known_are_told_with_split_and_class(tmp_path):
    folders(tmp_path)
    with pytest.raises(ValueError, match=r"train labels run from 0 to 2 \('c'\), but .*0 to 1"):
        of_folders(tmp_path, num_classes=2, **PLAIN)


# Damage


def cut(path):
    """Half of the file, as after a download that broke off."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def noise(value):
    pixels = np.random.default_rng(value).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "tiff", "webp", "ppm"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_named_with_its_split_and_the_way_to_go_on(ending, split, tmp_path):
    folders(tmp_path, (6, 3), noise, ending)
    broken = tmp_path / split / "b" / f"2.{ending}"
    cut(broken)
    with pytest.raises(DataUnusable) as caught:
        data = of_folders(tmp_path, **PLAIN, image_size=SIDE, batch_size=1, val_fraction=0.1)
        list(data.train), list(data.val), list(data.test)
    said = str(caught.value)
    assert str(broken) in said and "data.skip_unreadable=true" in said and "\n" not in said
    assert said.startswith("test image" if split == "val" else ("train image", "val image"))


@pytest.mark.parametrize("damage", ["empty", "no image", "gone", "a loop"])
def test_what_is_no_image_is_told_from_its_header_before_training(damage, tmp_path):
    root = folders(tmp_path / "set", (20, 12))
    broken = root / "val" / "c" / "9.png"
    if damage == "empty":
        broken.write_bytes(b"")
    if damage == "no image":
        broken.write_text("<html>404</html>")
    if damage in ("gone", "a loop"):
        broken.unlink()
        broken.symlink_to(broken if damage == "a loop" else root / "nowhere")
    with pytest.raises(DataUnusable, match=f"^test image {broken}: "):
        of_folders(root, **PLAIN)


def test_what_a_worker_could_not_read_is_told_in_one_line(tmp_path):
    folders(tmp_path, (20, 2), noise)
    for number in range(20):
        cut(tmp_path / "train" / "c" / f"{number}.png")
    with pytest.raises(DataUnusable, match=f"^train image {tmp_path}/train/c/.*") as caught:
        data = of_folders(tmp_path, **PLAIN, workers=1)
        list(data.train)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_named_and_counted(workers, tmp_path):
    folders(tmp_path, (8, 3), noise)
    broken = [tmp_path / "train" / "a" / "1.png", tmp_path / "val" / "b" / "2.png"]
    for path in broken:
        cut(path)
    words = {**PLAIN, "workers": workers, "skip_unreadable": True}
    data = of_folders(tmp_path, **words)
    batches = [*data.train, *data.val]
    assert all(len(images) == 2 and labels.max() < 3 for images, labels in data.train)
    labels = torch.cat([labels for _, labels in data.test])
    assert labels.tolist() == [0, 0, 0, 1, 1, -100, 2, 2, 2]
    told = " ".join(data.skipped())
    assert len(data.skipped()) == 2 and all(str(path) in told for path in broken) and batches


def test_images_in_memory_are_skipped_too(tmp_path):
    folders(tmp_path, (8, 3), noise)
    cut(tmp_path / "val" / "b" / "2.png")
    data = of_folders(tmp_path, image_size=64, skip_unreadable=True)
    assert len(data.skipped()) == 1 and -100 in torch.cat([t for _, t in data.test])


def test_an_image_that_is_skipped_counts_in_no_metric():
    class Right(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            return 50 * torch.eye(3)[[0, 1, 2]] * self.weight

    batch = (torch.zeros(3, 1), torch.tensor([0, -100, 2]))
    found = evaluate(Right(), [batch])
    assert found["top1"] == pytest.approx(100) and found["loss"] == pytest.approx(0, abs=1e-6)


def test_a_split_without_a_readable_image_is_told(tmp_path):
    folders(tmp_path, (4, 2), noise)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataUnusable, match="images in a row cannot be read; the last is test"):
        of_folders(tmp_path, **PLAIN, skip_unreadable=True)


def test_too_many_open_files_are_no_damage():
    class Busy(Items):
        def __getitem__(self, index):
            raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many open files") as caught:
        make(Busy([0] * 12), Busy([0] * 12), skip_unreadable=True)
    assert not isinstance(caught.value, DataUnusable)


# The digest


def digest(root, **options):
    return of_folders(root, **{**PLAIN, **options}).digest()


@pytest.mark.parametrize("options", [{}, {"train_transform": None, "eval_transform": None}])
@pytest.mark.parametrize("split", ["train", "val"])
def test_changed_images_have_another_digest_and_moved_ones_the_same(split, options, tmp_path):
    folders(tmp_path / "set")
    before = digest(tmp_path / "set", **options)
    shutil.copytree(tmp_path / "set", tmp_path / "elsewhere" / "copy")
    assert digest(tmp_path / "elsewhere" / "copy", **options) == before
    path = tmp_path / "set" / split / "b" / "1.png"
    size = path.stat().st_size
    content = bytearray(path.read_bytes())
    grey(101, "RGB").save(path)
    assert digest(tmp_path / "set", **options) != before
    path.write_bytes(content)
    assert digest(tmp_path / "set", **options) == before and path.stat().st_size == size
    shutil.copy(path, path.with_name("9.png"))
    assert digest(tmp_path / "set", **options) != before


def test_a_data_set_that_draws_at_random_has_one_digest():
    class Random(Items):
        def __getitem__(self, index):
            return Image.fromarray(np.random.randint(0, 256, (8, 8, 3), dtype=np.uint8)), 0

    items = Random([0] * 12)
    assert make(items, items, **PLAIN).digest() == make(items, items, **PLAIN).digest()


# Augmentation


def shipped():
    """Every ``auto_augment`` in a yaml that ships."""
    paths = [*CONF.rglob("*.yaml"), *(CONF.parent / "experiments").rglob("*.yaml")]
    found = set()
    for path in paths:
        content = yaml.safe_load(path.read_text()) or {}
        for section in (content, content.get("data") or {}):
            options = section.get("train_transform") if isinstance(section, dict) else None
            found.add((options or {}).get("auto_augment"))
    return sorted(found - {None})


FAMILIES = (
    *("original", "originalr", "v0", "v0r", "3a", "original-mstd0.5"),
    *("rand-m9-n3-mstd0.5", "rand-m10-mstd101-inc1", "rand-m15-mmax20-inc1", "rand-m0"),
    *("rand-m9-tweights-inc1", "rand-m9-t3aw-inc1", "rand-m9-t3a-inc1", "augmix-m5-w4-d2"),
    "augmix-m9-b1-mstd0.5",
)


@pytest.mark.parametrize("mode,mean", [("RGB", (0.5,) * 3), ("L", (0.5,))])
@pytest.mark.parametrize("name", [*shipped(), *FAMILIES])
def test_every_augmentation_is_drawn_without_an_error(name, mode, mean):
    transform = build_transform(
        input_size=8, mean=mean, std=mean, is_training=True, auto_augment=name, re_prob=0.25
    )
    image = noise(0).resize((8, 8)).convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2000 if name in shipped() else 300):
            assert transform(image).shape == (len(mean), 8, 8)


def test_zero_bits_leave_black():
    from switchlora.data.augment import posterize

    image = noise(0)
    assert posterize(image, 0).getextrema() == posterize(image, -2).getextrema() == ((0, 0),) * 3
    assert posterize(image, 8) is image and posterize(image, 1).getextrema() == ((0, 128),) * 3


def test_the_shipped_recipe_has_an_augmentation():
    assert shipped() == ["rand-m9-mstd0.5-inc1"]


# Whole configurations


def test_a_folder_with_grey_images_can_be_trained_in_grey(tmp_path):
    folders(tmp_path, save=deep)
    words = ("data.num_classes=3", "data.image_size=8", "data.batch_size=2", "data.in_chans=1")
    config = composed(
        "data=imagefolder", f"data.root={tmp_path}", *words, "data.mean=[0]", "data.std=[1]"
    )
    data = build(config.data, seed=0)
    assert next(iter(data.train))[0].shape == (2, 1, 8, 8)
    assert Path(config.data.root) == tmp_path


def test_a_model_with_too_few_logits_is_told_before_training(tmp_path):
    words = ("data=digits", "model=digits", "model.num_classes=9", "log=quiet")
    with pytest.raises(ValueError, match="the model gives 9 logits, but labels .* 0 to 9: raise"):
        prepare(composed(*words), tmp_path)
