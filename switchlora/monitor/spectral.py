"""Spectra of matrices: truncated SVD, spectral norm, stable rank, effective rank, energies.

Everything is computed in at least float32, whatever the dtype of the input.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 8
POWER_ITERATIONS = 4


class SVD(NamedTuple):
    """Truncated singular value decomposition M ~ U diag(S) Vh: (m, r), (r,), (r, n)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def truncated_svd(matrix: Tensor, rank: int) -> SVD:
    """Leading ``rank`` singular triplets of ``matrix`` (m, n), signs fixed, global RNG untouched.

    Randomised range finder with oversampling and power iterations (Halko, Martinsson & Tropp,
    arXiv 0909.4061) where it is cheaper than the exact decomposition, which is used otherwise.
    Each left singular vector has its largest entry positive, which fixes the signs.
    """
    matrix = _at_least_float32(matrix)
    smaller = min(matrix.shape)
    if not 1 <= rank <= smaller:
        raise ValueError(f"rank {rank} is outside 1..{smaller} for shape {tuple(matrix.shape)}")
    if 4 * (rank + OVERSAMPLING) >= smaller:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, Vh = _randomised_svd(matrix, rank + OVERSAMPLING)
    return _with_fixed_signs(SVD(U[:, :rank], S[:rank], Vh[:rank]))


def spectral_norm(matrix: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Largest singular value of ``matrix`` (m, n) and its right singular vector (n,).

    Rayleigh-Ritz over the iterates of the power method v <- M^T M v from ``start`` (n,): the
    Golub-Kahan-Lanczos process, far closer than the last iterate alone where the leading singular
    values are close. Warm-start it with the vector of the last call. The estimate never exceeds
    the true norm by more than rounding.
    """
    steps = min(iterations, min(matrix.shape) - 1)
    basis = matrix.new_zeros(matrix.shape[1], steps + 1)
    basis[:, 0] = _unit(start)
    for k in range(steps):
        vector = matrix.mT @ (matrix @ basis[:, k])
        basis[:, k + 1] = _orthogonal_unit(basis[:, : k + 1], vector)
    _, values, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return values[0], basis @ right[0]


def stable_rank(frobenius_norm: Tensor, spectral_norm: Tensor) -> Tensor:
    """||M||_F^2 / ||M||_2^2, between 1 and the rank; 0 for the zero matrix."""
    ratio = (frobenius_norm / spectral_norm).square()
    return torch.where(spectral_norm > 0, ratio, torch.zeros_like(ratio))


def effective_rank(singular_values: Tensor) -> float:
    """exp(entropy of the normalised singular values) (Roy & Vetterli, 2007); 0 for zeros."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular_values / total).sum().exp())


def energies(matrix: Tensor) -> Tensor:
    """All squared singular values of ``matrix``, descending, in float64 on its device.

    Eigenvalues of the Gram matrix of the smaller side: exact to about 1e-16 of the largest,
    which is all that an energy share needs, at a fraction of an SVD's cost.
    """
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT
    return torch.linalg.eigvalsh(wide @ wide.mT).flip(0).clamp_min(0)


def captured_energy(matrix: Tensor, rows: Tensor) -> float:
    """Share of ||M||_F^2 that lies in the row space of ``rows`` (r, n): ||M Q||_F^2 / ||M||_F^2.

    NaN for a zero matrix, of which nothing can be captured.
    """
    matrix = _at_least_float32(matrix)
    basis = torch.linalg.qr(_at_least_float32(rows).mT).Q
    inside = torch.linalg.vector_norm(matrix @ basis)
    return float((inside / torch.linalg.vector_norm(matrix)).square())


def _at_least_float32(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _randomised_svd(matrix: Tensor, sketch: int) -> SVD:
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        seed = torch.cuda.manual_seed if matrix.is_cuda else torch.default_generator.manual_seed
        seed(0)
        U, S, V = torch.svd_lowrank(matrix, q=sketch, niter=POWER_ITERATIONS)
    return SVD(U, S, V.mT)


def _with_fixed_signs(svd: SVD) -> SVD:
    largest = svd.U.abs().argmax(dim=0, keepdim=True)
    signs = torch.sign(svd.U.gather(0, largest)).squeeze(0)
    return SVD(svd.U * signs, svd.S, svd.Vh * signs[:, None])


def _orthogonal_unit(basis: Tensor, vector: Tensor) -> Tensor:
    """What of ``vector`` (n,) is new to orthonormal ``basis`` (n, k); 0 if only rounding."""
    new = vector - basis @ (basis.mT @ vector)
    new = new - basis @ (basis.mT @ new)  # once is not enough to stay orthogonal in float32
    size, rounding = torch.linalg.vector_norm(new), 1e-5 * torch.linalg.vector_norm(vector)
    return torch.where(size > rounding, _unit(new), torch.zeros_like(new))


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(vector.dtype).tiny)
