"""Spectra of matrices: truncated SVD, spectral norm, stable rank, effective rank, energies.

Everything is computed in at least float32, whatever the dtype of the input.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 8
POWER_ITERATIONS = 4
POLAR_ITERATIONS = 24
"""each makes small singular values 1.875 times larger: enough for those of 1e-6 of the norm"""


class SVD(NamedTuple):
    """Truncated singular value decomposition M ~ U diag(S) Vh: (m, r), (r,), (r, n)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def truncated_svd(matrix: Tensor, rank: int) -> SVD:
    """Return the leading ``rank`` singular triplets of ``matrix`` (m, n).

    The method is a randomised range finder with oversampling and power iterations (Halko,
    Martinsson & Tropp, arXiv 0909.4061), or the exact decomposition if that is cheaper. Signs are
    fixed: each left singular vector has its largest entry positive. The global random generators
    are left untouched. ValueError for a rank outside 1..min(m, n).
    """
    matrix = _at_least_float32(matrix)
    smaller = min(matrix.shape)
    if not 1 <= rank <= smaller:
        raise ValueError(f"rank {rank} is outside 1..{smaller} for shape {tuple(matrix.shape)}")
    if 4 * (rank + OVERSAMPLING) >= smaller:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, Vh = _randomised_svd(matrix, rank + OVERSAMPLING)
    leading = SVD(U[:, :rank], S[:rank], Vh[:rank])
    return _with_fixed_signs(leading)


def spectral_norm(matrix: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular value of ``matrix`` (m, n) and its right singular vector (n,).

    The power method v <- M^T M v starts from ``start`` (n,). Rayleigh-Ritz over all its iterates
    is the Golub-Kahan-Lanczos process. This is far more accurate than the last iterate alone when
    the leading singular values are close. Start it from the vector of the previous call. The
    estimate never exceeds the true norm by more than rounding.
    """
    rows, columns = matrix.shape
    steps = min(iterations, rows, columns - 1)
    basis = matrix.new_zeros(matrix.shape[1], steps + 1)
    basis[:, 0] = _unit(start)
    for size in range(1, steps + 1):
        found = basis[:, :size]
        vector = matrix.mT @ (matrix @ found[:, -1])
        basis[:, size] = _orthogonal_unit(found, vector)
    _, values, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return values[0], basis @ right[0]


def polar_factor(matrix: Tensor) -> Tensor:
    """Return U V^T of the decomposition M = U S V^T; NaN where that fails.

    It takes an SVD on a CPU. On a GPU that would be slow, so there it is made of products.
    """
    if matrix.device.type != "cpu":
        return polar_by_products(matrix)
    try:
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        return torch.full_like(matrix, torch.nan)
    return U @ Vh


def polar_by_products(matrix: Tensor) -> Tensor:
    """Return U V^T of M = U S V^T by Newton and Schulz's iteration of the fifth order.

    X <- X (15 - 10 X^T X + 3 (X^T X)^2) / 8 takes all singular values between 0 and 1 to 1.
    """
    rows, columns = matrix.shape
    if rows < columns:
        return polar_by_products(matrix.mT).mT
    norm = torch.linalg.vector_norm(matrix)
    X = matrix / norm.clamp_min(torch.finfo(matrix.dtype).tiny)
    identity = torch.eye(columns, dtype=X.dtype, device=X.device)
    for _ in range(POLAR_ITERATIONS):
        gram = X.mT @ X
        X = X @ (15 * identity - 10 * gram + 3 * gram @ gram) / 8
    return X


def stable_rank(frobenius_norm: Tensor, spectral_norm: Tensor) -> Tensor:
    """Return ||M||_F^2 / ||M||_2^2, between 1 and the rank; 0 for the zero matrix, NaN for NaN.

    >>> singular = torch.tensor([4.0, 3.0])
    >>> stable_rank(singular.norm(), singular.max()).item()
    1.5625
    """
    ratio = (frobenius_norm / spectral_norm).square()
    return torch.where(spectral_norm == 0, torch.zeros_like(ratio), ratio)


def effective_rank(singular_values: Tensor) -> float:
    """Return exp(entropy of the normalised singular values); 0 for zeros.

    Defined by Roy & Vetterli (2007).

    >>> round(effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])), 4)
    3.0
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    entropy = torch.special.entr(singular_values / total).sum()
    return float(entropy.exp())


def energies(matrix: Tensor) -> Tensor:
    """Return all squared singular values of ``matrix``, descending, in float64 on its device.

    They are the eigenvalues of the Gram matrix of the smaller side. Their error is about 1e-16 of
    the largest, which is enough for energy shares. It costs a fraction of an SVD.
    """
    rows, columns = matrix.shape
    matrix = matrix.double()
    wide = matrix if rows <= columns else matrix.mT
    ascending = torch.linalg.eigvalsh(wide @ wide.mT)
    return ascending.flip(0).clamp_min(0)


def captured_energy(matrix: Tensor, rows: Tensor) -> float:
    """Return the share of ||M||_F^2 that lies in the row space of ``rows`` (r, n).

    It is ||M Q||_F^2 / ||M||_F^2, where the columns of Q are an orthonormal basis of that space.
    NaN for a zero matrix.
    """
    matrix = _at_least_float32(matrix)
    rows = _at_least_float32(rows)
    basis, _ = torch.linalg.qr(rows.mT)
    inside = torch.linalg.vector_norm(matrix @ basis)
    whole = torch.linalg.vector_norm(matrix)
    return float((inside / whole).square())


def _at_least_float32(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _randomised_svd(matrix: Tensor, sketch: int) -> SVD:
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        if matrix.is_cuda:
            torch.cuda.default_generators[matrix.get_device()].manual_seed(0)
        else:
            torch.default_generator.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, q=sketch, niter=POWER_ITERATIONS)
    return SVD(U, S, V.mT)


def _with_fixed_signs(svd: SVD) -> SVD:
    U, S, Vh = svd
    place = U.abs().argmax(dim=0, keepdim=True)
    largest = U.gather(0, place)
    signs = torch.sign(largest).squeeze(0)
    return SVD(U * signs, S, Vh * signs[:, None])


def _orthogonal_unit(basis: Tensor, vector: Tensor) -> Tensor:
    """Return the unit vector of the part of ``vector`` (n,) that is orthogonal to ``basis``.

    ``basis`` (n, k) is orthonormal. The result is 0 if only rounding is left of ``vector``.
    """
    new = vector - basis @ (basis.mT @ vector)
    new = new - basis @ (basis.mT @ new)  # once is not enough to stay orthogonal in float32
    size = torch.linalg.vector_norm(new)
    rounding = 1e-5 * torch.linalg.vector_norm(vector)
    return torch.where(size > rounding, _unit(new), torch.zeros_like(new))


def _unit(vector: Tensor) -> Tensor:
    tiny = torch.finfo(vector.dtype).tiny
    norm = torch.linalg.vector_norm(vector).clamp_min(tiny)
    return vector / norm
