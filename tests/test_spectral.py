"""Spectra against SciPy's exact decomposition."""

import numpy as np
import pytest
import scipy.linalg
import torch

from switchlora.monitor import (
    captured_energy,
    effective_rank,
    energies,
    polar_factor,
    spectral_norm,
    stable_rank,
    truncated_svd,
)
from switchlora.monitor.spectral import polar_by_products


def decaying(rows, columns, power=1.0, seed=0):
    """A random matrix with singular values 1, 2^-p, 3^-p, ..."""
    rng = np.random.default_rng(seed)
    k = min(rows, columns)
    U, _ = np.linalg.qr(rng.normal(size=(rows, k)))
    V, _ = np.linalg.qr(rng.normal(size=(columns, k)))
    values = np.arange(1, k + 1) ** -power
    return torch.tensor(U * values @ V.T, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(40, 30), (300, 200), (200, 600)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_truncated_svd_is_the_best_approximation_to_a_thousandth(shape, rank):
    matrix = decaying(*shape)
    U, S, Vh = truncated_svd(matrix, rank)
    exact = scipy.linalg.svdvals(matrix.numpy())
    assert np.allclose(S, exact[:rank], rtol=1e-3)
    best = np.sqrt((exact[rank:] ** 2).sum())
    assert torch.linalg.matrix_norm(matrix - (U * S) @ Vh) <= best * 1.001


def test_truncated_svd_is_repeatable_and_leaves_the_global_rng_alone():
    matrix = decaying(200, 300)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = truncated_svd(matrix, 5)
    torch.rand(3)
    second = truncated_svd(matrix, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.set_rng_state(state)
    truncated_svd(matrix, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_signs_do_not_depend_on_the_algorithm():
    matrix = decaying(200, 100)
    exact, randomised = truncated_svd(matrix, 90), truncated_svd(matrix, 4)
    assert torch.allclose(exact.U[:, :4], randomised.U, atol=1e-2)


def test_svd_of_bfloat16_is_done_in_float32_and_is_finite():
    U, S, Vh = truncated_svd(decaying(64, 200).bfloat16(), 4)
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    assert all(torch.isfinite(t).all() for t in (U, S, Vh))


def test_a_rank_above_the_matrix_is_refused():
    with pytest.raises(ValueError, match=r"rank 5 is outside 1\.\.4"):
        truncated_svd(torch.ones(4, 9), 5)


@pytest.mark.parametrize("power", [0.05, 0.3, 1.0])
def test_the_spectral_norm_is_right_to_a_thousandth_and_never_above(power):
    matrix = decaying(192, 96, power)
    exact = scipy.linalg.svdvals(matrix.numpy())[0]
    norm, vector = spectral_norm(matrix, torch.ones(96), 5)
    warm, _ = spectral_norm(matrix, vector, 5)
    assert norm <= warm * (1 + 1e-6) <= exact * (1 + 1e-5)
    assert warm == pytest.approx(exact, rel=1e-3)


def test_the_spectral_norm_of_zero_and_of_rank_one():
    assert spectral_norm(torch.zeros(5, 4), torch.ones(4), 5)[0] == 0
    one = torch.outer(torch.arange(5.0), torch.ones(7))
    assert spectral_norm(one, torch.ones(7), 5)[0] == pytest.approx(210**0.5, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (2, 700), (700, 2), (3, 3)])
def test_the_spectral_norm_is_right_at_any_shape(shape):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=generator)
    start = torch.randn(shape[1], generator=generator)
    exact = torch.linalg.matrix_norm(matrix, 2)
    assert spectral_norm(matrix, start, 5)[0] == pytest.approx(exact.item(), rel=1e-4)


def test_stable_rank_of_identity_of_rank_one_and_of_zero():
    one = torch.outer(torch.ones(5), torch.arange(4.0))
    for matrix, expected in [(torch.eye(6), 6.0), (one, 1.0), (torch.zeros(3, 3), 0.0)]:
        fro = torch.linalg.matrix_norm(matrix)
        spectral = torch.linalg.matrix_norm(matrix, 2)
        assert stable_rank(fro, spectral).item() == pytest.approx(expected, rel=1e-5)


def test_effective_rank_counts_equal_singular_values():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0, rel=1e-5)
    assert effective_rank(torch.zeros(4)) == 0.0


@pytest.mark.parametrize("shape", [(30, 80), (80, 30)])
def test_energies_are_the_squared_singular_values(shape):
    matrix = decaying(*shape)
    exact = scipy.linalg.svdvals(matrix.double().numpy()) ** 2
    assert np.allclose(energies(matrix), exact, rtol=1e-6, atol=1e-12)


def test_captured_energy_of_leading_directions_is_their_share():
    matrix = decaying(60, 40)
    share = energies(matrix)[:5].sum() / energies(matrix).sum()
    rows = 3 * truncated_svd(matrix, 5).Vh
    assert captured_energy(matrix, rows) == pytest.approx(float(share), rel=1e-4)
    assert captured_energy(matrix, torch.eye(40)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("shape", [(60, 60), (200, 40), (40, 200)])
def test_the_polar_factor_is_the_same_by_products_alone(shape):
    matrix = decaying(*shape)
    exact, _ = scipy.linalg.polar(matrix.double().numpy())
    for found in (polar_factor(matrix), polar_by_products(matrix)):
        assert np.allclose(found, exact, atol=1e-4)
    assert not polar_by_products(torch.full_like(matrix, torch.nan)).isfinite().any()
