import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from unlearnlib.methods import targets


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ridge(x, y, penalty):
    """The minimiser of ½‖xθ − y‖² + ½ penalty ‖θ‖², by scikit-learn."""
    return Ridge(alpha=penalty, fit_intercept=False, solver="cholesky").fit(x, y).coef_


def test_newtons_step_from_a_minimum_predicts_the_left_out_loss_of_a_ridge_regression():
    """Not only to first order: a quadratic loss is its own expansion, here taken along the path to retraining."""
    x, y = drawn(40, 5).numpy(), drawn(40, seed=1).numpy()
    out, penalty = slice(0, 6), 0.7
    whole, rest = ridge(x, y, penalty), ridge(x[6:], y[6:], penalty)
    delta = x[out].T @ (x[out] @ whole - y[out]) / 6
    # What stays is a mean over 34 rows, to which the whole penalty belongs.
    curvature = (x[6:].T @ x[6:] + penalty * np.eye(5)) / 34
    step = 6 / 34 * np.linalg.solve(curvature, delta)
    assert np.allclose(whole + step, rest)

    def loss(theta):
        return np.square(x[out] @ theta - y[out]).mean() / 2

    first = targets.left_out_loss(loss(whole), delta @ np.linalg.solve(curvature, delta), 6 / 34)
    bent = step @ (x[out].T @ x[out] / 6) @ step / 2
    assert first + bent == pytest.approx(loss(rest), rel=1e-10)
    assert first < loss(rest)


def test_away_from_a_minimum_the_difference_form_knows_what_training_alike_changes():
    """Gradient flow of equal length on both sets, of equal Hessian: (1 − exp(−Tt))/t stands for the inverse."""
    half = drawn(20, 4).numpy()
    x, y = np.tile(half, (2, 1)), drawn(40, seed=1).numpy()
    hessian, time, start = half.T @ half / 20, 0.8, drawn(4, seed=2).numpy()
    values, vectors = np.linalg.eigh(hessian)

    def flow(rows):
        best = np.linalg.lstsq(x[rows], y[rows], rcond=None)[0]
        return best + vectors @ (np.exp(-time * values) * (vectors.T @ (start - best)))

    out, rest = slice(0, 20), slice(20, 40)
    theta, without = flow(slice(0, 40)), flow(rest)
    delta, g = (x[rows].T @ (x[rows] @ theta - y[rows]) / 20 for rows in (out, rest))
    assert np.linalg.norm((delta + g) / 2) > 0.1 * np.linalg.norm(delta)  # no minimum
    inverse = vectors @ np.diag((1 - np.exp(-time * values)) / values) @ vectors.T
    loss = np.square(x[out] @ theta - y[out]).mean() / 2
    step = 20 / 40 * inverse @ (delta - g)
    assert np.allclose(theta + step, without)
    predicted = targets.left_out_loss(loss, delta @ inverse @ (delta - g), 20 / 40)
    exact = np.square(x[out] @ without - y[out]).mean() / 2
    assert predicted + step @ hessian @ step / 2 == pytest.approx(exact, rel=1e-10)


def test_a_line_through_points_on_a_line_is_exact_and_certain():
    difficulty = drawn(30)
    found = targets.fitted_target(2 + 3 * difficulty, torch.tensor([4.0, 6.0]), difficulty)
    assert found.loss == pytest.approx(2 + 3 * 5)
    assert found.error == pytest.approx(0, abs=1e-7)


def test_the_errors_are_those_of_repeated_samples():
    """Of 1,000 draws the estimates miss the mean of new values by as much as is said, for all ways."""
    number, others, misses, said = 5, 12, [], []
    for seed in range(1000):
        x, noise = drawn(number + others, seed=seed), drawn(number + others, seed=10_000 + seed)
        y = 1 + 2 * x + 0.5 * noise
        fitted = targets.fitted_target(y[number:], x[:number], x[number:])
        plain = targets.holdout_target(y[number:], number)
        misses.append([target.loss - y[:number].mean().item() for target in (fitted, plain)])
        said.append([fitted.error, plain.error])
    spread, said = np.sqrt(np.square(misses).mean(axis=0)), np.sqrt(np.square(said).mean(axis=0))
    assert np.allclose(spread, said, rtol=0.08)
    assert np.abs(np.mean(misses, axis=0)).max() < 0.08


def test_the_holdout_target_is_a_mean_and_a_difficulty_that_says_nothing_changes_nothing():
    losses = drawn(20) + 4
    found = targets.holdout_target(losses, 8)
    assert found.loss == pytest.approx(losses.mean().item())
    assert found.error == pytest.approx(losses.std().item() * math.sqrt(1 / 8 + 1 / 20))


def test_the_gap_is_added_to_the_loss_of_the_forget_set():
    found = targets.gap_target(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 6.0]))
    assert found.loss == pytest.approx(2 + 5 - 2)
    assert found.error == pytest.approx(math.sqrt(2 / 2 + 1 / 3))


def test_the_damping_is_found_where_the_prediction_is_the_gap():
    dampings = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)
    predicted = 0.05 / dampings  # a power law, so that interpolation in logarithms is exact
    assert targets.calibrated_damping(dampings, predicted, 2.0) == pytest.approx(0.025, rel=1e-6)
    assert targets.calibrated_damping(dampings, predicted, 50.0) == pytest.approx(1e-3, rel=1e-6)
    for gap in (60.0, 0.4, -1.0):
        with pytest.raises(ValueError, match="do not span the gap"):
            targets.calibrated_damping(dampings, predicted, gap)


@pytest.mark.parametrize(("holdout", "forget", "difficulty"), [(2, 1, 2), (5, 0, 5), (5, 1, 4)])
def test_too_little_or_what_does_not_fit_is_refused(holdout, forget, difficulty):
    with pytest.raises(ValueError, match="a line needs three"):
        targets.fitted_target(torch.ones(holdout), torch.ones(forget), torch.ones(difficulty))
    with pytest.raises(ValueError, match="fewer than two losses"):
        targets.gap_target(torch.ones(3), torch.ones(1), torch.ones(3))


@pytest.mark.parametrize("constant", [3.1, 0.7, 2.3])
def test_difficulties_that_are_all_equal_say_nothing(constant):
    x = torch.full((7,), constant, dtype=torch.float64)
    holdout = torch.linspace(2.9, 3.2, 7, dtype=torch.float64)
    assert targets.fitted_target(holdout, x[:3] + 0.4, x).loss == pytest.approx(3.05, abs=1e-12)


def test_a_gap_needs_something_to_forget():
    with pytest.raises(ValueError, match="0 forget"):
        targets.gap_target(torch.empty(0), torch.ones(3), torch.ones(3))
