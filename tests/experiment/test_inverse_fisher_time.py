import itertools

import pytest
import torch

from unlearnlib import curvature
from unlearnlib.experiment import inverse_fisher_time


@pytest.mark.parametrize(
    ("weights", "block", "parts"),
    [
        (8 * 512, 512, 8),  # one block of 512 is a part of its own
        (1000 * 512, 512, 1000),
        (5 * 128 * 16, 128, 5),  # sixteen of 128 are one
        (300 * 128 * 16, 128, 300),
    ],
)
def test_large_models_are_extrapolated_by_their_blocks(weights, block, parts, monkeypatch):
    counted = itertools.count()
    monkeypatch.setattr(inverse_fisher_time, "clock", lambda device: lambda: next(counted))
    seconds = inverse_fisher_time.inverse_fisher_seconds(weights, m=2, block=block, device="cpu", repeats=2)
    assert seconds == parts  # each takes from one reading of this clock to the next
    readings = next(counted)
    assert readings == 2 * (1 + 2 * min(parts, inverse_fisher_time.MOST_PARTS))


def test_what_is_timed_is_the_recursion(monkeypatch):
    shapes = []

    class Spy(curvature.FisherRecursion):
        def solve(self, v, damping):
            shapes.append(tuple(self.blocks.shape))
            return super().solve(v, damping)

    monkeypatch.setattr(inverse_fisher_time, "FisherRecursion", Spy)
    state = torch.get_rng_state()
    assert inverse_fisher_time.inverse_fisher_seconds(128 * 20 + 1, m=3, block=128, device="cpu", repeats=1) > 0
    assert shapes == [(16, 3, 128), (16, 3, 128), (5, 3, 128)]  # the first warms up
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", ["weights", "m", "block", "repeats"])
def test_numbers_below_one_are_refused(wrong):
    numbers = {"weights": 8, "m": 2, "block": 4, "repeats": 1}
    with pytest.raises(ValueError, match=f"{wrong} must be at least 1, not 0"):
        inverse_fisher_time.inverse_fisher_seconds(**(numbers | {wrong: 0}), device="cpu")
