"""Sophia against its formula, and its curvature against the diagonal of the Gauss–Newton matrix."""

import math

import pytest
import torch
from helpers import random_sequences, tiny_model

from unlearnlib import weights
from unlearnlib.curvature.newton import GaussNewton
from unlearnlib.losses import counted_passes, mean_loss
from unlearnlib.methods import first_order, sophia


def test_steps_are_the_papers_formula():
    p = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = sophia.Sophia([p], lr=0.1, betas=(0.8, 0.6), gamma=0.5, epsilon=1e-12)
    gradients = [torch.tensor([1.0, -4.0, 0.01, 0.0]).double(), torch.tensor([-3.0, 0.2, 0.02, 0.0]).double()]
    estimate = torch.tensor([2.0, 0.0, 9.0, 0.0]).double()
    optimizer.update_curvature([estimate])
    m, h, expected = torch.zeros(4).double(), 0.4 * estimate, p.detach().clone()
    seen = set()
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient
        for i in range(4):
            ratio = m[i].item() / max(0.5 * h[i].item(), 1e-12)
            seen.add("clipped" if abs(ratio) > 1 else "not")
            expected[i] -= 0.1 * max(-1.0, min(1.0, ratio))
        torch.testing.assert_close(p.detach(), expected)
    assert seen == {"clipped", "not"}


def test_curvature_is_averaged_over_updates_and_must_fit():
    p = torch.zeros(2, requires_grad=True)
    optimizer = sophia.Sophia([p], lr=0.1, betas=(0.9, 0.5), gamma=1.0)
    optimizer.update_curvature([torch.tensor([1.0, 0.0])])
    optimizer.update_curvature([torch.tensor([3.0, 1.0])])
    torch.testing.assert_close(optimizer.state[p]["h"], torch.tensor([0.25 + 1.5, 0.5]))
    with pytest.raises(ValueError, match="shorter"):
        optimizer.update_curvature([])


def test_the_estimate_has_the_mean_of_the_gauss_newton_diagonal():
    model, sequences = tiny_model(), random_sequences(3)
    name = "model.decoder.layers.1.fc2.bias"
    entries = range(5)
    live = weights.parameters(model)
    place = list(live).index(name)
    exact = []
    for entry in entries:
        unit = {other: torch.zeros_like(p) for other, p in live.items()}
        unit[name][entry] = 1
        exact.append(GaussNewton(model, sequences).matvec(unit)[name][entry].item())
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sophia.bartlett_diagonal(model, sequences, generator)[place][:5] for _ in range(400)])
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert ((draws.mean(dim=0) - torch.tensor(exact)).abs() < 4 * error).all()
    assert (error < 0.1 * torch.tensor(exact)).all()  # so the test above is a sharp one


def test_a_walk_reaches_its_target_and_counts_what_it_reads():
    model, forget, retain = tiny_model(), random_sequences(6, seed=1), random_sequences(6, seed=2)
    walk = sophia.sophia_walk(
        model, first_order.ascent_loss, forget, retain, learning_rate=1e-4, seed=0, batch_size=6
    )
    target = walk.loss + 0.05
    with counted_passes() as passes:
        match = walk.to(target)
    assert match.reached
    assert mean_loss(model, forget) == pytest.approx(match.loss)
    steps = math.ceil(match.strength)
    assert steps > 10
    estimates = math.ceil(steps / 10)
    assert passes.differentiated == 6 * (steps + estimates)


def test_the_same_seed_gives_the_same_walk():
    ends = []
    for _ in range(2):
        model, forget, retain = tiny_model(), random_sequences(6, seed=1), random_sequences(6, seed=2)
        walk = sophia.sophia_walk(model, first_order.ascent_loss, forget, retain, 1e-3, seed=3)
        ends.append(walk.to(walk.loss + 0.01))
    assert ends[0] == ends[1]
