"""Newton's removal in a small space: against dense solutions, conjugate gradients and retraining, in float64."""

import functools

import pytest
import torch
from helpers import random_sequences, tiny_model
from torch import nn

from unlearnlib import weights
from unlearnlib.curvature import kronecker, krylov
from unlearnlib.curvature.block_gauss_newton import BlockGaussNewton
from unlearnlib.curvature.newton import GaussNewton
from unlearnlib.losses import counted_passes, mean_loss
from unlearnlib.methods import matching, newton_removal
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.methods.newton_removal import NaturalPath, krylov_subspace

DAMPING = 0.05
SIZE = 12


class Dense:
    """A curvature whose matrix is written down, and which counts its products."""

    def __init__(self, matrix):
        self.matrix, self.products = matrix, 0

    def matvec(self, v):
        self.products += 1
        return weights.unflatten(self.matrix @ weights.flatten(v), v)

    def solve(self, v, damping):
        return weights.unflatten(torch.linalg.solve(damped(self.matrix, damping), weights.flatten(v)), v)


def damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_vector(row):
    """In two parts, so that names and shapes matter."""
    return {"first": row[:8].view(2, 4), "second": row[8:]}


V = as_vector(drawn(SIZE, seed=1))


def singular(rank=7, seed=2):
    """A positive semi-definite matrix that has no inverse."""
    rows = drawn(rank, SIZE, seed=seed)
    return Dense(rows.T @ rows)


def diagonal_of(curvature):
    return Dense(torch.diag(curvature.matrix.diagonal()))


def energy(curvature, damping, x):
    """½xᵀ(G + λI)x − vᵀx, least where (G + λI)x = v."""
    row = weights.flatten(x)
    return (0.5 * row @ damped(curvature.matrix, damping) @ row - row @ weights.flatten(V)).item()


@pytest.mark.parametrize("preconditioner", [diagonal_of, lambda _: singular(3, seed=5)])
@pytest.mark.parametrize("damping", [1e-3, DAMPING, 10.0])
def test_a_space_of_all_directions_has_the_solution_for_every_damping(preconditioner, damping):
    curvature = singular()
    space = krylov_subspace(curvature, preconditioner(curvature), V, DAMPING, SIZE)
    for name, value in space.solve(damping).items():
        torch.testing.assert_close(value, Dense(curvature.matrix).solve(V, damping)[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-3, DAMPING, 10.0])
def test_without_a_preconditioner_as_many_products_do_as_there_are_eigenvalues(damping):
    axes = torch.linalg.qr(drawn(SIZE, SIZE, seed=3)).Q
    curvature = Dense(axes @ torch.diag(torch.tensor([0.0, 1.0, 5.0]).double().repeat(4)) @ axes.T)
    nothing = Dense(torch.zeros(SIZE, SIZE, dtype=torch.float64))
    space = krylov_subspace(curvature, nothing, V, DAMPING, 3)
    expected = weights.flatten(curvature.solve(V, damping))
    torch.testing.assert_close(weights.flatten(space.solve(damping)), expected, rtol=1e-9, atol=1e-11)
    fewer = krylov_subspace(curvature, nothing, V, DAMPING, 2).solve(damping)
    assert (weights.flatten(fewer) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("products", [1, 2, 3, 5])
def test_products_are_steps_of_conjugate_gradients_with_the_preconditioner(products):
    curvature = singular()
    factors = diagonal_of(curvature)
    space = krylov_subspace(curvature, factors, V, DAMPING, products)
    residuals = []

    def precondition(r):
        residuals.append(r.clone())
        return weights.flatten(factors.solve(weights.unflatten(r, V), DAMPING))

    system, row = damped(curvature.matrix, DAMPING), weights.flatten(V)
    with pytest.raises(krylov.NotConverged):  # after so many steps and no more
        krylov.conjugate_gradients(lambda p: system @ p, row, 1e-12, products, precondition)
    theirs = torch.linalg.solve(system, row - residuals[products])
    torch.testing.assert_close(weights.flatten(space.solve(DAMPING)), theirs, rtol=1e-8, atol=1e-10)


def test_on_a_language_model_it_is_conjugate_gradients_with_kfac():
    model, forget, retain = tiny_model(), random_sequences(5), random_sequences(12, seed=1)
    factors, delta = kronecker.kfac(model, retain), ascent_direction(model, forget)
    everything = [tuple(weights.parameters(model))]
    matrix = BlockGaussNewton(model, retain, everything, 4, factors)
    space = krylov_subspace(GaussNewton(model, retain), factors, delta, DAMPING, 4)
    ours, theirs = space.solve(DAMPING), matrix.solve(delta, DAMPING)
    assert weights.norm(weights.difference(ours, theirs)) < 1e-8 * weights.norm(theirs)
    assert list(ours) == list(weights.parameters(model))


def test_the_first_direction_is_what_the_preconditioner_takes_for_the_solution():
    curvature = singular()
    factors = diagonal_of(curvature)
    space = krylov_subspace(curvature, factors, V, DAMPING, 4)
    expected = factors.solve(V, DAMPING)
    assert weights.cosine(weights.unflatten(space.basis[0], V), expected) == pytest.approx(1, abs=1e-12)
    assert weights.cosine(krylov_subspace(curvature, factors, V, DAMPING, 1).solve(7.0), expected) == (
        pytest.approx(1, abs=1e-12)
    )


def test_what_it_holds_is_the_matrix_and_the_vector_within_the_space():
    curvature = singular()
    space = krylov_subspace(curvature, diagonal_of(curvature), V, DAMPING, 4)
    assert curvature.products == 4
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(space.basis @ space.basis.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(space.matrix, space.basis @ curvature.matrix @ space.basis.T)
    torch.testing.assert_close(space.right, space.basis @ weights.flatten(V))


def test_the_first_directions_are_the_space_of_so_many_products():
    curvature = singular()
    whole = krylov_subspace(curvature, diagonal_of(curvature), V, DAMPING, 5)
    for number in (1, 3, 5):
        fewer = krylov_subspace(curvature, diagonal_of(curvature), V, DAMPING, number)
        for name, value in whole.first(number).solve(0.3).items():
            torch.testing.assert_close(value, fewer.solve(0.3)[name], rtol=1e-10, atol=1e-12)


def test_a_perfect_preconditioner_needs_one_product():
    curvature = singular()
    space = krylov_subspace(curvature, Dense(curvature.matrix), V, DAMPING, 1)
    expected = weights.flatten(curvature.solve(V, DAMPING))
    torch.testing.assert_close(weights.flatten(space.solve(DAMPING)), expected, rtol=1e-9, atol=1e-11)


def test_where_nothing_new_is_proposed_no_further_products_are_made():
    curvature = Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0]).double().repeat(4)))
    nothing = Dense(torch.zeros(SIZE, SIZE, dtype=torch.float64))
    space = krylov_subspace(curvature, nothing, V, 1.0, 9)
    assert len(space.right) == len(space.basis) == len(space.matrix) == curvature.products < 9
    expected = weights.flatten(curvature.solve(V, 0.3))
    torch.testing.assert_close(weights.flatten(space.solve(0.3)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("damping", [1e-3, DAMPING, 10.0])
def test_no_vector_of_the_space_is_better_and_more_products_are_never_worse(damping):
    curvature = singular()
    least = []
    for products in range(1, 7):
        space = krylov_subspace(curvature, diagonal_of(curvature), V, DAMPING, products)
        best = space.solve(damping)
        least.append(energy(curvature, damping, best))
        for seed in range(20):
            other = 0.01 * drawn(products, seed=seed) @ space.basis
            assert energy(curvature, damping, weights.add(best, weights.unflatten(other, V))) > least[-1]
    assert least == sorted(least, reverse=True)
    assert least[0] > least[-1] + 1e-6


def test_what_is_no_space_is_refused():
    curvature = singular()
    with pytest.raises(ValueError, match="a space of 0 products has no direction: take at least 1"):
        krylov_subspace(curvature, curvature, V, DAMPING, 0)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be positive and finite"):
            krylov_subspace(curvature, curvature, V, damping)
        with pytest.raises(ValueError, match="damping must be positive and finite"):
            krylov_subspace(curvature, curvature, V, DAMPING, 2).solve(damping)
        with pytest.raises(ValueError, match="damping must be positive and finite"):
            NaturalPath(tiny_model(), lambda _: V, random_sequences(2), 0.1, damping)
    for nowhere in (0.0, float("nan"), float("inf")):
        with pytest.raises(matching.LeadsNowhere, match="leads nowhere"):
            krylov_subspace(
                curvature, diagonal_of(curvature), as_vector(torch.full((SIZE,), nowhere).double()), 1.0
            )
    with pytest.raises(matching.LeadsNowhere, match="direction 2 has length"):  # a product overflows
        krylov_subspace(Dense(float("inf") * curvature.matrix), diagonal_of(curvature), V, DAMPING, 3)
    indefinite = krylov_subspace(Dense(-curvature.matrix), diagonal_of(curvature), V, DAMPING, 2)
    with pytest.raises(
        krylov.NegativeCurvature, match=r"not positive definite at a damping of 1\.0e-03: raise it"
    ):
        indefinite.solve(1e-3)


# On a quadratic the step is retraining


ROWS, LEFT_OUT, PENALTY = 40, 6, 0.8
INPUTS = drawn(ROWS, SIZE, seed=11)
VALUES = INPUTS @ drawn(SIZE, seed=12) + 0.5 * drawn(ROWS, seed=13)
FORGET, RETAIN = (
    torch.cat([INPUTS, VALUES[:, None]], 1)[:LEFT_OUT],
    torch.cat([INPUTS, VALUES[:, None]], 1)[LEFT_OUT:],
)


def half_squares(model, rows):
    """The mean of half the squared errors: ``rows`` are inputs with the value beside them."""
    with torch.no_grad():
        return 0.5 * (model(rows[:, :-1])[:, 0] - rows[:, -1]).square().mean().item()


def ridge(rows):
    """The weights with the least sum of half the squared errors and of half the penalty times their squares."""
    x, y = rows[:, :-1], rows[:, -1]
    return torch.linalg.solve(damped(x.T @ x, PENALTY), x.T @ y)


@pytest.fixture
def regression(monkeypatch):
    """A ridge regression on all rows, its removal, and the one that was fitted to what stays."""
    monkeypatch.setattr(newton_removal, "mean_loss", half_squares)
    model, retrained = (nn.Linear(SIZE, 1, bias=False, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        model.weight.copy_(ridge(torch.cat([RETAIN, FORGET]))[None])
        retrained.weight.copy_(ridge(RETAIN)[None])
    x = RETAIN[:, :-1]
    curvature = Dense(x.T @ x / len(RETAIN))
    errors = (model(FORGET[:, :-1]).detach()[:, 0] - FORGET[:, -1])[:, None]
    delta = {"weight": (errors * FORGET[:, :-1]).mean(dim=0)[None]}
    space = krylov_subspace(curvature, diagonal_of(curvature), delta, DAMPING, SIZE)
    return model, retrained, NaturalPath(model, space.solve, FORGET, len(FORGET) / len(RETAIN), DAMPING)


NATURAL = PENALTY / len(RETAIN)
"""The damping that stands for the penalty: it is on a sum, and the curvature of a mean over what stays."""


def test_ridge_regression_is_retrained_exactly_at_its_own_damping_and_at_theorys_strength(regression):
    model, retrained, path = regression
    before = model(FORGET[:, :-1])
    path.go(1 / NATURAL)
    torch.testing.assert_close(model.weight, retrained.weight, rtol=0, atol=1e-8)
    predictions = retrained(FORGET[:, :-1])
    torch.testing.assert_close(model(FORGET[:, :-1]), predictions, rtol=0, atol=1e-8)  # text by text
    assert (before - predictions).abs().min() > 1e-3
    path.share *= 1.1
    path.go(1 / NATURAL)
    assert (model.weight - retrained.weight).abs().max() > 1e-3


def test_the_loss_of_the_retrained_regression_leads_to_its_damping(regression, monkeypatch):
    model, retrained, path = regression
    target = half_squares(retrained, FORGET)
    assert target > half_squares(model, FORGET) + 2 * matching.TOLERANCE
    assert path.to(target).reached
    exactly = functools.partial(matching.match_strength, tolerance=1e-9)
    monkeypatch.setattr(newton_removal, "match_strength", exactly)
    monkeypatch.setattr(newton_removal, "MOST_TRIED", 100)
    match = path.to(target)
    assert match.reached
    assert 1 / match.strength == pytest.approx(NATURAL, rel=1e-4)
    torch.testing.assert_close(model.weight, retrained.weight, rtol=0, atol=1e-6)


# The path


def natural_path(model, forget, share=0.5, products=6, damping=DAMPING):
    retain = random_sequences(12, seed=1)
    delta = ascent_direction(model, forget)
    space = krylov_subspace(GaussNewton(model, retain), kronecker.kfac(model, retain), delta, damping, products)
    return NaturalPath(model, space.solve, forget, share, damping)


def test_the_path_leads_to_the_target_and_leaves_the_model_there():
    model, forget = tiny_model(), random_sequences(6)
    before, path = mean_loss(model, forget), natural_path(model, forget)
    for rise in (0.3, 0.05, 0.0):  # whatever was asked before
        match = path.to(before + rise)
        assert match.reached
        assert mean_loss(model, forget) == match.loss == pytest.approx(before + rise, abs=matching.TOLERANCE)
        moved = weights.difference(weights.snapshot(model), path.start)
        if rise == 0:
            assert match.strength == 0
            assert weights.norm(moved) == 0
            continue
        step = path.solve(1 / match.strength)  # strength is 1/λ
        assert weights.norm(weights.difference(moved, {n: 0.5 * x for n, x in step.items()})) < 1e-12
        fresh = tiny_model()
        assert natural_path(fresh, forget).to(before + rise).strength == pytest.approx(match.strength, rel=1e-6)


def test_frozen_weights_take_no_part():
    model, forget = tiny_model(), random_sequences(6)
    before, whole = mean_loss(model, forget), weights.snapshot(model)
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    path = natural_path(model, forget)
    assert path.to(before + 0.05).reached
    assert list(path.solve(DAMPING)) == list(weights.parameters(model))
    for p in model.parameters():
        p.requires_grad_(True)
    moved = {name for name, p in weights.snapshot(model).items() if not torch.equal(p, whole[name])}
    assert moved
    assert all("layers.1" in name for name in moved)


def test_a_target_that_no_damping_reaches_is_said():
    model, forget = tiny_model(), random_sequences(6)
    before, path = mean_loss(model, forget), natural_path(model, forget, share=1e-5)
    with counted_passes() as passes:
        match = path.to(before + 0.3)
    assert not match.reached
    assert match.evaluations == newton_removal.MOST_TRIED
    assert passes.forward == len(forget) * match.evaluations
    assert mean_loss(model, forget) == match.loss < before + 0.1


def test_a_damping_below_what_numbers_resolve_is_too_far(regression):
    model, retrained, path = regression
    solve = path.solve

    def unstable(damping):
        if damping < NATURAL / 2:
            raise krylov.NegativeCurvature("too small")
        return solve(damping)

    path.solve = unstable
    assert path.to(half_squares(retrained, FORGET)).reached
    far = path.to(1e3)
    assert not far.reached
    assert half_squares(model, FORGET) == far.loss
    assert NATURAL / 2 <= 1 / far.strength < 1.01 * NATURAL / 2
    with pytest.raises(krylov.NegativeCurvature):
        path.go(4 / NATURAL)
