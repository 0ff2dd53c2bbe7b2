import copy
import math

import pytest
import torch
from helpers import random_sequences, tiny_model
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.losses import mean_loss
from unlearnlib.methods import first_order


def reference_loss(model, sequences):
    """Mean of per-sequence means, by the textbook call."""
    logits = model(input_ids=sequences).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean()


@pytest.fixture
def case():
    return tiny_model(), random_sequences(6, seed=1), random_sequences(6, seed=2)


def test_direction_is_autograds_gradient(case):
    model, forget, _ = case
    direction = first_order.ascent_direction(model, forget)
    expected = torch.autograd.grad(reference_loss(model, forget), list(weights.parameters(model).values()))
    for ours, theirs in zip(direction.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_losses_are_what_they_are_called(case):
    model, forget, retain = case
    f, r = reference_loss(model, forget), reference_loss(model, retain)
    torch.testing.assert_close(first_order.ascent_loss(model, forget, retain), -f)
    torch.testing.assert_close(first_order.gradient_difference_loss(model, forget, retain), r - f)
    torch.testing.assert_close(first_order.retain_loss(model, forget, retain), r)
    original = tiny_model(seed=5)
    p = original(input_ids=retain).logits[:, :-1].log_softmax(2)
    q = model(input_ids=retain).logits[:, :-1].log_softmax(2)
    kl = (p.exp() * (p - q)).sum(2).mean()
    assert kl > 1e-6
    torch.testing.assert_close(first_order.kl_retain_loss(original)(model, forget, retain), kl - f)


def test_the_kl_term_pulls_nowhere_at_the_original(case):
    model, forget, retain = case
    loss = first_order.kl_retain_loss(copy.deepcopy(model))
    pulled = torch.autograd.grad(loss(model, forget, retain), list(weights.parameters(model).values()))
    plain = first_order.ascent_direction(model, forget)
    for ours, theirs in zip(pulled, plain.values(), strict=True):
        torch.testing.assert_close(ours, -theirs, rtol=1e-8, atol=1e-12)


def log_likelihoods(model, sequences):
    """log p of each whole sequence given its first token, by the textbook call."""
    logits = model(input_ids=sequences).logits[:, :-1]
    return -F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").sum(1)


def gradient(model, value):
    return torch.autograd.grad(value, list(weights.parameters(model).values()), retain_graph=True)


@pytest.mark.parametrize("beta", [0.03, 0.5, 2.0])
def test_npo_is_its_formula_and_weighs_each_sequence_as_it_should(case, beta):
    model, forget, retain = case
    original = tiny_model(seed=5)
    found = first_order.npo_loss(original, beta)(model, forget, retain)
    p, p0 = log_likelihoods(model, forget), log_likelihoods(original, forget).detach()
    ratio = (p - p0).detach().exp()
    assert ratio.log().abs().max() > 0.1  # the two models do differ
    # -(2/β) log sigmoid(-β log p/p₀), written out.
    expected = -2 / beta * (1 / (1 + ratio**beta)).log().mean()
    torch.testing.assert_close(found, expected)
    weight = 2 * ratio**beta / (1 + ratio**beta)
    for ours, theirs in zip(gradient(model, found), gradient(model, (weight * p).mean()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_npo_with_small_beta_is_ascent_and_bounded_below_as_ascent_is_not(case):
    model, forget, retain = case
    original = copy.deepcopy(model)
    at_start = first_order.npo_loss(original, 0.7)(model, forget, retain)
    assert at_start.item() == pytest.approx(2 / 0.7 * math.log(2))
    for p in weights.parameters(model).values():  # away from the start, where every weight is 1 whatever β
        p.data.mul_(1.2)
    npo = first_order.npo_loss(original, 1e-9)(model, forget, retain)
    tokens = forget.shape[1] - 1
    ascent = gradient(model, first_order.ascent_loss(model, forget, retain))
    for ours, theirs in zip(gradient(model, npo), ascent, strict=True):
        torch.testing.assert_close(ours, tokens * theirs, rtol=1e-6, atol=1e-10)
    values = {}
    for scale in (1.0, 50.0):
        for p in weights.parameters(model).values():
            p.data.mul_(scale)
        values[scale] = [
            loss(model, forget, retain).item()
            for loss in (first_order.npo_loss(original, 0.1), first_order.ascent_loss)
        ]
    assert values[50.0][1] < -50  # ascent falls without end
    assert 0 <= values[50.0][0] < values[1.0][0]


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_npo_refuses_a_beta_that_means_nothing(case, beta):
    with pytest.raises(ValueError, match=f"must be positive and finite, not {beta}"):
        first_order.npo_loss(case[0], beta)


def test_one_sgd_step_is_one_step_along_the_direction(case):
    model, forget, retain = case
    start, direction = weights.snapshot(model), first_order.ascent_direction(model, forget)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    next(first_order.descend(model, first_order.ascent_loss, forget, retain, optimizer, seed=0))
    for name, moved in weights.difference(weights.snapshot(model), start).items():
        torch.testing.assert_close(moved, 0.1 * direction[name], rtol=1e-8, atol=1e-12)


def test_every_sequence_is_used_once_an_epoch(case):
    model, forget, retain = case
    seen = []

    def loss(model, forget_batch, retain_batch):
        seen.append(forget_batch)
        return first_order.ascent_loss(model, forget_batch, retain_batch)

    steps = first_order.descend(
        model, loss, forget, retain, torch.optim.SGD(model.parameters(), lr=0.0), seed=0, batch_size=2
    )
    for _ in range(3):
        next(steps)
    assert sorted(torch.cat(seen).tolist()) == sorted(forget.tolist())


def test_the_order_depends_on_the_seed_alone(case):
    _, forget, retain = case
    ends = []
    for seed in (0, 0, 1):
        model = tiny_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        steps = first_order.descend(
            model, first_order.gradient_difference_loss, forget, retain, optimizer, seed, batch_size=2
        )
        for _ in range(4):
            next(steps)
        ends.append(mean_loss(model, retain))
    assert ends[0] == ends[1] != ends[2]


def test_ascent_into_nothingness_is_an_error(case):
    model, forget, retain = case
    optimizer = torch.optim.SGD(model.parameters(), lr=1e200)
    steps = first_order.descend(model, first_order.ascent_loss, forget, retain, optimizer, seed=0)
    with pytest.raises(FloatingPointError, match="stop earlier or take smaller steps"):
        for _ in range(20):
            next(steps)


def test_the_walk_of_adam_is_adam_by_its_formula(case):
    model, forget, retain = case
    rate, moments = 1e-3, {}
    walk = first_order.adam_walk(model, first_order.gradient_difference_loss, forget, retain, rate, 0, max_steps=3)
    other = tiny_model()
    for t in (1, 2, 3):  # one batch holds all sequences
        live = weights.parameters(other)
        value = reference_loss(other, retain) - reference_loss(other, forget)
        for (name, p), g in zip(live.items(), torch.autograd.grad(value, list(live.values())), strict=True):
            m, v = moments.get(name, (0.0, 0.0))
            moments[name] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            p.data -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert walk.to(100.0).strength == 3  # far away: all the steps there are
    for ours, theirs in zip(weights.snapshot(model).values(), weights.snapshot(other).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_the_walk_of_adam_takes_batches_of_the_size_and_order_asked_for(case):
    _, forget, retain = case

    def batches(seed):
        seen = []

        def loss(model, forget_batch, retain_batch):
            seen.append(torch.stack((forget_batch, retain_batch)))
            return first_order.ascent_loss(model, forget_batch, retain_batch)

        first_order.adam_walk(tiny_model(), loss, forget, retain, 1e-5, seed, max_steps=3, batch_size=2).to(100.0)
        return torch.cat(seen, dim=1)

    first = batches(0)
    assert first.shape == (2, 6, forget.shape[1])
    assert torch.equal(first, batches(0))
    assert not torch.equal(first, batches(1))
