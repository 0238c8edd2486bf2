"""What a report on data says: from surveys of the splits to plain numbers, names and sentences."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from switchlora.data import (
    Contents,
    Data,
    Duplicates,
    Survey,
    comparable,
    contents_of,
    effects,
    find_duplicates,
    label_shift,
    shared_items,
    two_sample_test,
)
from switchlora.names import counted, some

LISTED = 1000
"""pairs of a relation that are listed; all are counted"""
listed = partial(some, most=3, between="; ")
"""things that a sentence names"""
UNEVEN = 10
"""images of the largest class for each of the smallest, from which on it is a finding"""
LEVEL = 0.001
"""largest p-value of the numbers of the classes that is a finding"""
GRAVEST_FIRST = (
    *(("test", "train"), ("test", "val"), ("val", "train")),
    *(("test", "test"), ("val", "val"), ("train", "train")),
)
Report = dict[str, Any]


class Place(NamedTuple):
    """One image: its split, and its number among those that can be read."""

    survey: Survey
    item: int

    @property
    def split(self) -> str:
        """The name of its split."""
        return self.survey.split.name

    @property
    def label(self) -> int:
        """The number of its class."""
        return int(self.survey.labels[self.item])

    @property
    def name(self) -> str:
        """What a user can find it by."""
        return self.survey.name(self.item)


class Images:
    """The images of all splits, in one order: test, val, train."""

    def __init__(self, surveys: Sequence[Survey]) -> None:
        self.surveys = list(reversed(surveys))
        self.ends = np.cumsum([len(each.digests) for each in self.surveys])

    def __getitem__(self, number: int) -> Place:
        which = int(np.searchsorted(self.ends, number, side="right"))
        start = self.ends[which - 1] if which else 0
        return Place(self.surveys[which], number - int(start))

    def duplicates(self) -> Duplicates:
        """Return the images that are there more than once."""
        digests = [digest for each in self.surveys for digest in each.digests]
        thumbnails = np.concatenate([each.thumbnails for each in self.surveys])
        return find_duplicates(digests, thumbnails, int(self.ends[0]))


def pairs_of(images: Images, group: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each image of a group of equal ones with the first of each split from its own on."""
    firsts: dict[str, int] = {}
    for number in group:
        firsts.setdefault(images[number].split, number)
    for number in group:
        own = firsts[images[number].split]
        for first in firsts.values():
            if first > own:
                yield number, first
        if number != own:
            yield own, number


class Match(NamedTuple):
    """An image, one that is the same or nearly so, and how alike they are (1: the same)."""

    one: Place
    other: Place
    alike: float


Relations = dict[tuple[str, str], list[Match]]
"""by two splits, the images of the first that stand in the second too, each once"""


def relations_of(images: Images, found: Duplicates) -> Relations:
    """Return, for each two splits, which images of one stand in the other, and within each."""
    relations: Relations = defaultdict(list)
    seen: set[tuple[str, str, int]] = set()
    for one, other, alike in in_order(images, found):
        a, b = images[one], images[other]
        key = (a.split, b.split)
        known = one if a.split != b.split else other
        if (*key, known) not in seen:
            seen.add((*key, known))
            relations[key].append(Match(a, b, alike))
    return {splits: relations[splits] for splits in GRAVEST_FIRST if splits in relations}


def in_order(images: Images, found: Duplicates) -> Iterator[tuple[int, int, float]]:
    """Yield the pairs of equal images, then those that are nearly so, the most alike first."""
    for group in found.groups:
        for one, other in pairs_of(images, group):
            yield one, other, 1.0
    for pair in found.near:
        yield pair.one, pair.other, pair.alike


def image_report(
    surveys: Sequence[Survey],
    contents: Sequence[Contents],
    classes: Sequence[str],
    matches: Relations,
    whole: bool,
) -> Report:
    """Return the report on data of images, as plain values."""
    train, _, test = surveys
    report: Report = {
        "unit": "images",
        "sizes": {each.split.name: len(each.split) for each in surveys},
        "sha256": {each.split: each.sha256 for each in contents},
        "sha256_of": {each.split: each.of for each in contents},
        "unreadable": [line for each in surveys for line in each.unreadable],
        "odd": odd_of(surveys),
        "balance": balance(surveys, classes),
        "duplicates": [relation(*splits, found, classes) for splits, found in matches.items()],
        "all_pairs_compared": whole,
        "two_labels": two_labels(matches, classes),
        "shift": shift(train, test),
    }
    report["findings"] = list(findings(report))
    return report


def relation(split: str, inside: str, found: Sequence[Match], classes: Sequence[str]) -> Report:
    """Return how many images of ``split`` stand in ``inside`` too, and which."""
    exact = sum(match.alike == 1 for match in found)
    return {
        "split": split,
        "inside": inside,
        "exact": exact,
        "near": len(found) - exact,
        "pairs": [told(match, classes) for match in found[:LISTED]],
    }


def told(match: Match, classes: Sequence[str]) -> Report:
    """Return a pair by its names and classes."""
    return {
        "one": match.one.name,
        "other": match.other.name,
        "alike": round(match.alike, 4),
        "classes": [called(place.label, classes) for place in (match.one, match.other)],
    }


def two_labels(matches: Relations, classes: Sequence[str]) -> list[Report]:
    """Return the pairs that are the same, or nearly, and have different classes."""
    found = [match for pairs in matches.values() for match in pairs]
    return [told(match, classes) for match in found if match.one.label != match.other.label]


def called(label: int, classes: Sequence[str]) -> str:
    """Return the name of a class, or its number."""
    return classes[label] if 0 <= label < len(classes) else str(label)


def odd_of(surveys: Sequence[Survey]) -> dict[str, list[str]]:
    """Return, by what is odd, the names of the images of all splits."""
    found: dict[str, list[str]] = defaultdict(list)
    for each in surveys:
        for kind, names in each.odd.items():
            found[kind] += names
    return dict(found)


def balance(surveys: Sequence[Survey], classes: Sequence[str]) -> Report:
    """Return the number of images of each class in each split, and what follows from that."""
    size = max(len(classes), *(int(each.labels.max()) + 1 for each in surveys))
    counts = {each.split.name: np.bincount(each.labels, minlength=size) for each in surveys}
    names = [called(label, classes) for label in range(size)]
    used = sum(counts.values()) > 0
    return {
        "classes": names,
        "counts": {split: each.tolist() for split, each in counts.items()},
        "ratio": {split: ratio(each) for split, each in counts.items()},
        "missing": {
            split: [names[label] for label in np.flatnonzero((each == 0) & used)]
            for split, each in counts.items()
        },
        "p_value": label_shift(surveys[0].labels, surveys[2].labels, size),
    }


def ratio(counts: np.ndarray) -> float:
    """Return how many images the largest class has for each of the smallest that has any."""
    return float(counts.max() / counts[counts > 0].min())


def shift(train: Survey, test: Survey) -> Report:
    """Return how far the images to train on and to test on differ."""
    found = [
        *effects(train.means, test.means, "brightness"),
        *effects(train.deviations, test.deviations, "contrast"),
    ]
    told = two_sample_test(train.thumbnails, test.thumbnails)
    return {
        "statistics": [{**asdict(each), "shifted": each.shifted} for each in found],
        "two_sample": None if told is None else {**asdict(told), "shifted": told.shifted},
    }


def findings(report: Report) -> Iterator[str]:
    """Yield a sentence on each thing that a user should look at, the gravest first."""
    yield from leak_findings(report)
    if report["two_labels"]:
        count = len(report["two_labels"])
        pairs = [
            f"{pair['one']} ({pair['classes'][0]}) = {pair['other']} ({pair['classes'][1]})"
            for pair in report["two_labels"]
        ]
        verb = "pair has" if count == 1 else "pairs have"
        yield f"{count:,} {verb} two labels for the same image, or nearly: {listed(pairs)}"
    if report["unreadable"]:
        lines = report["unreadable"]
        yield f"{counted(len(lines), 'image')} cannot be read: {listed(lines)}"
    for kind, names in report["odd"].items():
        yield f"{counted(len(names), 'odd image')}, {kind}: {listed(names)}"
    yield from balance_findings(report["balance"])
    yield from shift_findings(report["shift"])


def leak_findings(report: Report) -> Iterator[str]:
    """Yield a sentence on each two splits that share images, and on repeats inside of a split."""
    for each in report["duplicates"]:
        split, inside = each["split"], each["inside"]
        total = report["sizes"][split]
        count = each["exact"] + each["near"]
        how = f"{each['exact']:,} pixel for pixel, {each['near']:,} nearly"
        named = listed([f"{p['one']} = {p['other']}" for p in each["pairs"]])
        if split == inside:
            yield f"{split} holds {counted(count, 'image')} more than once ({how}): {named}"
            continue
        why = ""
        if (split, inside) == ("val", "train"):
            why = "; val is cut from the training set, whose duplicates fall on both sides"
        verb = "is" if count == 1 else "are"
        yield f"{count:,} of {total:,} {split} images {verb} in {inside} too ({how}{why}): {named}"


def balance_findings(balance: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence on missing classes, on uneven ones, and on classes that shift."""
    for split, names in balance["missing"].items():
        if names:
            yield f"{split} has no image of {counted(len(names), 'class')}: {listed(names)}"
    for split, value in balance["ratio"].items():
        if value >= UNEVEN:
            yield f"{split} is uneven: its largest class has {value:,.1f} times its smallest"
    p_value = balance["p_value"]
    if p_value is not None and p_value < LEVEL:
        yield f"train and test have classes in different shares (chi-square, p = {p_value:.1g})"


def shift_findings(shift: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence on each way in which test differs from train."""
    told = shift["two_sample"]
    if told is not None and told["shifted"]:
        yield (
            f"test images differ from train images: {told['classifier']} tells them apart in "
            f"{told['accuracy']:.1%} of cases (50 % is chance, p = {told['p_value']:.1g})"
        )
    for each in shift["statistics"]:
        if each["shifted"]:
            yield (
                f"test differs from train in {each['statistic']}: {each['second']:.3f} against "
                f"{each['first']:.3f}, {each['effect']:+.2f} standard deviations"
            )


def text_report(data: Data) -> Report:
    """Return the report on data of text, as plain values."""
    contents = contents_of(data, thorough=True)
    relations = []
    for shared in shared_items(contents) if comparable(contents) else []:
        named = {each.split: each for each in contents}
        one, other = named[shared.split], named[shared.inside]
        pairs = [{"one": one.name(a), "other": other.name(b)} for a, b in shared.pairs[:LISTED]]
        if shared.pairs:
            relations.append(
                {
                    "split": shared.split,
                    "inside": shared.inside,
                    "exact": len(shared.pairs),
                    "of": len(one.digests),
                    "pairs": pairs,
                }
            )
    texts = {
        each.split: view.text.cpu().numpy().tobytes()
        for each, view in zip(contents, data.views, strict=True)
    }
    report: Report = {
        "unit": "windows",
        "sizes": {each.split: len(view) for each, view in zip(contents, data.views, strict=True)},
        "bytes": {split: len(text) for split, text in texts.items()},
        "sha256": {each.split: each.sha256 for each in contents},
        "sha256_of": {each.split: each.of for each in contents},
        "lines_in_train": {
            split: share_of_lines(texts[split], texts["train"]) for split in ("val", "test")
        },
        "duplicates": relations,
    }
    report["findings"] = list(text_findings(report))
    return report


def share_of_lines(text: bytes, other: bytes) -> float:
    """Return the share of the lines of ``text`` that stand in ``other``, but for empty ones."""
    known = {line.strip() for line in other.splitlines()}
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return sum(line in known for line in lines) / max(1, len(lines))


def text_findings(report: Report) -> Iterator[str]:
    """Yield a sentence on each two splits that share passages."""
    for each in report["duplicates"]:
        named = listed([f"{p['one']} = {p['other']}" for p in each["pairs"]])
        share = report["lines_in_train"].get(each["split"], 0.0)
        lines = f", {share:.1%} of its lines" if each["inside"] == "train" else ""
        yield (
            f"{each['exact']:,} of {each['of']:,} passages of {each['split']} stand in "
            f"{each['inside']} too{lines}: {named}"
        )
