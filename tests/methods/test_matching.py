import itertools
import math

import pytest
import torch
from helpers import random_sequences, tiny_model

from unlearnlib import weights
from unlearnlib.losses import mean_loss, sequence_losses
from unlearnlib.methods import first_order, matching, walks


@pytest.mark.parametrize("start", [1e-4, 0.1, 1.0, 50.0])
def test_the_strength_of_a_known_curve(start):
    match = matching.match_strength(lambda s: 1 + s**2, target=5.0, start=start, tolerance=1e-6)
    assert match.reached
    assert match.strength == pytest.approx(2.0, abs=1e-6)
    assert match.loss == pytest.approx(5.0, abs=1e-6)


def test_a_curve_that_overflows_counts_as_above():
    def loss(strength):
        return 1 + strength if strength < 3 else math.nan

    match = matching.match_strength(loss, target=2.5, start=64.0, tolerance=1e-3)
    assert match.reached
    assert match.strength == pytest.approx(1.5, abs=1e-3)


def test_a_target_out_of_reach_is_reported_with_the_closest_point():
    match = matching.match_strength(lambda s: 2 - 1 / (1 + s), target=3.0, start=1.0)
    assert not match.reached
    assert match.loss == pytest.approx(2.0, abs=1e-6)
    assert match.evaluations == 60


@pytest.mark.parametrize(("jump", "start"), [(0.7, 1.0), (0.0, 1e308)])
def test_a_loss_that_jumps_past_the_target_ends_the_search(jump, start):
    asked = []

    def loss(strength):
        asked.append(strength)
        assert len(asked) <= 60, "the search goes on for ever"
        return 1.0 if strength < jump or (math.isfinite(strength) and not jump) else math.nan

    match = matching.match_strength(loss, target=2.0, start=start)
    assert (match.loss, match.reached, match.evaluations) == (1.0, False, len(asked))


def test_a_model_that_already_forgot_is_left_alone():
    assert matching.match_strength(lambda s: 4 + s, target=3.995, start=1.0).strength == 0
    beyond = matching.match_strength(lambda s: 4 + s, target=3.0, start=1.0)
    assert (beyond.strength, beyond.reached) == (0, False)


@pytest.mark.parametrize(("start", "target"), [(0.0, 1.0), (-1.0, 1.0), (1.0, math.nan)])
def test_nonsense_is_refused(start, target):
    with pytest.raises(ValueError, match="positive start and a finite target"):
        matching.match_strength(lambda s: s, target=target, start=start)


def test_steps_stop_on_the_target_and_leave_the_model_there():
    model, forget = tiny_model(), random_sequences(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = walks.descend(model, first_order.ascent_loss, forget, forget, optimizer, seed=0)
    target = mean_loss(model, forget) + 0.5
    match = matching.Walk(model, steps, forget).to(target)
    assert match.reached
    assert match.strength % 1 != 0  # the last step was too long and only a part of it was taken
    assert mean_loss(model, forget) == match.loss == pytest.approx(target, abs=matching.TOLERANCE)


def test_steps_that_run_out_or_go_nowhere_are_reported():
    model, forget = tiny_model(), random_sequences(4)
    before = weights.snapshot(model)
    loss = mean_loss(model, forget)
    match = matching.Walk(model, iter([0, 1, 2]), forget).to(loss + 1)
    assert (match.strength, match.reached, match.loss) == (3, False, loss)
    match = matching.Walk(model, iter(int, 1), forget, max_steps=5).to(loss + 1)
    assert (match.strength, match.reached) == (5, False)
    assert weights.norm(weights.difference(weights.snapshot(model), before)) == 0


def overflowing(monkeypatch, start):
    """Let the loss of a model be the distance it has gone from ``start``, until it overflows."""

    def loss(model, _forget):
        gone = weights.norm(weights.difference(weights.snapshot(model), start))
        return gone if gone < 100 else math.inf

    monkeypatch.setattr(matching, "mean_loss", loss)


def test_a_step_into_infinity_is_cut_back_to_the_target(monkeypatch):
    model = tiny_model()

    def steps():
        while True:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1e3)
            yield

    start = weights.snapshot(model)

    overflowing(monkeypatch, start)
    match = matching.Walk(model, steps(), random_sequences(1)).to(10.0)
    assert match.reached
    assert 0 < match.strength < 1


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.2),  # has no state
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=2e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rise", [0.01, 0.3])  # stops within one step, and steps apart
def test_stops_on_the_way_change_neither_strength_nor_model(optimizer, rise):
    forget = random_sequences(8)
    shares = (0.25, 0.5, 0.75, 1.0)

    def walk():
        model = tiny_model()
        steps = walks.descend(
            model, first_order.ascent_loss, forget, forget, OPTIMIZERS[optimizer](model), seed=0, batch_size=3
        )
        return model, matching.Walk(model, steps, forget)

    model, stopping = walk()
    start = mean_loss(model, forget)
    strengths = []
    for share in shares:
        match = stopping.to(start + share * rise, tolerance=1e-10)
        assert match.reached
        assert mean_loss(model, forget) == pytest.approx(match.loss, abs=1e-12)
        single_model, single = walk()
        straight = single.to(start + share * rise, tolerance=1e-10)
        assert match.strength == pytest.approx(straight.strength, abs=1e-6)
        between = weights.difference(weights.snapshot(model), weights.snapshot(single_model))
        assert weights.norm(between) < 1e-6
        strengths.append(match.strength)
    assert strengths == sorted(set(strengths))
    assert all(strength % 1 != 0 for strength in strengths)
    gaps = [math.floor(b) - math.floor(a) for a, b in itertools.pairwise(strengths)]
    assert (0 in gaps) if rise < 0.1 else (max(gaps) > 1)


def test_the_most_steps_are_counted_over_all_targets():
    model, forget = tiny_model(), random_sequences(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    steps = walks.descend(model, first_order.ascent_loss, forget, forget, optimizer, seed=0)
    start = mean_loss(model, forget)
    walk = matching.Walk(model, steps, forget, max_steps=4)
    first, second = walk.to(start + 0.05), walk.to(start + 100)
    assert first.reached
    assert 0 < first.strength < 4
    assert (second.strength, second.reached) == (4, False)
    assert walk.to(start + 100).strength == 4


def test_after_a_step_into_infinity_the_walk_goes_no_further_than_that_step(monkeypatch):
    model = tiny_model()
    start, drawn = weights.snapshot(model), []

    def steps():
        while True:
            drawn.append(1)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1e3)
            yield

    overflowing(monkeypatch, start)
    walk = matching.Walk(model, steps(), random_sequences(1))
    first, second, third = (walk.to(target) for target in (10.0, 20.0, 500.0))
    assert second.strength == pytest.approx(2 * first.strength, rel=0.01)
    assert [first.reached, second.reached, third.reached] == [True, True, False]
    assert 20 < third.loss < 100
    assert third.strength < 1
    assert len(drawn) == 1


def test_a_direction_is_followed_to_the_target():
    model, forget = tiny_model(), random_sequences(6)
    start = weights.snapshot(model)
    delta = weights.mean_gradient(model, forget, sequence_losses)
    target = mean_loss(model, forget) + 0.3
    for scale in (1e-6, 1.0, 1e6):  # the unit of the direction does not matter
        direction = {name: scale * value for name, value in delta.items()}
        match = matching.Line(model, direction, forget, start).to(target)
        assert match.reached
        assert mean_loss(model, forget) == pytest.approx(match.loss) == pytest.approx(target, abs=0.01)
        moved = weights.difference(weights.snapshot(model), start)
        assert weights.norm(moved) == pytest.approx(match.strength * weights.norm(direction))
    for nowhere in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="leads nowhere"):
            matching.Line(model, {n: nowhere * torch.ones_like(v) for n, v in delta.items()}, forget)


def test_a_line_starts_where_the_model_is_or_where_it_is_told_to():
    model, forget = tiny_model(), random_sequences(6)
    here, delta = weights.snapshot(model), weights.mean_gradient(model, forget, sequence_losses)
    there = weights.add(here, delta, -0.5)
    matching.Line(model, delta, forget, there).go(0.25)
    assert weights.norm(weights.difference(weights.snapshot(model), weights.add(here, delta, -0.25))) < 1e-12
    weights.set_weights(model, here)
    line = matching.Line(model, delta, forget)
    weights.set_weights(model, there)  # what is done to the model later does not move the line
    line.go(0.0)
    assert weights.norm(weights.difference(weights.snapshot(model), here)) == 0


def test_a_sweep_gives_the_validation_loss_at_the_target_and_moves_nothing():
    model, forget, validation = tiny_model(), random_sequences(6), random_sequences(4, seed=1)
    start = weights.snapshot(model)
    delta = weights.mean_gradient(model, forget, sequence_losses)
    target = mean_loss(model, forget) + 0.3
    where = []

    def path(turn):  # each is made from a model that stands where it started
        where.append(weights.norm(weights.difference(weights.snapshot(model), start)))
        return matching.Line(model, {name: turn * value for name, value in delta.items()}, forget)

    table = matching.sweep([1.0, -1.0], path, validation, target)
    assert where == [0.0, 0.0]
    assert weights.norm(weights.difference(weights.snapshot(model), start)) == 0
    assert table["setting"].tolist() == [1.0, -1.0]
    matching.Line(model, delta, forget).to(target)
    assert table["validation_loss"][0] == pytest.approx(mean_loss(model, validation))


def test_settings_may_be_of_any_kind_and_paths_may_walk():
    forget, validation = random_sequences(6), random_sequences(4, seed=1)
    target = mean_loss(tiny_model(), forget) + 0.1

    def path(setting):
        model, (rate, most) = tiny_model(), setting
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        steps = walks.descend(model, first_order.ascent_loss, forget, forget, optimizer, seed=0)
        return matching.Walk(model, steps, forget, most)

    table = matching.sweep([(0.2, 50), (1e-6, 1)], path, validation, target)
    assert table["reached"].tolist() == [True, False]
