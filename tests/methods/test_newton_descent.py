"""The loss of Newton's step by descent: gradient, curvature and minimum against explicit ones, in float64."""

import copy

import pytest
import torch
from helpers import random_sequences, smallest_model
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from unlearnlib import weights
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.methods.newton_descent import newton_loss
from unlearnlib.methods.newton_removal import NaturalPath
from unlearnlib.models import loading

VOCABULARY, SHARE = 11, 0.1
FORGET = random_sequences(3, 6, seed=1) % VOCABULARY
RETAIN = random_sequences(5, 6, seed=2) % VOCABULARY


@pytest.fixture
def model():
    return smallest_model(VOCABULARY)


@pytest.fixture
def delta(model):
    return ascent_direction(model, FORGET)


def at(model, row, measure):
    """``measure`` of the logits on the retained sequences [n, tokens, vocabulary], at weights from one row."""
    named = weights.unflatten(row, weights.parameters(model))
    return measure(functional_call(model, named, kwargs={"input_ids": RETAIN}).logits[:, :-1])


def explicit_gauss_newton(model):
    """JᵀBJ with B = diag p − p pᵀ for every token, averaged over tokens, J by finite differences of the logits."""
    row, width = weights.flatten(weights.snapshot(model)), 1e-5
    with torch.no_grad():
        columns = [
            (at(model, row + width * unit, lambda z: z) - at(model, row - width * unit, lambda z: z)) / (2 * width)
            for unit in torch.eye(len(row), dtype=row.dtype)
        ]
        p = at(model, row, lambda z: z.softmax(-1))
    jacobian = torch.stack(columns, dim=-1)
    bend = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    return torch.einsum("ntvi,ntvw,ntwj->ij", jacobian, bend, jacobian) / p[..., 0].numel()


def gradient(loss, model, forget=FORGET, create_graph=False):
    names = weights.parameters(model)
    parts = torch.autograd.grad(loss(model, forget, RETAIN), list(names.values()), create_graph=create_graph)
    return dict(zip(names, parts, strict=True))


def test_where_the_descent_begins_there_is_nothing_but_the_gradient_of_what_goes(model, delta):
    loss = newton_loss(copy.deepcopy(model), delta, SHARE)
    assert loss(model, FORGET, RETAIN).item() == pytest.approx(0, abs=1e-14)
    found, expected = weights.flatten(gradient(loss, model)), -SHARE * weights.flatten(delta)
    assert (found - expected).norm() < 1e-12 * expected.norm()


def test_elsewhere_it_is_the_divergence_less_the_share_of_what_was_gone_along(model, delta):
    original = copy.deepcopy(model)
    start = weights.snapshot(model)
    step = {name: 0.1 * p for name, p in start.items()}
    weights.set_weights(model, start, step)
    with torch.no_grad():
        p, q = (m(input_ids=RETAIN).logits[:, :-1].log_softmax(-1) for m in (original, model))
        expected = (p.exp() * (p - q)).sum(-1).mean() - SHARE * weights.dot(step, delta)
        found = newton_loss(original, delta, SHARE)(model, FORGET, RETAIN)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_its_curvature_there_is_the_gauss_newton_matrix(model, delta):
    loss = newton_loss(copy.deepcopy(model), delta, SHARE)
    names = weights.parameters(model)
    with sdpa_kernel(SDPBackend.MATH):
        first = weights.flatten(gradient(loss, model, create_graph=True))
        matrix = explicit_gauss_newton(model)
        for seed in range(3):
            v = torch.randn(len(first), generator=torch.Generator().manual_seed(seed), dtype=first.dtype)
            parts = torch.autograd.grad(first @ v, list(names.values()), retain_graph=True)
            found = torch.cat([part.flatten() for part in parts])
            assert (found - matrix @ v).norm() < 1e-7 * found.norm()


def test_the_forget_texts_are_not_read(model, delta):
    loss = newton_loss(copy.deepcopy(model), delta, SHARE)
    garbage = torch.full((1, 99), -1)  # no token has this number
    found, expected = gradient(loss, model, garbage), gradient(loss, model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_frozen_weights_take_no_part(model):
    model.get_input_embeddings().weight.requires_grad_(False)
    delta = ascent_direction(model, FORGET)
    found = weights.flatten(gradient(newton_loss(copy.deepcopy(model), delta, SHARE), model))
    torch.testing.assert_close(found, -SHARE * weights.flatten(delta), rtol=1e-9, atol=1e-12)


def minimum(loss, model, row):
    """The row of weights at which the gradient is 0, by Newton's iterations with the whole Hessian."""
    like = weights.snapshot(model)

    def slope(row):
        weights.set_weights(model, weights.unflatten(row, like))
        return weights.flatten(gradient(loss, model, create_graph=True))

    for _ in range(30):
        first = slope(row)
        if first.norm() < 1e-13:
            return row
        parameters = list(weights.parameters(model).values())
        rows = [
            torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters, retain_graph=True)])
            for value in first
        ]
        # A shift that every word has alike changes no prediction: there the curvature is 0, and so is the slope.
        row = row - torch.linalg.pinv(torch.stack(rows), rtol=1e-9, hermitian=True) @ first.detach()
    raise AssertionError("no minimum was found")


def test_its_minimum_is_the_step_of_newton_up_to_the_square_of_the_share():
    """With the last layer alone to be trained, in which the logits are linear: the loss is convex."""
    config = loading.small_opt(VOCABULARY, hidden_size=4, layers=1, heads=2, context=16)
    model = loading.load_model(config | {"tie_word_embeddings": False}, dtype=torch.float64, device="cpu")
    for name, p in model.named_parameters():
        p.requires_grad_(name == "lm_head.weight")
    delta, original = ascent_direction(model, FORGET), copy.deepcopy(model)
    row, matrix = weights.flatten(weights.snapshot(model)), explicit_gauss_newton(model)
    step = torch.linalg.pinv(matrix, rtol=1e-7, hermitian=True) @ weights.flatten(delta)
    assert (matrix @ step - weights.flatten(delta)).norm() < 1e-6 * weights.flatten(delta).norm()
    off = []
    for share in (1e-2, 5e-3, 2.5e-3):
        weights.set_weights(model, weights.unflatten(row, weights.parameters(model)))
        found = minimum(newton_loss(original, delta, share), model, row)
        assert (found - row).norm() > 0.5 * share * step.norm()
        off.append((found - row - share * step).norm().item())
    assert off[0] / off[1] == pytest.approx(4, rel=0.2)
    assert off[1] / off[2] == pytest.approx(4, rel=0.1)


def test_an_original_that_is_frozen_serves_as_well(model, delta):
    frozen = copy.deepcopy(model).requires_grad_(False)
    found = weights.flatten(gradient(newton_loss(frozen, delta, SHARE), model))
    torch.testing.assert_close(found, -SHARE * weights.flatten(delta), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(model, delta, share):
    with pytest.raises(ValueError, match="must be positive and finite"):
        newton_loss(model, delta, share)
    with pytest.raises(ValueError, match="must be positive and finite"):
        NaturalPath(model, lambda _: delta, FORGET, share, 1.0)
