"""Curvature products against explicit matrices, built by another route, in float64."""

import functools

import pytest
import torch
from helpers import random_sequences, smallest_model, tiny_model
from torch.autograd import forward_ad
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from unlearnlib import losses, weights
from unlearnlib.curvature import krylov, newton
from unlearnlib.losses import log_probabilities, logits, sequence_losses

VOCABULARY = 11


@pytest.fixture(scope="module")
def model():
    return smallest_model(VOCABULARY)


SEQUENCES = random_sequences(5, 6) % VOCABULARY


def moved(model, measure, row):
    """``measure(model, SEQUENCES)`` with all trainable weights taken from one row."""
    names = weights.unflatten(row, weights.parameters(model))
    wrapped = newton.Outputs(model, measure)
    return functional_call(wrapped, {f"model.{name}": p for name, p in names.items()}, (SEQUENCES,))


@functools.cache
def explicit_hessian(model, loss=sequence_losses):
    """Forward over reverse, column by column.

    Not by ``torch.func.hessian``, which vectorises the same thing and, in torch 2.13, gets the rows of the
    weights of LayerNorm wrong.
    """
    row, columns = weights.flatten(weights.snapshot(model)), []
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        for unit in torch.eye(len(row), dtype=row.dtype):
            x = forward_ad.make_dual(row.clone().requires_grad_(), unit)
            (gradient,) = torch.autograd.grad(moved(model, loss, x).mean(), x)
            columns.append(forward_ad.unpack_dual(gradient).tangent)
    return torch.stack(columns, dim=1)


def explicit_jacobian(model):
    """Derivatives of the logits with respect to all weights, shape [n, tokens, vocabulary, d]."""
    with sdpa_kernel(SDPBackend.MATH):
        return jacrev(lambda row: moved(model, logits, row))(weights.flatten(weights.snapshot(model)))


def explicit_gauss_newton(model):
    """JᵀBJ with B = (diag p − p pᵀ) for every token, averaged as the loss is."""
    jacobian = explicit_jacobian(model)
    p = log_probabilities(model, SEQUENCES).exp().detach()
    bend = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    n, tokens = p.shape[:2]
    return torch.einsum("ntvi,ntvw,ntwj->ij", jacobian, bend, jacobian) / (n * tokens)


def explicit(curvature, like):
    """The matrix behind a curvature's products, column by column."""
    d = sum(p.numel() for p in like.values())
    rows = [weights.flatten(curvature.matvec(weights.unflatten(row, like))) for row in torch.eye(d).double()]
    return torch.stack(rows, dim=1)


def test_hessian_products_are_the_hessians(model, monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 2)
    ours = explicit(newton.Hessian(model, SEQUENCES), weights.parameters(model))
    expected = explicit_hessian(model)
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-8
    assert torch.linalg.eigvalsh(expected)[0] < -1e-4  # the point of the next matrix


def test_gauss_newton_products_are_the_gauss_newton_matrixs(model, monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 2)
    ours = explicit(newton.GaussNewton(model, SEQUENCES), weights.parameters(model))
    expected = explicit_gauss_newton(model)
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-8
    assert torch.linalg.eigvalsh(expected)[0] > -1e-12
    assert ((expected - explicit_hessian(model)).norm() / expected.norm()).item() > 1e-2


def test_any_loss_will_do(model):
    def squares(model, batch):
        return 0.5 * logits(model, batch).square().sum(dim=(1, 2))

    generator = torch.Generator().manual_seed(3)
    v = weights.random_vector(weights.parameters(model), generator)
    ours = weights.flatten(newton.Hessian(model, SEQUENCES, squares).matvec(v))
    expected = explicit_hessian(model, squares) @ weights.flatten(v)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
    gauss_newton = newton.GaussNewton(model, SEQUENCES, output_loss=lambda z, _: 0.5 * z.square().sum(dim=(1, 2)))
    jacobian = explicit_jacobian(model).flatten(0, 2)
    expected = jacobian.T @ (jacobian @ weights.flatten(v)) / len(SEQUENCES)
    torch.testing.assert_close(weights.flatten(gauss_newton.matvec(v)), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_tied_and_frozen_weights(architecture, monkeypatch):
    """Against a difference quotient of gradients, which knows nothing of how products are made."""
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 4)
    model, sequences = tiny_model(architecture), random_sequences(6)
    first = next(iter(weights.parameters(model)))
    dict(model.named_parameters())[next(n for n, p in model.named_parameters() if p.ndim == 1)].requires_grad_(
        False
    )
    start = weights.snapshot(model)
    v = weights.random_vector(start, torch.Generator().manual_seed(0))
    ours = newton.Hessian(model, sequences).matvec(v)
    assert ours.keys() == weights.parameters(model).keys()
    assert first in ours
    # Llama's norm rounds to float32, whatever we ask for.
    step, tolerance = (1e-4, 5e-2) if architecture == "llama" else (1e-6, 1e-6)
    ends = []
    for sign in (1, -1):
        weights.set_weights(model, start, v, sign * step)
        ends.append(weights.mean_gradient(model, sequences, sequence_losses))
    numeric = weights.flatten(weights.difference(*ends)) / (2 * step)
    assert ((weights.flatten(ours) - numeric).norm() / numeric.norm()).item() < tolerance


def test_solve_and_powers_against_the_explicit_matrix(model):
    matrix, damping = explicit_gauss_newton(model), 0.01
    curvature = newton.GaussNewton(model, SEQUENCES, tolerance=1e-9, max_iterations=400)
    v = weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(1))
    system = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    row = weights.flatten(v)
    torch.testing.assert_close(
        weights.flatten(curvature.solve(v, damping)), torch.linalg.solve(system, row), rtol=1e-6, atol=1e-6
    )
    values, vectors = torch.linalg.eigh(system)
    for exponent in (-1.0, -0.5, -0.25, 0.5):
        expected = vectors @ (values**exponent * (vectors.T @ row))
        ours = weights.flatten(curvature.power(v, exponent, damping))
        assert ((ours - expected).norm() / expected.norm()).item() < 1e-6


def test_the_smallest_eigenvalue_against_the_explicit_matrix(model):
    matrix = explicit_hessian(model)
    lowest = torch.linalg.eigvalsh(matrix)[0].item()
    hessian = newton.Hessian(model, SEQUENCES)
    v = weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(1))
    found = hessian.smallest_eigenvalue(v)
    assert found.bound <= lowest <= found.value + 1e-12
    assert found.residual <= 0.1 * abs(found.value)
    damping = -1.2 * found.bound
    assert torch.linalg.eigvalsh(matrix)[0] + damping > 0
    hessian.solve(v, damping)  # no negative curvature is met


def test_it_keeps_the_weights_it_was_built_at():
    model, sequences = tiny_model(), random_sequences(3)
    v = weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(0))
    curvature = newton.GaussNewton(model, sequences)
    before = curvature.matvec(v)
    weights.set_weights(model, weights.snapshot(model), v, 1.0)
    for name, value in curvature.matvec(v).items():
        assert torch.equal(value, before[name])


def test_bad_input_says_what_to_change(model):
    v = weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(0))
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping must be positive and finite"):
            newton.GaussNewton(model, SEQUENCES).solve(v, damping)
    with pytest.raises(krylov.NegativeCurvature, match="Raise the damping beyond the size of a converged"):
        newton.Hessian(model, SEQUENCES).solve(v, 1e-6)
    with pytest.raises(krylov.NegativeCurvature, match="Raise the damping beyond the size of a converged"):
        newton.Hessian(model, SEQUENCES).power(v, -0.5, 1e-6)
    with pytest.raises(krylov.NotConverged, match="allow more iterations"):
        newton.GaussNewton(model, SEQUENCES, tolerance=1e-9, max_iterations=3).solve(v, 1e-6)
    with pytest.raises(krylov.NotConverged, match="allow more iterations"):
        newton.GaussNewton(model, SEQUENCES, tolerance=1e-9, max_iterations=5).power(v, -0.5, 1e-6)
    with pytest.raises(ValueError, match="at least one sequence"):
        newton.Hessian(model, SEQUENCES[:0])
    broken = {name: value * torch.inf for name, value in v.items()}
    with pytest.raises(FloatingPointError, match="not finite at"):
        newton.Hessian(model, SEQUENCES).matvec(broken)


def test_on_the_meta_device_nothing_strays():
    """Mixing devices raises there, as it would on a GPU."""
    model = tiny_model(dtype=torch.float32, device="meta")
    v = weights.snapshot(model)
    for curvature in (newton.Hessian(model, random_sequences(3)), newton.GaussNewton(model, random_sequences(3))):
        product = curvature.batch_product(random_sequences(3), v)
        assert all(part.device.type == "meta" for part in product)


def test_costs_are_in_units_of_a_gradient(model):
    def gradients(number):
        for _ in range(number):
            weights.mean_gradient(model, SEQUENCES, sequence_losses)

    time, memory = newton.cost_in_gradients(lambda: gradients(3), model, SEQUENCES)
    assert 1.5 < time < 6  # three of them, on a machine that does other things too
    assert memory == pytest.approx(1, rel=0.3)  # one after the other
