"""Norms and stable ranks of many matrices at once: few kernels, and one transfer to the host.

On a GPU each matrix by itself would cost hundreds of launches, and each SVD would wait for the
device. Here matrices of one shape share every kernel, and only small Gram matrices reach the host.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 2**27
"""entries of the matrices that are stacked at a time"""
ROUNDING = 1e-5


@dataclass(frozen=True)
class Sketch:
    """Matrices M (n, out, in), each seen from a space in which its leading vector lies.

    Rows of ``basis`` (n, k, in) are orthonormal. ``gram`` (n, k, k) holds the inner products of
    their images M v / ||M||_F.
    """

    keys: Sequence[str]
    norms: Tensor
    """||M||_F (n,)"""
    basis: Tensor
    gram: Tensor
    starts: Tensor
    """vectors from which the basis was built (n, in)"""


class Measured(NamedTuple):
    """What is known of each matrix, by its key."""

    norms: dict[str, float]
    stable_ranks: dict[str, float]
    vectors: dict[str, Tensor]
    """leading right singular vector, on the device"""


def of_one_shape(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Yield lists of names whose matrices have one shape and at most ``LARGEST`` entries."""
    groups: dict[torch.Size, list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(shape, []).append(name)
    for shape, names in groups.items():
        most = max(1, LARGEST // shape.numel())
        for first in range(0, len(names), most):
            yield names[first : first + most]


def sketch(keys: Sequence[str], matrices: Tensor, starts: Tensor, iterations: int) -> Sketch:
    """Build a basis for each of the ``matrices`` (n, out, in) by the power method.

    It is what ``spectral_norm`` does with one matrix.
    """
    _, rows, columns = matrices.shape
    basis = _units(starts)[:, None]
    images = basis @ matrices.mT
    for _ in range(min(iterations, rows, columns - 1)):
        following = _orthogonal_units(basis, images[:, -1:] @ matrices)
        basis = torch.cat([basis, following], dim=1)
        images = torch.cat([images, following @ matrices.mT], dim=1)
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2))
    images = images / _not_zero(norms)[:, None, None]
    return Sketch(keys, norms, basis, images @ images.mT, starts)


def measure(sketches: Sequence[Sketch], others: Tensor) -> tuple[Measured, list[float]]:
    """Return norms, stable ranks and leading vectors, and the values of ``others`` (n,).

    All of it reaches the host in one transfer. What cannot be computed is NaN, and its vector is
    then the one from which the basis was built.
    """
    parts = [others]
    for each in sketches:
        parts += [each.norms, each.gram.flatten()]
    on_host = torch.cat(parts).cpu()
    found, *rest = on_host.split([part.numel() for part in parts])
    measured = Measured({}, {}, {})
    for number, each in enumerate(sketches):
        norms, grams = rest[2 * number], rest[2 * number + 1]
        _add(measured, each, norms, grams.view(each.gram.shape))
    return measured, found.tolist()


def _add(measured: Measured, sketched: Sketch, norms: Tensor, grams: Tensor) -> None:
    values, right = _leading(grams)
    stable = torch.where(norms == 0, torch.zeros_like(values), 1 / values)
    coordinates = right.to(sketched.basis, non_blocking=True)[:, None]
    vectors = (coordinates @ sketched.basis)[:, 0]
    finite = vectors.isfinite().all(dim=1, keepdim=True)
    kept = torch.where(finite, vectors, sketched.starts)
    measured.norms.update(zip(sketched.keys, norms.tolist(), strict=True))
    measured.stable_ranks.update(zip(sketched.keys, stable.tolist(), strict=True))
    measured.vectors.update(zip(sketched.keys, kept.unbind(), strict=True))


def _leading(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue (n,) and its eigenvector (n, k); NaN where that fails."""
    finite = grams.isfinite().all(dim=2).all(dim=1)
    whole = torch.where(finite[:, None, None], grams, torch.zeros_like(grams)).double()
    try:
        values, vectors = torch.linalg.eigh(whole)
    except torch.linalg.LinAlgError:
        values, vectors = whole[:, 0] * torch.nan, whole * torch.nan
    known = torch.where(finite, 1.0, torch.nan)
    return values[:, -1] * known, vectors[:, :, -1] * known[:, None]


def _orthogonal_units(basis: Tensor, vectors: Tensor) -> Tensor:
    """Return units of the parts of ``vectors`` (n, 1, in) that are orthogonal to ``basis``.

    A result is 0 where only rounding is left.
    """
    new = torch.baddbmm(vectors, vectors @ basis.mT, basis, alpha=-1)
    new = torch.baddbmm(new, new @ basis.mT, basis, alpha=-1)  # once is not enough in float32
    sizes = torch.linalg.vector_norm(new, dim=2, keepdim=True)
    rounding = ROUNDING * torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
    return torch.where(sizes > rounding, new / _not_zero(sizes), 0.0)


def _units(vectors: Tensor) -> Tensor:
    return vectors / _not_zero(torch.linalg.vector_norm(vectors, dim=1, keepdim=True))


def _not_zero(values: Tensor) -> Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny)
