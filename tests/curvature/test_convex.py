import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.linear_model import LogisticRegression

from unlearnlib.curvature import convex
from unlearnlib.curvature.convex import Problem


def random_problem(seed=0, n=60, d=5, damping=0.02, tilt=0.0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d))
    features /= np.linalg.norm(features, axis=1).max()
    labels = np.where(features @ rng.normal(size=d) + 0.3 * rng.normal(size=n) > 0, 1.0, -1.0)
    return Problem(features, labels, damping, tilt * rng.normal(size=d) if tilt else 0.0)


def torch_objective(problem, theta):
    """J as the docstring of the module has it, row by row."""
    x, y, b = (
        torch.tensor(np.broadcast_to(part, shape).copy())
        for part, shape in (
            (problem.features, problem.features.shape),
            (problem.labels, problem.labels.shape),
            (problem.tilt, problem.features.shape[1:]),
        )
    )
    rows = torch.log1p(torch.exp(-y * (x @ theta))) + problem.damping / 2 * (theta @ theta)
    return rows.sum() + b @ theta


def autograd(problem, theta):
    """Gradient and Hessian of J by autograd."""
    theta = torch.tensor(theta)
    objective = lambda t: torch_objective(problem, t)  # noqa: E731
    return (
        torch.func.grad(objective)(theta).numpy(),
        torch.func.hessian(objective)(theta).numpy(),
    )


@pytest.mark.parametrize("tilt", [0.0, 2.0])
def test_objective_gradient_and_hessian_are_autograds(tilt):
    problem, theta = random_problem(tilt=tilt), np.random.default_rng(1).normal(size=5)
    gradient, hessian = autograd(problem, theta)
    assert convex.objective(problem, theta) == pytest.approx(
        torch_objective(problem, torch.tensor(theta)).item(), rel=1e-13
    )
    np.testing.assert_allclose(convex.gradient(problem, theta), gradient, rtol=1e-12)
    np.testing.assert_allclose(convex.hessian(problem, theta), hessian, rtol=1e-12)


@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
def test_fit_is_scikit_learns_solution(damping):
    problem = random_problem(n=200, d=20, damping=damping)
    theirs = LogisticRegression(C=1 / (200 * damping), fit_intercept=False, tol=1e-12, max_iter=10_000)
    theirs = theirs.fit(problem.features, problem.labels).coef_[0]
    np.testing.assert_allclose(convex.fit(problem), theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    loss = torch_objective(problem, torch.tensor(convex.fit(problem)))
    assert loss <= torch_objective(problem, torch.tensor(theirs)) + 1e-12


def test_fit_is_stationary_from_any_start_with_a_tilt():
    problem = random_problem(tilt=5.0)
    for start in (None, 100 * np.ones(5), np.array([-300.0, 0, 0, 500, 0])):
        gradient, _ = autograd(problem, convex.fit(problem, start))
        assert np.linalg.norm(gradient) < 1e-10


def test_split_shares_out_the_objective():
    problem, theta = random_problem(tilt=2.0), np.arange(5.0)
    retained, forgotten = problem.split([3, 59])
    assert (len(retained), len(forgotten)) == (58, 2)
    np.testing.assert_array_equal(forgotten.features, problem.features[[3, 59]])
    np.testing.assert_array_equal(retained.tilt, problem.tilt)
    parts = torch_objective(retained, torch.tensor(theta)) + torch_objective(forgotten, torch.tensor(theta))
    assert parts.item() == pytest.approx(torch_objective(problem, torch.tensor(theta)).item(), rel=1e-13)


def test_newton_removal_is_the_newton_step_of_the_retained_objective():
    problem = random_problem(tilt=1.0)
    theta = convex.fit(problem)
    retained, forgotten = problem.split([0, 7, 8])
    gradient, hessian = autograd(retained, theta)  # at the optimum of the whole, minus that of the forgotten
    expected = theta - np.linalg.solve(hessian, gradient)
    np.testing.assert_allclose(convex.newton_removal(retained, forgotten, theta), expected, rtol=1e-10)


def test_newton_removal_has_a_quadratic_error():
    """Among 8 copies of a row, removing half as many moves half as far and errs a quarter as much."""
    problem = random_problem(n=4_000, damping=0.01)
    problem.features[:8], problem.labels[:8] = problem.features[0], problem.labels[0]
    theta = convex.fit(problem)
    moves, errors = [], []
    for k in (8, 4, 2, 1):
        retained, forgotten = problem.split(np.arange(k))
        exact = LogisticRegression(C=1 / (len(retained) * 0.01), fit_intercept=False, tol=1e-14, max_iter=1_000)
        exact = exact.set_params(solver="newton-cholesky").fit(retained.features, retained.labels).coef_[0]
        moves.append(np.linalg.norm(exact - theta))
        errors.append(np.linalg.norm(exact - convex.newton_removal(retained, forgotten, theta)))
    np.testing.assert_allclose(np.divide(moves[:-1], moves[1:]), 2, rtol=0.02)
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=0.04)


def test_gamma_is_the_largest_third_derivative():
    def loss(z):
        return torch.log1p(torch.exp(-z))

    third = torch.func.vmap(torch.func.grad(torch.func.grad(torch.func.grad(loss))))
    largest = third(torch.linspace(-6, 6, 20_001, dtype=torch.float64)).abs().max().item()
    assert largest == pytest.approx(convex.GAMMA, rel=1e-6)
    assert largest <= convex.GAMMA


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold(seed):
    rng = np.random.default_rng(seed)
    damping, tilt = 10 ** rng.uniform(-4, -1), rng.choice([0.0, 3.0])
    problem = random_problem(seed, n=80, damping=damping, tilt=tilt)
    theta = convex.fit(problem)
    for k in (1, 5, 30):
        retained, forgotten = problem.split(rng.choice(80, k, replace=False))
        moved = convex.newton_removal(retained, forgotten, theta)
        residual = np.linalg.norm(autograd(retained, moved)[0])
        close = convex.data_dependent_bound(retained, moved - theta, problem.spectral_norm)
        worst = convex.worst_case_bound(80, k, damping, np.linalg.norm(problem.tilt))
        assert 0 < residual <= close <= worst


def test_data_dependent_bound_cannot_be_any_smaller():
    """With a single feature that is always one, at the point of largest third derivative, it is attained."""
    share = (3 + math.sqrt(3)) / 6  # s(1 − s)(1 − 2s) is largest there
    positive = round(10_000 * share)
    labels = np.where(np.arange(10_000) < positive, 1.0, -1.0)
    problem = Problem(np.ones((10_000, 1)), labels, damping=1e-6)
    theta = convex.fit(problem)
    retained, forgotten = problem.split(np.arange(50))
    moved = convex.newton_removal(retained, forgotten, theta)
    residual = np.linalg.norm(autograd(retained, moved)[0])
    bound = convex.data_dependent_bound(retained, moved - theta, retained.spectral_norm)
    assert residual <= bound <= 1.01 * residual


def test_worst_case_bound_by_hand():
    # The gradient is at most 3 (2 + 4/10), the step at most 1/(7 · 0.5) of it, and γ/2 · 7 its square.
    expected = 1 / (6 * math.sqrt(3)) / 2 * 7 * (3 * 2.4 / (7 * 0.5)) ** 2
    assert convex.worst_case_bound(10, 3, 0.5, offset=4.0) == pytest.approx(expected)


def test_residuals_of_successive_removals_add_up_to_less_than_the_bounds():
    problem = random_problem(n=100, damping=1e-3, tilt=1.0)
    theta, spent = convex.fit(problem), 0.0
    for _ in range(40):
        retained, forgotten = problem.split([0])
        moved = convex.newton_removal(retained, forgotten, theta)
        spent += convex.data_dependent_bound(retained, moved - theta, problem.spectral_norm)
        problem, theta = retained, moved
        assert 0 < np.linalg.norm(autograd(problem, theta)[0]) <= spent


def test_spectral_norm_is_the_largest_singular_value():
    problem = random_problem()
    assert problem.spectral_norm == pytest.approx(np.linalg.svd(problem.features)[1][0], rel=1e-12)


def exact_delta(shift, sigma, epsilon):
    """The smallest δ for which N(0, σ²) and N(shift, σ²) are (ε, δ)-indistinguishable, by quadrature."""
    p, q = stats.norm(0, sigma), stats.norm(shift, sigma)
    crossing = shift / 2 - epsilon * sigma**2 / shift  # p > e^ε q to the left of it
    excess = integrate.quad(lambda x: p.pdf(x) - math.exp(epsilon) * q.pdf(x), -40 * sigma, crossing, epsabs=1e-14)
    return excess[0]


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 1.0, 2 * math.log(3)])
@pytest.mark.parametrize("delta", [0.5, 1e-2, 1e-4, 1e-6])
def test_noise_suffices_and_not_by_far(epsilon, delta):
    residual = 0.7
    sigma = residual * convex.noise_per_residual(epsilon, delta)
    assert 1.5 * math.exp(-((sigma * epsilon / residual) ** 2) / 2) == pytest.approx(delta)
    assert 0 < exact_delta(residual, sigma, epsilon) <= delta
    if epsilon >= 1 and delta < 0.1:
        assert exact_delta(residual, 0.5 * sigma, epsilon) > delta


def test_unusable_problems_are_refused():
    good = random_problem()
    rows = good.features.copy()
    rows[[4, 11]] *= 1.0001 / np.linalg.norm(rows[[4, 11]], axis=1, keepdims=True)
    with pytest.raises(ValueError, match=r"row\(s\) \[4, 11\] of the features have a norm above one"):
        Problem(rows, good.labels, 0.1)
    rows[:] = good.features
    rows[2, 0] = np.nan
    with pytest.raises(ValueError, match=r"row\(s\) \[2\]"):
        Problem(rows, good.labels, 0.1)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be positive"):
            Problem(good.features, good.labels, damping)
    with pytest.raises(ValueError, match=r"label \d+ is 0.0: labels must be -1 or \+1"):
        Problem(good.features, (good.labels + 1) / 2, 0.1)
    with pytest.raises(ValueError, match="60 rows of 5 features need 60 labels and a tilt of 5 numbers"):
        Problem(good.features, good.labels[:-1], 0.1)
    with pytest.raises(ValueError, match="a tilt of 5 numbers"):
        Problem(good.features, good.labels, 0.1, tilt=np.ones(4))


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ([], "empty: name at least one row"),
        (range(60), "all 60 rows: nothing would be left"),
        ([3, 3], "each row once"),
        ([60], "from 0 to 59"),
        ([-1], "from 0 to 59"),
    ],
)
def test_impossible_forget_sets_are_refused(forget, message):
    with pytest.raises(ValueError, match=message):
        random_problem().split(list(forget))


def test_fit_says_when_it_does_not_converge():
    problem = random_problem(damping=1e-4)
    with pytest.raises(RuntimeError, match="not converged in 2 Newton steps"):
        convex.fit(problem, max_steps=2)
    with pytest.raises(RuntimeError, match="larger tolerance or use more damping"):
        convex.fit(problem, tolerance=0.0)


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-4), (3, 1e-4), (1, 0), (1, 0.6), (float("nan"), 1e-4)])
def test_unproved_privacy_parameters_are_refused(epsilon, delta):
    with pytest.raises(ValueError, match="need 0 < epsilon"):
        convex.noise_per_residual(epsilon, delta)


def test_gradients_of_rows_are_those_of_problems_of_one_row():
    problem, theta = random_problem(tilt=2.0), np.random.default_rng(1).normal(size=5)
    gradients = convex.row_gradients(problem, theta)
    for row in (0, 17, 59):
        _, alone = problem.split([row])
        np.testing.assert_allclose(gradients[row], autograd(alone, theta)[0], rtol=1e-12)
    np.testing.assert_allclose(gradients.sum(axis=0) + problem.tilt, convex.gradient(problem, theta), rtol=1e-12)


def test_accuracy_counts_the_rows_on_the_right_side():
    problem = Problem(np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]), np.array([1.0, 1, 1, -1]), 0.1)
    assert convex.accuracy(problem, np.array([1.0, 0.5])) == 0.5  # the first two are right
