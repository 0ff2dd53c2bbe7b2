import copy
import math

import pytest
import torch
from helpers import random_sequences, tiny_model

from unlearnlib.losses import mean_loss
from unlearnlib.measures import relearning
from unlearnlib.methods import first_order, matching, walks
from unlearnlib.models import training
from unlearnlib.models.training import Training


def test_curve_against_a_hand_written_loop():
    model, forget = tiny_model(), random_sequences(6)
    curve = relearning.relearning_curve(model, forget[::2], forget[1::2], steps=3, learning_rate=1e-3)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    expected = []
    for _ in range(3):
        expected.append(twin(input_ids=forget[1::2], labels=forget[1::2]).loss.item())
        optimizer.zero_grad()
        twin(input_ids=forget[::2], labels=forget[::2]).loss.backward()
        optimizer.step()
    expected.append(mean_loss(twin, forget[1::2]))
    assert curve == pytest.approx(expected, rel=1e-4)  # transformers' own loss is in float32


def test_the_probe_leaves_the_model_alone():
    model, forget = tiny_model(), random_sequences(6)
    before = mean_loss(model, forget)
    relearning.relearning_curve(model, forget[::2], forget[1::2], steps=2, learning_rate=1e-2)
    assert mean_loss(model, forget) == before


def test_what_shares_its_content_comes_back_and_what_does_not_stays_away():
    shared = random_sequences(4).repeat_interleave(2, dim=0)  # each odd row repeats the even row before it
    curves = {}
    for name, forget in {"shared": shared, "unrelated": random_sequences(8, seed=5)}.items():
        curves[name] = relearning.relearning_curve(
            tiny_model(), forget[::2], forget[1::2], steps=30, learning_rate=1e-2
        )
    assert relearning.fall(curves["shared"]) > relearning.fall(curves["unrelated"]) + 1


def test_fall_by_hand():
    assert relearning.fall([4.0, 3.5, 3.75, 3.9]) == 0.5
    assert relearning.fall([4.0, 4.5]) == 0
    assert math.isnan(relearning.fall([1.0, float("nan"), 0.5]))  # diverged: not "nothing came back"


def test_what_ascent_hid_falls_further_than_what_was_never_learnt():
    forget, other = random_sequences(8), random_sequences(24, seed=9)
    knows, never = tiny_model(), tiny_model()
    settings = Training(epochs=80, learning_rate=2e-2, batch_size=8)
    training.train(knows, torch.cat([forget, other]), settings, seed=0)
    training.train(never, other, settings, seed=0)
    target = mean_loss(never, forget)
    optimizer = torch.optim.SGD(knows.parameters(), lr=1e-2)
    steps = walks.descend(knows, first_order.ascent_loss, forget, other, optimizer, seed=0)
    assert matching.Walk(knows, steps, forget).to(target).reached
    falls = [
        relearning.fall(relearning.relearning_curve(m, forget[::2], forget[1::2], 30, 1e-3))
        for m in (knows, never)
    ]
    assert falls[0] > falls[1] + 0.1
