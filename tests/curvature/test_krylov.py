"""Krylov methods on small matrices with known answers, in float64."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg

from unlearnlib.curvature import krylov


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
    with pytest.raises(krylov.NegativeCurvature, match=r"perhaps much less.*converged estimate"):
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


# Few eigenvalues far up, many around zero, a cluster at the lower end: what the Hessian of a network looks like.
CLUSTERED = [-0.4, -0.395, -0.39, -0.35, *np.linspace(-0.2, 0.2, 500), *np.linspace(1, 150, 60)]


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_eigenvalue_of_a_clustered_spectrum(seed):
    matrix = matrix_with(CLUSTERED, seed)
    start = vector(len(matrix), seed + 10)
    found = krylov.smallest_eigenvalue(lambda v: matrix @ v, start)
    assert found.bound <= -0.4 <= found.value + 1e-12
    assert found.residual <= 0.1 * abs(found.value)
    sharp = krylov.smallest_eigenvalue(lambda v: matrix @ v, start, tolerance=1e-6)
    assert sharp.value == pytest.approx(-0.4, abs=1e-9)
    assert len(sharp.run.matrix) > len(found.run.matrix)
    # A few steps are not enough: 1.2 times the size of that Ritz value leaves the matrix indefinite.
    early, _ = krylov.lanczos(lambda v: matrix @ v, start, 20).smallest()
    assert 1.2 * abs(early) < 0.4 < 1.2 * abs(found.bound)


def test_the_residual_of_a_ritz_pair_is_its_residual():
    run = krylov.lanczos(lambda v: SPD @ v, B, 8)
    value, residual = run.smallest()
    _, vectors = torch.linalg.eigh(run.matrix)
    x = vectors[:, 0] @ run.basis
    assert residual == pytest.approx((SPD @ x - value * x).norm().item(), rel=1e-8)
    assert (torch.linalg.eigvalsh(SPD) - value).abs().min().item() <= residual


def test_a_start_without_the_smallest_eigenvector_finds_the_next():
    """What no residual can tell, and why only a converged estimate from a suitable start is a bound."""
    values = torch.tensor([-2.0, *np.linspace(-1, 3, 40)], dtype=torch.float64)
    start = torch.ones(41, dtype=torch.float64)
    assert krylov.smallest_eigenvalue(lambda v: values * v, start, 1e-6).value == pytest.approx(-2)
    start[0] = 0
    assert krylov.smallest_eigenvalue(lambda v: values * v, start, 1e-6).value == pytest.approx(-1)


def test_a_singular_matrix_and_a_single_step():
    matrix = matrix_with([0.0] * 5 + [1.0] * 10 + [4.0] * 15)
    found = krylov.smallest_eigenvalue(lambda v: matrix @ v, B)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.bound <= 1e-12
    assert krylov.smallest_eigenvalue(lambda v: -3 * v, B).value == pytest.approx(-3)


def test_an_estimate_that_has_not_converged_is_refused():
    matrix = matrix_with(CLUSTERED)
    with pytest.raises(krylov.NotConverged, match=r"after 10 steps .* allow more steps"):
        krylov.smallest_eigenvalue(lambda v: matrix @ v, vector(len(matrix)), max_steps=10)


def test_lanczos_refuses_bad_input():
    with pytest.raises(ValueError, match="at least one step"):
        krylov.lanczos(lambda v: v, B, 0)
    with pytest.raises(ValueError, match="starting vector is zero"):
        krylov.lanczos(lambda v: v, 0 * B, 3)
    with pytest.raises(FloatingPointError, match="product with the matrix is not finite"):
        krylov.lanczos(lambda v: v / 0, B, 3)
