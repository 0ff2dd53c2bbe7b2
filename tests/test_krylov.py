"""Krylov methods on small matrices with known answers, in float64."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg

from unlearnlib import krylov


def matrix_with(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return basis @ torch.diag(values) @ basis.T


def vector(d, seed=1):
    return torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SPD = matrix_with(np.logspace(-2, 2, 30))
B = vector(30)


def test_conjugate_gradients_solve():
    found = krylov.conjugate_gradients(lambda v: SPD @ v, B, tolerance=1e-10)
    torch.testing.assert_close(found.x, torch.linalg.solve(SPD, B), rtol=1e-7, atol=1e-9)
    true = ((B - SPD @ found.x).norm() / B.norm()).item()
    assert found.residuals[-1] == pytest.approx(true, abs=1e-11)
    assert found.residuals[0] == 1.0


def test_conjugate_gradients_take_the_same_steps_as_scipys():
    matrix = matrix_with(np.logspace(-0.5, 0.5, 30))
    ours = krylov.conjugate_gradients(lambda v: matrix @ v, B, tolerance=1e-3)
    theirs = []
    cg(matrix.numpy(), B.numpy(), rtol=1e-3, callback=lambda x: theirs.append(x.copy()))
    assert len(ours.residuals) - 1 == len(theirs) > 4
    np.testing.assert_allclose(ours.x.numpy(), theirs[-1], rtol=1e-9, atol=1e-12)


def test_as_many_iterations_as_distinct_eigenvalues():
    matrix = matrix_with([1.0] * 10 + [5.0] * 10 + [9.0] * 10)
    assert len(krylov.conjugate_gradients(lambda v: matrix @ v, B, tolerance=1e-10).residuals) == 4


def test_preconditioning_with_the_inverse_takes_one_iteration():
    inverse = torch.linalg.inv(SPD)
    found = krylov.conjugate_gradients(lambda v: SPD @ v, B, 1e-8, precondition=lambda v: inverse @ v)
    assert len(found.residuals) == 2
    torch.testing.assert_close(found.x, inverse @ B)


def test_a_zero_right_hand_side():
    assert krylov.conjugate_gradients(lambda v: SPD @ v, torch.zeros_like(B)).x.norm() == 0


def test_never_a_silent_wrong_answer():
    indefinite = matrix_with([-1.0, *[2.0] * 29])
    with pytest.raises(krylov.NegativeCurvature, match="raise the damping by more than"):
        krylov.conjugate_gradients(lambda v: indefinite @ v, B)
    with pytest.raises(krylov.NotConverged, match=r"after 3 iterations.*allow more iterations"):
        krylov.conjugate_gradients(lambda v: SPD @ v, B, tolerance=1e-10, max_iterations=3)
    with pytest.raises(FloatingPointError, match="a product with the matrix is not finite"):
        krylov.conjugate_gradients(lambda v: v * torch.inf, B)
    with pytest.raises(FloatingPointError, match="the right-hand side is not finite"):
        krylov.conjugate_gradients(lambda v: v, B * torch.nan)


@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.25, 2.0])
def test_lanczos_applies_functions(exponent):
    found = krylov.lanczos(lambda v: SPD @ v, B, 30)
    values, vectors = torch.linalg.eigh(SPD)
    expected = vectors @ (values**exponent * (vectors.T @ B))
    torch.testing.assert_close(found.apply(lambda t: t**exponent), expected, rtol=1e-7, atol=1e-8)


def test_lanczos_in_k_steps_is_conjugate_gradients_in_k_iterations():
    damping = 0.5
    system = SPD + damping * torch.eye(30, dtype=torch.float64)
    found = krylov.lanczos(lambda v: SPD @ v, B, 12)
    for steps in (3, 7, 12):
        with pytest.raises(krylov.NotConverged) as error:
            krylov.conjugate_gradients(lambda v: system @ v, B, 1e-12, max_iterations=steps)
        x = found.apply(lambda t: 1 / (t + damping), steps)
        residual = ((B - system @ x).norm() / B.norm()).item()
        assert f"{residual:.1e}" in str(error.value)
        assert found.residual(damping, steps) == pytest.approx(residual, rel=1e-6)


def test_lanczos_finds_the_ends_of_the_spectrum_and_keeps_its_basis_orthonormal():
    matrix = matrix_with([-3.0, *np.linspace(0, 1, 200), 50.0])
    found = krylov.lanczos(lambda v: matrix @ v, vector(202), 40)
    nodes, weights = found.quadrature()
    assert nodes[0].item() == pytest.approx(-3, abs=1e-8)
    assert nodes[-1].item() == pytest.approx(50, abs=1e-8)
    assert weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(40, dtype=torch.float64))


def test_quadrature_has_the_moments_of_the_matrix():
    nodes, weights = krylov.lanczos(lambda v: SPD @ v, B, 6).quadrature()
    power = B / B.norm()
    for moment in range(1, 10):  # k nodes are exact up to the power 2k - 1
        power = SPD @ power
        assert (weights * nodes**moment).sum().item() == pytest.approx((power @ B / B.norm()).item(), rel=1e-8)


def test_lanczos_stops_where_the_space_closes():
    matrix = matrix_with([1.0] * 10 + [5.0] * 20)
    found = krylov.lanczos(lambda v: matrix @ v, B, 30)
    assert len(found.matrix) == 2
    torch.testing.assert_close(found.apply(lambda t: 1 / t), torch.linalg.solve(matrix, B))


def test_lanczos_refuses_bad_input():
    with pytest.raises(ValueError, match="at least one step"):
        krylov.lanczos(lambda v: v, B, 0)
    with pytest.raises(ValueError, match="starting vector is zero"):
        krylov.lanczos(lambda v: v, 0 * B, 3)
    with pytest.raises(FloatingPointError, match="product with the matrix is not finite"):
        krylov.lanczos(lambda v: v / 0, B, 3)
