import math

import pytest
import torch
from helpers import random_sequences, tiny_model
from scipy import stats
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from unlearnlib import weights
from unlearnlib.curvature import (
    fisher_diagonal,
    fisher_dual,
    fisher_recursion,
    kronecker,
    kronecker_blocks,
    per_sequence_gradients,
)
from unlearnlib.losses import mean_loss
from unlearnlib.methods import fisher_updates
from unlearnlib.models import loading

DAMPING = 1e-3


def small_model(*trained):
    """A tiny model in which only what is named is trained, so that explicit matrices stay small."""
    model = tiny_model(seed=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4), dtype=parameter.dtype)
            parameter.data.add_(noise, alpha=0.2)
    return model


MODEL = small_model("layers.1.self_attn.out_proj", "decoder.final_layer_norm")
START = weights.snapshot(MODEL)
FORGET, RETAIN = random_sequences(6, seed=1), random_sequences(12, seed=2)
D = weights.flatten(START).numel()
CURVATURES = {
    "dual": lambda model: fisher_dual.FisherDual(per_sequence_gradients.sequence_gradients(model, RETAIN)),
    "recursion": lambda model: fisher_recursion.FisherRecursion(
        per_sequence_gradients.sequence_gradients(model, RETAIN), 10
    ),
    "diagonal": lambda model: fisher_diagonal.FisherDiagonal(model, RETAIN),
    "kfac": lambda model: kronecker.kfac(model, RETAIN),
}


def loss_of_row(row, sequences, model=MODEL):
    """The book's loss by the textbook call, as a function of the trained weights in one row."""
    changed = weights.unflatten(row, weights.parameters(model))
    logits = functional_call(model, changed, (sequences,)).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:])


def gradient_at(row, sequences, model=MODEL):
    row = row.clone().requires_grad_()
    return torch.autograd.grad(loss_of_row(row, sequences, model), row)[0]


def row_of(vector):
    return weights.flatten(vector)


def vector(seed, like=START):
    return weights.random_vector(like, torch.Generator().manual_seed(seed))


def explicit(product):
    """The matrix of a linear map of vectors, column by column."""
    eye = torch.eye(D, dtype=torch.float64)
    return torch.stack([row_of(product(weights.unflatten(e, START))) for e in eye], dim=1)


def matrix_power(matrix, exponent):
    s, u = torch.linalg.eigh(matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype))
    return u @ s.pow(exponent).diag() @ u.T


class Dense:
    """A curvature that is a matrix, and solves with it."""

    def __init__(self, matrix):
        self.matrix = matrix

    def solve(self, v, damping):
        eye = torch.eye(len(self.matrix), dtype=self.matrix.dtype)
        return weights.unflatten(torch.linalg.solve(self.matrix + damping * eye, row_of(v)), v)


@pytest.fixture
def model():
    """The small model, back at its start before and after the test."""
    weights.set_weights(MODEL, START)
    yield MODEL
    weights.set_weights(MODEL, START)


@pytest.fixture(params=CURVATURES, scope="module")
def curvature(request):
    return CURVATURES[request.param](MODEL)


@pytest.fixture(scope="module")
def matrix(curvature):
    """The curvature as an explicit matrix."""
    return explicit(curvature.matvec)


# Directions


def test_removal_solves_the_explicit_system(curvature, matrix):
    delta = vector(0)
    eye = torch.eye(D, dtype=torch.float64)
    expected = torch.linalg.solve(matrix + DAMPING * eye, row_of(delta))
    ours = fisher_updates.removal_direction(curvature, delta, DAMPING)
    torch.testing.assert_close(row_of(ours), expected, rtol=1e-8, atol=1e-8)
    assert torch.linalg.matrix_rank(matrix) > 5  # not all damping


def test_holding_solves_the_constrained_problem(curvature, matrix):
    """min ½δᵀCδ − Δᵀδ with gᵀδ = 0 is a linear system in δ and a multiplier."""
    delta, gradient = vector(0), vector(1)
    gradient = {name: g + 0.5 * delta[name] for name, g in gradient.items()}
    damped = matrix + DAMPING * torch.eye(D, dtype=torch.float64)
    g = row_of(gradient)
    system = torch.cat([torch.cat([damped, g[:, None]], 1), torch.cat([g, g.new_zeros(1)])[None]])
    solution = torch.linalg.solve(system, torch.cat([row_of(delta), g.new_zeros(1)]))
    assert solution[-1] > 0.01  # the loss would rise without it
    ours = row_of(fisher_updates.held_direction(curvature, delta, gradient, DAMPING))
    torch.testing.assert_close(ours, solution[:-1], rtol=1e-7, atol=1e-7)
    assert abs(ours @ g) < 1e-8 * ours.norm() * g.norm()


@pytest.mark.parametrize("case", ["it falls anyway", "no gradient"])
def test_nothing_is_held_that_does_not_rise(case, curvature):
    delta = vector(0)
    gradient = {name: (-x if case == "it falls anyway" else torch.zeros_like(x)) for name, x in delta.items()}
    held = fisher_updates.held_direction(curvature, delta, gradient, DAMPING)
    plain = fisher_updates.removal_direction(curvature, delta, DAMPING)
    assert torch.equal(row_of(held), row_of(plain))


# Noise


@pytest.mark.parametrize("exponent", [-0.25, -0.5, 0.0])
def test_noise_has_the_covariance_it_should(exponent, curvature, matrix):
    """A linear map of white noise: A n with AAᵀ = (C + λI)^2p, and the n of the seed."""
    covariance = matrix_power(matrix, 2 * exponent)
    root = explicit(lambda v: curvature.power(v, exponent, DAMPING))
    torch.testing.assert_close(root @ root.T, covariance, rtol=1e-7, atol=1e-7)
    noise = fisher_updates.forgetting_noise(curvature, START, DAMPING, 7, exponent)
    torch.testing.assert_close(row_of(noise), root @ row_of(vector(7)), rtol=1e-7, atol=1e-7)


def test_many_draws_are_normal_with_the_closed_covariance(curvature, matrix):
    precision = matrix_power(matrix, 0.5)  # p = -1/4, the default
    draws = [row_of(fisher_updates.forgetting_noise(curvature, START, DAMPING, seed)) for seed in range(60)]
    lengths = [(n @ precision @ n).item() for n in draws]  # nᵀΣ⁻¹n is χ² with d degrees of freedom
    assert stats.kstest(lengths, stats.chi2(D).cdf).pvalue > 1e-3
    assert stats.kstest(lengths, stats.chi2(1.1 * D).cdf).pvalue < 1e-3  # it can tell


def test_noise_is_the_seeds(curvature):
    a, b, c = (row_of(fisher_updates.forgetting_noise(curvature, START, DAMPING, s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert abs(torch.cosine_similarity(a, c, dim=0)) < 0.3


@pytest.mark.parametrize("exponent", [-0.25, -0.5, 0.0])
def test_kl_of_the_noise_is_that_of_two_normals(exponent, curvature, matrix):
    residual, scale = vector(5), 0.3
    covariance = scale**2 * matrix_power(matrix, 2 * exponent)
    covariance = (covariance + covariance.T) / 2
    p, q = (
        torch.distributions.MultivariateNormal(mean, covariance)
        for mean in (row_of(residual), torch.zeros(D, dtype=torch.float64))
    )
    expected = torch.distributions.kl_divergence(p, q).item()
    ours = fisher_updates.noise_kl(curvature, residual, DAMPING, scale, exponent)
    assert math.isclose(ours, expected, rel_tol=1e-7)


@pytest.mark.parametrize(("exponent", "moment"), [(-0.25, 0.0), (-0.5, -1.0)])
def test_the_exponents_are_optimal_for_their_residuals(exponent, moment):
    """½tr(ΣH) + ½μ tr(Σ⁻¹M) by a numerical optimiser, M = σ²H^moment, against Σ = √(μσ²) H^2p."""
    generator, mu, variance = torch.Generator().manual_seed(0), 0.3, 0.5
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    h = a @ a.T + 0.1 * torch.eye(5, dtype=torch.float64)
    s, u = torch.linalg.eigh(h)
    second = variance * u @ s.pow(moment).diag() @ u.T
    root = torch.eye(5, dtype=torch.float64).requires_grad_()  # Σ = root rootᵀ

    def objective():
        sigma = root @ root.T
        return 0.5 * (sigma @ h).trace() + 0.5 * mu * torch.linalg.solve(sigma, second).trace()

    optimizer = torch.optim.LBFGS([root], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    dual = fisher_dual.FisherDual(5**0.5 * (u * s.sqrt()).T)  # F = h - λI, were it not for λ
    noise_root = torch.stack(
        [dual.power({"w": e}, exponent, 1e-12)["w"] for e in torch.eye(5, dtype=torch.float64)], dim=1
    )
    expected = (mu * variance) ** 0.5 * noise_root @ noise_root.T  # of the noise (μσ²)^{1/4} H^p n
    torch.testing.assert_close((root @ root.T).detach(), expected, rtol=1e-4, atol=1e-5)


# Steps


def target_above(model, nats):
    return mean_loss(model, FORGET) + nats


def test_steps_along_one_direction_are_one_step(model):
    target = target_above(model, 0.3)
    match = fisher_updates.RemovalInSteps(model, FORGET, CURVATURES["dual"], DAMPING, 3, refresh=False).to(target)
    assert match.reached
    moved = row_of(weights.snapshot(model)) - row_of(START)
    delta = gradient_at(row_of(START), FORGET)
    gradients = per_sequence_gradients.sequence_gradients(restart(model), RETAIN)
    matrix = gradients.T @ gradients / len(gradients) + DAMPING * torch.eye(D, dtype=torch.float64)
    direction = torch.linalg.solve(matrix, delta)
    assert torch.cosine_similarity(moved, direction, dim=0) > 1 - 1e-10
    assert abs(loss_of_row(row_of(START) + moved, FORGET).item() - target) <= 0.01


def restart(model):
    weights.set_weights(model, START)
    return model


@pytest.mark.parametrize("settings", [{}, {"renew": True}, {"hold": RETAIN}])
def test_every_step_gets_its_part_of_the_way(settings, model):
    start, seen = mean_loss(model, FORGET), []

    def build(model):
        seen.append(mean_loss(model, FORGET))
        return CURVATURES["kfac"](model)

    match = fisher_updates.RemovalInSteps(model, FORGET, build, DAMPING, 4, refresh=True, **settings).to(
        start + 0.4
    )
    assert match.reached
    assert match.loss == mean_loss(model, FORGET)  # the model is where the match says
    for value, expected in zip([*seen, match.loss], (0, 0.1, 0.2, 0.3, 0.4), strict=True):
        assert abs(value - start - expected) <= 0.01 + 1e-12
    assert seen[0] == start


def test_curvature_is_built_once_without_refresh(model):
    built = []

    def build(model):
        built.append(CURVATURES["diagonal"](model))
        return built[-1]

    fisher_updates.RemovalInSteps(model, FORGET, build, DAMPING, 3, refresh=False).to(target_above(model, 0.3))
    assert len(built) == 1


def test_steps_follow_the_path_of_the_retained_optimum():
    """Along it ∇L(retain) moves by αΔ and no other way; Euler's method halves its error with its steps.

    The last norm acts linearly on the logits: the loss is convex in its weights.
    """
    model = small_model("decoder.final_layer_norm")
    start = weights.snapshot(model)
    delta, before = (gradient_at(row_of(start), sequences, model) for sequences in (FORGET, RETAIN))
    target = target_above(model, 0.2)

    def build(model):
        row = row_of(weights.snapshot(model))
        with sdpa_kernel(SDPBackend.MATH):  # the kernel that can be differentiated twice
            return Dense(torch.autograd.functional.hessian(lambda row: loss_of_row(row, RETAIN, model), row))

    errors = []
    for steps in (1, 2, 4):
        weights.set_weights(model, start)
        assert fisher_updates.RemovalInSteps(model, FORGET, build, 1e-9, steps, refresh=True).to(target).reached
        change = gradient_at(row_of(weights.snapshot(model)), RETAIN, model) - before
        alpha = change @ delta / (delta @ delta)
        errors.append(((change - alpha * delta).norm() / change.norm()).item())
    assert errors[0] > 0.01
    assert 1.7 < errors[0] / errors[1] < 2.4
    assert 1.7 < errors[1] / errors[2] < 2.4


def test_a_held_step_does_not_raise_the_retain_loss_to_first_order(model):
    points = {}

    def run(hold):
        points[hold is not None] = found = []

        def build(model):
            found.append(row_of(weights.snapshot(model)))
            return CURVATURES["kfac"](model)

        target = target_above(restart(model), 0.6)
        fisher_updates.RemovalInSteps(model, FORGET, build, DAMPING, 2, refresh=True, hold=hold).to(target)
        found.append(row_of(weights.snapshot(model)))

    run(None)
    run(RETAIN)
    for held, (_, middle, end) in points.items():
        gradient, step = gradient_at(middle, RETAIN), end - middle
        cosine = torch.cosine_similarity(gradient, step, dim=0)
        assert abs(cosine) < 1e-8 if held else cosine > 0.01


def test_renewed_gradients_are_those_of_the_place(model):
    places = []

    class Seen(Dense):
        def solve(self, v, damping):
            places.append((row_of(weights.snapshot(model)), row_of(v)))
            return v

    def build(model):
        return Seen(None)

    for renew in (False, True):
        places.clear()
        target = target_above(restart(model), 0.2)
        fisher_updates.RemovalInSteps(model, FORGET, build, 1.0, 2, refresh=False, renew=renew).to(target)
        for place, delta in places:
            expected = gradient_at(place if renew else row_of(START), FORGET)
            torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-12)
        assert not torch.equal(places[0][0], places[1][0])


def test_a_step_that_falls_short_is_the_last(model):
    built = []

    def build(model):
        built.append(1)
        return CURVATURES["diagonal"](model)

    start = mean_loss(model, FORGET)
    match = fisher_updates.RemovalInSteps(model, FORGET, build, DAMPING, 4, refresh=True).to(start - 1)
    assert not match.reached
    assert len(built) == 1
    assert match.loss == mean_loss(model, FORGET) == pytest.approx(start, abs=1e-3)


# Bad input, devices


def test_bad_settings_are_refused(curvature, model):
    delta, target = vector(0), target_above(model, 0.1)
    for damping in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"damping must be positive and finite, not {damping}"):
            fisher_updates.removal_direction(curvature, delta, damping)
        with pytest.raises(ValueError, match="damping must be positive"):
            fisher_updates.held_direction(curvature, delta, delta, damping)
        with pytest.raises(ValueError, match="damping must be positive"):
            fisher_updates.forgetting_noise(curvature, delta, damping, 0)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"scale of the noise must be positive, not {scale}"):
            fisher_updates.noise_kl(curvature, delta, DAMPING, scale, -0.25)
    with pytest.raises(ValueError, match="cannot remove in 0 steps: take at least 1"):
        fisher_updates.RemovalInSteps(model, FORGET, lambda _: curvature, DAMPING, 0, refresh=True).to(target)
    assert torch.equal(row_of(weights.snapshot(model)), row_of(START))


def test_everything_stays_on_the_device_of_the_curvature():
    blank = loading.load_model(loading.small_opt(40, hidden_size=16, layers=2, heads=2), device="meta")
    like = weights.snapshot(blank)
    curvature = kronecker.Kronecker(kronecker_blocks.find_blocks(blank))
    for result in (
        fisher_updates.removal_direction(curvature, like, 1.0),
        fisher_updates.held_direction(curvature, like, like, 1.0),
        fisher_updates.forgetting_noise(curvature, like, 1.0, seed=0),
    ):
        assert all(x.is_meta and x.shape == like[name].shape for name, x in result.items())
