import math

import pytest
import torch
from helpers import random_sequences, tiny_model
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.losses import mean_loss
from unlearnlib.methods import first_order, walks

gradient_difference = first_order.with_retain(first_order.ascent_loss, 1.0)


def reference_loss(model, sequences):
    """Mean of per-sequence means, by the textbook call."""
    logits = model(input_ids=sequences).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean()


@pytest.fixture
def case():
    return tiny_model(), random_sequences(6, seed=1), random_sequences(6, seed=2)


def test_one_sgd_step_is_one_step_along_the_direction(case):
    model, forget, retain = case
    start, direction = weights.snapshot(model), first_order.ascent_direction(model, forget)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    next(walks.descend(model, first_order.ascent_loss, forget, retain, optimizer, seed=0))
    for name, moved in weights.difference(weights.snapshot(model), start).items():
        torch.testing.assert_close(moved, 0.1 * direction[name], rtol=1e-8, atol=1e-12)


def test_every_sequence_is_used_once_an_epoch(case):
    model, forget, retain = case
    seen = []

    def loss(model, forget_batch, retain_batch):
        seen.append(forget_batch)
        return first_order.ascent_loss(model, forget_batch, retain_batch)

    steps = walks.descend(
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
        steps = walks.descend(model, gradient_difference, forget, retain, optimizer, seed, batch_size=2)
        for _ in range(4):
            next(steps)
        ends.append(mean_loss(model, retain))
    assert ends[0] == ends[1] != ends[2]


def test_ascent_into_nothingness_is_an_error(case):
    model, forget, retain = case
    optimizer = torch.optim.SGD(model.parameters(), lr=1e200)
    steps = walks.descend(model, first_order.ascent_loss, forget, retain, optimizer, seed=0)
    with pytest.raises(FloatingPointError, match="stop earlier or take smaller steps"):
        for _ in range(20):
            next(steps)


def test_the_walk_of_adam_is_adam_by_its_formula(case):
    model, forget, retain = case
    rate, moments = 1e-3, {}
    walk = walks.adam_walk(model, gradient_difference, forget, retain, rate, 0, max_steps=3)
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

        walks.adam_walk(tiny_model(), loss, forget, retain, 1e-5, seed, max_steps=3, batch_size=2).to(100.0)
        return torch.cat(seen, dim=1)

    first = batches(0)
    assert first.shape == (2, 6, forget.shape[1])
    assert torch.equal(first, batches(0))
    assert not torch.equal(first, batches(1))


def test_ascent_batch_by_batch_adds_the_gradient_of_each_batch(case):
    """Algorithm 1: θ ← θ + η∇L(θ; batch). Two batches, in the order in which the walk takes them."""
    model, forget, retain = case
    rate, seen, other = 0.05, [], tiny_model()

    def loss(model, forget_batch, retain_batch):
        seen.append(forget_batch)
        return first_order.ascent_loss(model, forget_batch, retain_batch)

    walk = walks.sgd_walk(model, loss, forget, retain, rate, seed=0, max_steps=2, batch_size=3)
    assert walk.to(100.0).strength == 2
    for batch in seen:
        live = list(weights.parameters(other).values())
        for p, g in zip(live, torch.autograd.grad(reference_loss(other, batch), live), strict=True):
            p.data += rate * g
    for ours, theirs in zip(weights.snapshot(model).values(), weights.snapshot(other).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def repaired(model, forget, retain, overshoot=0.3, max_steps=200):
    return walks.RepairedAscent(model, forget, retain, 3e-3, overshoot, seed=0, max_steps=max_steps)


def test_repair_comes_down_to_the_target_and_keeps_more_than_the_way_up(case):
    model, forget, _ = case
    retain = forget.flip(1)  # other texts, of the same tokens
    target = mean_loss(model, forget) + 0.2
    up = walks.adam_walk(tiny_model(), first_order.ascent_loss, forget, retain, 3e-3, seed=0)
    top = up.to(target + 0.3)
    path = repaired(model, forget, retain)
    match = path.to(target)
    assert match.reached
    assert match.loss == pytest.approx(mean_loss(model, forget), abs=1e-12)
    assert match.loss == pytest.approx(target, abs=0.01)
    assert match.strength > top.strength
    assert mean_loss(model, retain) < mean_loss(up.model, retain)
    end = weights.snapshot(model)
    path.to(target + 0.1)  # a second target, and the first again: no journey leaves a trace
    assert path.to(target) == match
    for name, value in weights.snapshot(model).items():
        torch.testing.assert_close(value, end[name], rtol=0, atol=0)


def test_repair_that_does_not_get_there_says_so(case):
    model, forget, retain = case
    start = mean_loss(model, forget)
    low = repaired(model, forget, retain, max_steps=1).to(start + 5)  # the way up is too long
    assert not low.reached
    assert low.strength == 1
    up = walks.adam_walk(tiny_model(), first_order.ascent_loss, forget, retain, 3e-3, seed=0).to(start + 1.0)
    model, most = tiny_model(), math.ceil(up.strength)  # enough for the way up, too few for the way down
    match = repaired(model, forget, retain, overshoot=0.9, max_steps=most).to(start + 0.1)
    assert not match.reached
    assert match.loss == pytest.approx(mean_loss(model, forget), abs=1e-12)
    assert match.loss > start + 0.2
    assert match.strength == pytest.approx(up.strength + most)


@pytest.mark.parametrize("overshoot", [0.0, -1.0, float("nan")])
def test_repair_refuses_an_overshoot_that_means_nothing(case, overshoot):
    with pytest.raises(ValueError, match=f"positive and finite, in nats, not {overshoot}"):
        repaired(*case, overshoot=overshoot)
