"""Two samples of what a model makes of images: are they from one distribution?

Four questions are asked: of the predicted classes, of the confidence, of each feature by itself,
and of all features together. Holm's correction (Scandinavian Journal of Statistics 6, 1979) keeps
the probability of any false alarm, over all of them, below one level.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import chi2_contingency, ks_2samp
from torch import Tensor

from switchlora.analysis.correction import holm
from switchlora.analysis.drift.sample import Sample

LEAST_EXPECTED = 5
"""images that a class must be expected to have in the smaller sample; rarer ones are one group"""
PERMUTATIONS, CHUNK = 999, 256
SHARE_OF_P = 4
"""how many times finer the smallest p of the permutations is than the smallest that decides"""


@dataclass(frozen=True)
class Test:
    """One of the questions."""

    about: str
    statistic: str
    value: float
    p: float
    adjusted: float = 1.0
    """p after Holm's correction over all questions"""
    detail: str = ""


@dataclass(frozen=True)
class Found:
    """The answers to all questions."""

    tests: tuple[Test, ...]
    psi: float
    """population stability index of the predicted classes"""
    drifted: tuple[int, ...]
    """features that differ, after the correction over the features"""
    ks: tuple[float, ...]
    """Kolmogorov-Smirnov's statistic of each feature"""
    mmd: float
    null: tuple[float, ...]
    """the same of the permutations"""
    level: float

    @property
    def drift(self) -> bool:
        """Whether anything differs."""
        return any(test.adjusted <= self.level for test in self.tests)


def compared(known: Sample, new: Sample, level: float) -> Found:
    """Return whether ``new`` differs from ``known`` at a ``level`` over all questions."""
    chi, of_classes, psi = class_shift(counts_of(known), counts_of(new))
    of_confidence = ks_2samp(known.confidence.numpy(), new.confidence.numpy(), method="asymp")
    ks, of_features = feature_shifts(known.features, new.features)
    adjusted = holm(of_features)
    mmd, null = mmd_permuted(known.features, new.features, permutations_for(level))
    of_mmd = (1 + sum(value >= mmd for value in null)) / (1 + len(null))
    drifted = tuple(place for place, p in enumerate(adjusted) if p <= level)
    told = f"{len(drifted)} of {len(ks)} features"
    tests = [
        Test("predicted classes", "chi-square", chi, of_classes, detail=f"PSI {psi:.3f}"),
        Test("confidence", "KS", float(of_confidence.statistic), float(of_confidence.pvalue)),
        Test("single features", "largest KS", max(ks), min(adjusted), detail=told),
        Test("features together", "MMD^2", mmd, of_mmd, detail=f"{len(null)} permutations"),
    ]
    corrected = []
    for test, p in zip(tests, holm([test.p for test in tests]), strict=True):
        corrected.append(Test(test.about, test.statistic, test.value, test.p, p, test.detail))
    return Found(tuple(corrected), psi, drifted, tuple(ks), mmd, tuple(null), level)


def permutations_for(level: float) -> int:
    """Return how many permutations reach a p far below what decides at a ``level``."""
    questions = 4
    return max(PERMUTATIONS, math.ceil(SHARE_OF_P * questions / level) - 1)


def counts_of(sample: Sample) -> np.ndarray:
    """Return how many images of a sample are predicted to be of each class."""
    return torch.bincount(sample.predicted, minlength=sample.num_classes).numpy()


def class_shift(known: np.ndarray, new: np.ndarray) -> tuple[float, float, float]:
    """Return chi-square of homogeneity, its p-value, and PSI, from counts of two samples by class.

    Rare classes are one group, without which the statistic would not follow its distribution. PSI
    is the sum of (q - p) ln(q / p) over the groups' shares, with half an image more in each.
    """
    table = np.stack([grouped(row, known, new) for row in (known, new)])
    if table.shape[1] < 2:
        return 0.0, 1.0, 0.0
    found = chi2_contingency(table, correction=False)
    shares = (table + 0.5) / (table + 0.5).sum(1, keepdims=True)
    psi = float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
    return float(found.statistic), float(found.pvalue), psi


def grouped(counts: np.ndarray, known: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return counts by class, with the rare classes of both samples together as one group."""
    expected = (known + new) * min(known.sum(), new.sum()) / (known.sum() + new.sum())
    order = np.argsort(expected, kind="stable")
    rare = int((expected < LEAST_EXPECTED).sum())
    while 0 < rare < len(order) and expected[order[:rare]].sum() < LEAST_EXPECTED:
        rare += 1  # the group itself is rare: the next class joins it
    rest = counts[order[rare:]]
    together = counts[order[:rare]].sum()
    return np.append(rest, together) if rare else rest


def feature_shifts(known: Tensor, new: Tensor) -> tuple[list[float], list[float]]:
    """Return Kolmogorov-Smirnov's statistic and p-value of each feature of two samples (N, D)."""
    statistics, values = [], []
    for one, other in zip(known.T.numpy(), new.T.numpy(), strict=True):
        found = ks_2samp(one, other, method="asymp")
        statistics.append(float(found.statistic))
        values.append(float(found.pvalue))
    return statistics, values


def mmd_permuted(known: Tensor, new: Tensor, times: int) -> tuple[float, list[float]]:
    """Return the squared maximum mean discrepancy of two samples, and that of permuted ones.

    It is the unbiased estimate of Gretton et al. (JMLR 13, 2012), eq. 3, with the kernel
    exp(-d^2 / 2 h^2), and h the median distance between two images of both samples together.
    """
    kernel = rbf_kernel(torch.cat([known, new]).double())
    size = len(kernel)
    begins = torch.arange(size) < len(known)
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    while len(found) <= times:
        count = min(CHUNK, times + 1 - len(found))
        draws = torch.rand(count, size, generator=generator).argsort(dim=1)
        members = begins[draws]
        if not found:
            members[0] = begins
        found += mmd_of(kernel, members.double().T).tolist()
    return found[0], found[1:]


def rbf_kernel(rows: Tensor) -> Tensor:
    """Return the kernel between all pairs of rows, with zeros for a row and itself."""
    distances = torch.cdist(rows, rows)
    apart = ~torch.eye(len(rows), dtype=torch.bool)
    width = distances[apart].median()
    kernel = torch.exp(-(distances**2) / (2 * width**2)) if width > 0 else apart.double()
    return kernel * apart


def mmd_of(kernel: Tensor, members: Tensor) -> Tensor:
    """Return MMD^2 of each column of ``members`` (N, splits), which is 1 for the first sample."""
    n = members[:, 0].sum()
    m = len(kernel) - n
    touched = kernel @ members
    within = (members * touched).sum(0)
    between = touched.sum(0) - within
    rest = kernel.sum() - within - 2 * between
    return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * between / (n * m)
