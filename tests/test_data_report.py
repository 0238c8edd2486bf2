"""What is said of data before training: leaks, duplicates, labels, odd files, shift, hashes."""

import json
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conf_yamls import composed
from runs import make_run, make_run_in_parts
from switchlora.analysis.data_report import as_markdown, main, report_on, write
from switchlora.analysis.page.data_page import page_of
from switchlora.config import build
from switchlora.data import Digits, contents_of, effects, two_sample_test
from switchlora.data.contents import PASSAGE, shared_items
from switchlora.data.duplicates import LOOSE, near_pairs, perceptual_hashes
from switchlora.data.survey import made_small
from switchlora.errors import UnreadableImage
from switchlora.run import leakage

SIDE = 32
LEAKED, ENCODED = 50, 10
CLASSES = ("cat", "cow", "dog")
SHORTEST = (
    "epochs=1",
    "model.depth=1",
    "data.train_size=128",
    "full.scheduler.warmup_t=1",
    "monitor.window=4",
)


def patterns(count, seed, channels=3, side=SIDE):
    """Smooth random images (count, side, side, channels) with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(size=(count, channels, 7, 7)))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").numpy()
    pixels = 128 + 45 * smooth + rng.normal(scale=3, size=smooth.shape)
    return pixels.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def encoded(image, quality=80):
    """An image (H, W[, C]) as JPEG gives it back."""
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resized(image, factor):
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def thumbnails(images):
    """Thumbnails of images (H, W[, C]) of any sizes."""
    found = []
    for image in images:
        pixels = image[..., np.newaxis] if image.ndim == 2 else image
        found.append(made_small(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()))
    return np.concatenate(found)


def save(folder, split, images):
    """Save images as PNG, in turns into the classes; return the paths."""
    paths = []
    for number, image in enumerate(images):
        path = folder / split / CLASSES[number % 3] / f"{split}{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A folder of 150 images to train and validate on and 60 to test on, none of them alike."""
    folder = tmp_path_factory.mktemp("clean")
    save(folder, "train", patterns(150, seed=1))
    save(folder, "val", patterns(60, seed=2))
    return folder


@pytest.fixture(scope="module")
def leaky(clean, tmp_path_factory):
    """The same with 50 test images in train, ten of them as JPEG, one under another label."""
    folder = tmp_path_factory.mktemp("leaky") / "images"
    shutil.copytree(clean, folder)
    tests = sorted((folder / "val").rglob("*.png"))[:LEAKED]
    for number, path in enumerate(tests):
        label = path.parent.name if number else "dog"
        target = folder / "train" / label / f"leaked{number}.png"
        if number < LEAKED - ENCODED:
            shutil.copy(path, target)
        else:
            Image.open(path).save(target.with_suffix(".jpg"), quality=75)
    return folder


def words(folder, *more):
    return ["data=imagefolder", f"data.root={folder}", *more]


@pytest.fixture(scope="module")
def clean_report(clean):
    return report_on(words(clean))


@pytest.fixture(scope="module")
def leaky_report(leaky):
    return report_on(words(leaky))


# What is found


def test_nothing_is_found_in_clean_data(clean_report):
    report, _ = clean_report
    assert report["findings"] == [] and report["duplicates"] == []


def test_each_test_image_that_is_in_train_is_named_and_each_that_was_encoded_anew(leaky_report):
    report, _ = leaky_report
    into = [each for each in report["duplicates"] if each["split"] == "test"]
    assert {each["inside"] for each in into} <= {"train", "val"}
    assert sum(each["exact"] for each in into) == LEAKED - ENCODED
    assert sum(each["near"] for each in into) == ENCODED
    pairs = [pair for each in into for pair in each["pairs"]]
    assert len({pair["one"] for pair in pairs}) == LEAKED
    assert all("leaked" in pair["other"] for pair in pairs)
    (first, *_) = report["findings"]
    assert "test images are in train too" in first and "leaked" in first


def test_an_image_under_two_labels_is_named_with_both(leaky_report):
    report, _ = leaky_report
    (pair,) = report["two_labels"]
    assert "leaked0" in pair["other"] and pair["classes"] == ["cat", "dog"]


def test_the_page_has_pictures_and_needs_no_other_file(leaky_report, tmp_path):
    report, matches = leaky_report
    paths = write(report, matches, tmp_path)
    page = (tmp_path / "data.html").read_text()
    assert page.count("data:image/png;base64") >= 24 and "leaked0" in page
    assert "http" not in page and "two labels" in page
    assert json.loads((tmp_path / "data.json").read_text()) == report
    assert "## Shift from train to test" in (tmp_path / "data.md").read_text()
    assert len(paths) == 3


def spoil(image):
    return Image.fromarray(image)


def test_files_that_cannot_be_read_or_are_odd_are_listed(clean, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(clean, folder)
    first, second = sorted((folder / "train" / "cat").glob("*.png"))[:2]
    first.write_bytes(first.read_bytes()[:-400])
    second.write_bytes(b"")
    frames = [Image.fromarray(each) for each in patterns(3, seed=5)]
    dog = folder / "train" / "dog"
    frames[0].save(dog / "film.webp", save_all=True, append_images=frames[1:])
    frames[0].resize((90, 10)).save(dog / "wide.png")
    frames[1].resize((1, 1)).save(dog / "dot.png")
    frames[1].convert("CMYK").save(dog / "print.jpg")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(dog / "blank.png")
    shutil.rmtree(folder / "val" / "cow")
    report, _ = report_on(words(folder))
    assert [str(first) in line or str(second) in line for line in report["unreadable"]] == [
        True
    ] * 2
    found = {name.rpartition("/")[2] for names in report["odd"].values() for name in names}
    assert found == {"film.webp", "wide.png", "dot.png", "print.jpg", "blank.png"}
    assert report["balance"]["missing"]["test"] == ["cow"]
    assert any("cow" in line for line in report["findings"])


def test_images_that_cannot_be_read_are_said_to_be_missing_among_the_classes(clean, tmp_path):
    note = "Images that cannot be read are not counted."
    whole, matches = report_on(words(clean))
    assert note not in as_markdown(whole) and note not in page_of(whole, matches)
    folder = tmp_path / "broken"
    shutil.copytree(clean, folder)
    next((folder / "train" / "cat").glob("*.png")).write_bytes(b"")
    report, matches = report_on(words(folder))
    assert note in as_markdown(report) and note in page_of(report, matches)


def test_classes_that_are_uneven_are_a_finding(clean, tmp_path):
    folder = tmp_path / "uneven"
    shutil.copytree(clean, folder)
    for path in sorted((folder / "train" / "cow").glob("*.png"))[:46]:
        path.unlink()
    report, _ = report_on(words(folder))
    assert any("train is uneven" in line for line in report["findings"])
    assert any("classes in different shares" in line for line in report["findings"])


# Nearly equal images, and shift


@pytest.mark.parametrize(
    "change",
    [
        *(lambda image, quality=quality: encoded(image, quality) for quality in (50, 75, 95)),
        *(lambda image, factor=factor: resized(image, factor) for factor in (0.9, 1.1)),
    ],
    ids=["quality 50", "quality 75", "quality 95", "smaller", "larger"],
)
def test_copies_that_were_encoded_anew_or_resized_are_found(change):
    images = list(patterns(200, seed=3))
    copies = [change(image) for image in images[:40]]
    found = near_pairs(thumbnails([*images, *copies]))
    assert {(pair.one, pair.other) for pair in found} == {(n, 200 + n) for n in range(40)}


def test_digits_raise_no_false_alarm_and_nearly_all_their_copies_are_found():
    images = list(Digits(True).images)
    copies = [encoded(image, 80) for image in images[:100]]
    found = near_pairs(thumbnails([*images, *copies]))
    planted = {(number, len(images) + number) for number in range(100)}
    pairs = {(pair.one, pair.other) for pair in found}
    assert pairs <= planted and len(pairs) >= 97


def test_what_phash_of_the_imagehash_library_finds_is_near_by_our_hash_too():
    imagehash = pytest.importorskip("imagehash")
    images = [*patterns(30, seed=4, side=64)]
    images += [encoded(image, 60) for image in images]
    theirs = [imagehash.phash(Image.fromarray(image)) for image in images]
    ours = perceptual_hashes(thumbnails(images))
    cosines = ours @ ours.T
    near = [(a, b) for a in range(60) for b in range(a) if theirs[a] - theirs[b] <= 4]
    assert len(near) >= 20 and all(cosines[pair] > LOOSE for pair in near)


def test_frames_that_are_all_alike_are_found_although_each_has_many_neighbours():
    (image,) = patterns(1, seed=6)
    rng = np.random.default_rng(0)
    frames = [(image + rng.integers(0, 3, image.shape)).clip(0, 255).astype("u1") for _ in "x" * 9]
    found = near_pairs(thumbnails([*patterns(40, seed=7), *frames]))
    assert len(found) == 9 * 8 / 2


@pytest.mark.parametrize("change", [lambda x: 255 - x, lambda x: x // 2], ids=["inverted", "dark"])
def test_a_shifted_test_split_is_found(change):
    train = thumbnails(list(patterns(300, seed=8)[:, :, :, :1] // 2))
    test = change(thumbnails(list(patterns(150, seed=9)[:, :, :, :1] // 2)))
    found = two_sample_test(train, test)
    assert found.shifted and found.accuracy > 0.9
    means = [each.mean((2, 3)) / 255 for each in (train, test)]
    assert all(each.shifted for each in effects(*means, "brightness"))


def test_twenty_clean_repetitions_raise_no_alarm():
    alarms = []
    for seed in range(20):
        small = thumbnails(list(patterns(120, seed=100 + seed, channels=1, side=16)))
        alarms += near_pairs(small)
        alarms += [two_sample_test(small[:60], small[60:]).shifted]
        means = small.mean((2, 3)) / 255
        alarms += [each.shifted for each in effects(means[:60], means[60:], "brightness")]
    assert not any(alarms)


# The hash of a split


def hashes(folder, *more):
    options = ("data.num_classes=3", f"data.image_size={SIDE}", "data.batch_size=8", *more)
    config = composed(*words(folder, *options))
    where = {"seed": 0, "pin_memory": False, "rank": 0, "world_size": 1}
    data = build(config.data, workers=config.system.workers, **where)
    return {each.split: each.sha256 for each in contents_of(data)}


PIXELS = ("data.train_transform=null", "data.eval_transform=null")


@pytest.mark.parametrize("more", [(), PIXELS], ids=["files", "pixels"])
def test_a_hash_hangs_on_pixels_and_labels_alone(more, clean, tmp_path):
    before = hashes(clean, *more)
    folder = tmp_path / "elsewhere"
    shutil.copytree(clean, folder)
    tests = sorted((folder / "val" / "dog").glob("*.png"))
    for number, path in enumerate(tests):
        path.rename(path.with_name(f"{len(tests) - number:03}.png"))
    assert hashes(folder, *more, "system.workers=2") == before
    moved = folder / "val" / "dog" / "001.png"
    moved.rename(folder / "val" / "cat" / "moved.png")
    other_label = hashes(folder, *more)
    assert other_label["test"] != before["test"] and other_label["train"] == before["train"]
    (folder / "val" / "cat" / "moved.png").rename(moved)
    pixels = np.array(Image.open(moved))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(moved)
    assert hashes(folder, *more)["test"] not in (before["test"], other_label["test"])


def test_the_report_has_the_hashes_that_a_run_keeps(clean, clean_report):
    assert clean_report[0]["sha256"] == hashes(clean)
    assert report_on(words(clean, *PIXELS))[0]["sha256"] == hashes(clean, *PIXELS)


def test_what_takes_too_long_at_a_start_is_sampled_and_a_thorough_look_reads_it(
    clean, monkeypatch
):
    monkeypatch.setattr("switchlora.data.contents.MOST_FILES", 10)
    config = composed(*words(clean, "data.num_classes=3", "data.batch_size=8"))
    data = build(config.data, seed=0, workers=0, pin_memory=False, rank=0, world_size=1)
    facts = leakage.facts_of(data, "warn")
    assert set(facts.sha256_of.values()) == {"sample"} and facts.leakage is None
    assert "switchlora-runs data does" in facts.lines[0]
    assert set(leakage.facts_of(data, "refuse").sha256_of.values()) == {"files"}


# The start of a run


class LeakyDigits(Digits):
    """Digits whose test split begins with five images of the training split."""

    def __init__(self, train):
        super().__init__(train)
        if not train:
            fit = Digits(True)
            self.images = np.concatenate([fit.images[:5], self.images])
            self.targets = np.concatenate([fit.targets[:5], self.targets])


LEAK = f"data.test._target_={__name__}.LeakyDigits"


def test_a_run_says_what_leaks_and_keeps_hashes(tmp_path, capsys):
    summary = make_run(tmp_path, *SHORTEST, LEAK)
    said = capsys.readouterr().out
    assert "data: 128 train, 64 val, 64 test images; " in said
    assert set(summary["data"]["sha256"]) == {"train", "val", "test"}
    assert all(len(value) == 64 for value in summary["data"]["sha256"].values())
    assert summary["data"]["leakage"].keys() == {"test_in_train", "test_in_val", "val_in_train"}


def test_a_leak_is_refused_before_a_folder_is_made(tmp_path):
    folder = tmp_path / "run"
    options = ("data.train_size=null", "data.eval_size=null", "data.leakage=refuse")
    with pytest.raises(
        ValueError, match=r"refuse: \d of 365 test images .*item \d of LeakyDigits"
    ):
        make_run(folder, *SHORTEST, LEAK, *options)
    assert not (folder / "metrics.jsonl").exists()


def test_a_run_that_goes_on_does_not_search_again(tmp_path, at_update, monkeypatch, capsys):
    looks = []
    facts_of = leakage.facts_of
    monkeypatch.setattr(leakage, "facts_of", lambda *them: looks.append(1) or facts_of(*them))
    summary = make_run_in_parts(tmp_path, at_update, [3], *SHORTEST)
    assert len(looks) == 1 and capsys.readouterr().out.count("data: 128 train") == 1
    assert summary["data"]["leakage"]["test_in_train"] == 0


def test_passages_of_a_text_that_are_in_train_are_told(tmp_path):
    lines = [f"line {number} says {number**3 % 977} and no more" for number in range(3000)]
    lines[2800 : 2800 + 2 * PASSAGE] = lines[100 : 100 + 2 * PASSAGE]
    path = tmp_path / "text"
    path.write_text("\n".join(lines))
    config = composed("data=bytes", "model=bytes", f"data.path={path}")
    data = build(config.data, seed=0, workers=0, pin_memory=False, rank=0, world_size=1)
    counts = {each.split: len(each.pairs) for each in shared_items(contents_of(data))[:2]}
    assert counts == {"val": 0, "test": PASSAGE + 1}
    report, _ = report_on(["data=bytes", f"data.path={path}"])
    assert any("6 of" in line and "test stand in train" in line for line in report["findings"])
    assert "2 * " not in as_markdown(report)


# Mistakes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data=imagefolder", "data.root=/nowhere"], "data.root=/nowhere has no folder train/"),
        (["data=imagenot"], "imagenot"),
        (["nowhere"], "nowhere is no folder"),
        (["data=digits", "data.test=null"], "data.test"),
        (["data=digits", "epochs=2"], "epochs=2: write data=NAME"),
        (["data=digits", "data.leakage=maybe"], "warn, refuse, off"),
        (["one", "two"], "give one run"),
    ],
)
def test_a_mistake_gets_one_line(given, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["switchlora-runs data", *given])
    with pytest.raises(SystemExit) as exit_:
        main()
    line = str(exit_.value)
    assert said in line and "\n" not in line


def test_a_split_without_a_readable_image_gets_one_line(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "x")
    for path in Path(tmp_path / "x" / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="no test image can be read"):
        report_on(words(tmp_path / "x"))
