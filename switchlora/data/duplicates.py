"""Find images that are there more than once: pixel for pixel, or nearly.

A perceptual hash of an image is the 64 lowest frequencies of its cosine transform, on 16 x 16
greys. That is what pHash cuts down to bits. Here the numbers stay, and pairs are compared by the
cosine of the angle between them: one matrix product for many pairs. What is near there is compared
again by pixels. A pair counts if it is also much nearer than other images are: simple images, such
as digits, all look alike, and a copy is nearer than that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from scipy.fft import dctn
from torch import Tensor

from switchlora.data.split import evenly

FREQUENCIES = 8
"""of the cosine transform, in each direction"""
SIDE = 16
"""pixels of a thumbnail, in each direction"""
LOOSE, TIGHT = 0.95, 0.995
"""bounds of the cosine from which on hashes are near: see ``least_cosine``"""
FEW = 3
"""neighbours that an image has above that cosine"""
PROBES = 256
"""images that tell how alike the images are"""
RATIO = 0.35
"""most distance of a pair, as a share of that to the other neighbours of both"""
SAME = 0.9995
"""correlation from which on other neighbours do not matter: an image may have many copies"""
BLOCK = 2048
"""images that are compared at once with as many others"""
MOST_PAIRS = 3e9
"""pairs that are compared; above that only those with a test image are"""
NEIGHBOURS = 5
"""a pair is compared with the distance to the neighbour of this number"""
MOST_EQUAL = 50
"""equal images that are named where one of them is nearly another"""
CHUNK = 65_536


@dataclass(frozen=True)
class Pair:
    """Two images that are the same, or nearly, by their numbers; ``alike`` is 1 for the same."""

    one: int
    other: int
    alike: float = 1.0


@dataclass(frozen=True)
class Duplicates:
    """All images that are there more than once."""

    groups: Sequence[Sequence[int]]
    """images that are the same"""
    near: Sequence[Pair]
    """pairs that are nearly the same, and not the same"""
    whole: bool = field(default=True)
    """whether all pairs were compared, not only those with the first images"""


def find_duplicates(digests: Sequence[bytes], thumbnails: np.ndarray, first: int) -> Duplicates:
    """Return the images that are there more than once.

    ``thumbnails`` are (n, C, SIDE, SIDE) uint8. If there are too many pairs, the ``first`` images
    alone are compared with all others.
    """
    members = group_equal(digests)
    unique = np.array([places[0] for places in members])
    whole = len(unique) ** 2 / 2 <= MOST_PAIRS
    rows = len(unique) if whole else int((unique < first).sum())
    pairs = near_pairs(thumbnails[unique], rows)
    near = []
    for pair in pairs:
        for one, other in product(
            members[pair.one][:MOST_EQUAL], members[pair.other][:MOST_EQUAL]
        ):
            near.append(Pair(min(one, other), max(one, other), pair.alike))
    groups = [places for places in members if len(places) > 1]
    return Duplicates(groups, near, whole)


def group_equal(digests: Sequence[bytes]) -> list[list[int]]:
    """Return the places of each digest, in the order of their first ones."""
    members: dict[bytes, list[int]] = {}
    for place, digest in enumerate(digests):
        members.setdefault(digest, []).append(place)
    return list(members.values())


def near_pairs(thumbnails: np.ndarray, rows: int | None = None) -> list[Pair]:
    """Return the pairs of images that are nearly the same, the most alike first.

    Of each pair one is among the first ``rows`` images (None: all pairs).
    """
    hashes = perceptual_hashes(thumbnails)
    least = least_cosine(hashes)
    found = candidates(hashes, least, len(hashes) if rows is None else rows)
    alike = correlations(thumbnails, found)
    near = alike >= 1 - 2 * (1 - least)  # fine detail differs more than the lowest frequencies
    found, alike = found[near], alike[near]
    keep = (relative_distances(hashes, found) <= RATIO) | (alike >= SAME)
    pairs = [
        Pair(one, other, value)
        for (one, other), value in zip(found[keep].tolist(), alike[keep].tolist(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: -pair.alike)


def perceptual_hashes(thumbnails: np.ndarray) -> Tensor:
    """Return a vector (n, 64) of length 1 for each image; zeros for one of one colour."""
    hashes = torch.empty(len(thumbnails), FREQUENCIES**2)
    for first in range(0, len(thumbnails), CHUNK):
        grey = thumbnails[first : first + CHUNK].mean(1, dtype=np.float32)
        waves = dctn(grey, axes=(1, 2), norm="ortho")[:, :FREQUENCIES, :FREQUENCIES]
        waves[:, 0, 0] = 0  # brightness
        hashes[first : first + CHUNK] = torch.from_numpy(waves.reshape(len(grey), -1))
    return with_length_one(hashes)


def with_length_one(vectors: Tensor) -> Tensor:
    """Return vectors of length 1; those that are nearly zero become zero."""
    lengths = vectors.norm(dim=1, keepdim=True)
    return torch.where(lengths > 1, vectors / lengths, 0.0)


def least_cosine(hashes: Tensor) -> float:
    """Return the cosine from which on two hashes are near.

    Photographs hardly resemble each other, and a copy may differ by a lot. Simple images do, and
    a copy must be nearer than these are: an image has few neighbours above that cosine.
    """
    probes = hashes[evenly(len(hashes), PROBES)]
    cosines = (probes @ hashes.T).flatten()
    count = min(len(cosines), (FEW + 1) * len(probes))  # an image is its own nearest one
    return float(cosines.topk(count).values[-1].clamp(LOOSE, TIGHT)) if count else LOOSE


def candidates(hashes: Tensor, least: float, rows: int) -> Tensor:
    """Return the pairs (p, 2) of images whose hashes have a cosine of at least ``least``."""
    found = [torch.empty(0, 2, dtype=torch.long)]
    for row, column in blocks(len(hashes), rows):
        cosines = hashes[row : row + BLOCK] @ hashes[column : column + BLOCK].T
        if row == column:
            cosines = cosines.triu(1)
        near = (cosines >= least).nonzero()
        found.append(near + torch.tensor([row, column]))
    pairs = torch.cat(found)
    return pairs[(pairs[:, 0] < rows) & (pairs[:, 0] < pairs[:, 1])]


def blocks(size: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield where the blocks of all pairs begin."""
    for row in range(0, rows, BLOCK):
        for column in range(row, size, BLOCK):
            yield row, column


def correlations(thumbnails: np.ndarray, pairs: Tensor) -> Tensor:
    """Return the correlation of the pixels of each pair."""
    found = torch.empty(len(pairs))
    for first in range(0, len(pairs), CHUNK // 8):
        chunk = pairs[first : first + CHUNK // 8]
        one, other = (centred(thumbnails[side.numpy()]) for side in chunk.T)
        found[first : first + len(chunk)] = (one * other).sum(1)
    return found


def centred(thumbnails: np.ndarray) -> Tensor:
    """Return the pixels of each image (n, pixels) with mean 0 and length 1."""
    pixels = torch.from_numpy(thumbnails.reshape(len(thumbnails), -1)).float()
    return with_length_one(pixels - pixels.mean(1, keepdim=True))


def relative_distances(hashes: Tensor, pairs: Tensor) -> Tensor:
    """Return the distance of each pair as a share of that to the other neighbours of both."""
    used, places = pairs.unique(return_inverse=True)
    usual = torch.empty(len(used))
    count = min(NEIGHBOURS + 1, len(hashes))  # an image is its own nearest one
    for first in range(0, len(used), BLOCK // 4):
        chunk = used[first : first + BLOCK // 4]
        nearest = (hashes[chunk] @ hashes.T).topk(count, dim=1).values[:, -1]
        usual[first : first + len(chunk)] = distance(nearest)
    cosines = (hashes[pairs[:, 0]] * hashes[pairs[:, 1]]).sum(1)
    return distance(cosines) / usual[places].amin(1).clamp_min(1e-6)


def distance(cosines: Tensor) -> Tensor:
    """Return the distance of vectors of length 1 with these cosines."""
    return (2 - 2 * cosines).clamp_min(0).sqrt()
