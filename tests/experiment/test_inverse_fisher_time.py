import itertools

import pandas as pd
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
            shapes.append((*self.blocks.shape, self.at_once))
            return super().solve(v, damping)

    monkeypatch.setattr(inverse_fisher_time, "FisherRecursion", Spy)
    state = torch.get_rng_state()
    assert inverse_fisher_time.inverse_fisher_seconds(128 * 20 + 1, m=3, block=128, device="cpu", repeats=1) > 0
    assert shapes == [(16, 3, 128, 1), (16, 3, 128, 1), (5, 3, 128, 1)]  # the first warms up
    inverse_fisher_time.inverse_fisher_seconds(128, m=3, block=128, device="cpu", repeats=1, at_once=2)
    assert shapes[3:] == [(1, 3, 128, 2)] * 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", ["weights", "m", "block", "repeats", "at_once"])
def test_numbers_below_one_are_refused(wrong):
    numbers = {"weights": 8, "m": 2, "block": 4, "repeats": 1, "at_once": 1}
    with pytest.raises(ValueError, match=f"{wrong} must be at least 1, not 0"):
        inverse_fisher_time.inverse_fisher_seconds(**(numbers | {wrong: 0}), device="cpu")


# What was measured elsewhere, and one rate


def test_times_on_gpus_are_none_until_they_are_measured(tmp_path):
    assert inverse_fisher_time.gpu_times(tmp_path).empty
    path = tmp_path / inverse_fisher_time.GPU_TIMES
    path.write_text("card,weights,m,block,seconds,extra\nX100,64,2,8,0.5,1\n")
    [row] = inverse_fisher_time.gpu_times(tmp_path).to_dict("records")
    assert row == {"card": "X100", "weights": 64, "m": 2, "block": 8, "seconds": 0.5}
    path.write_text("card,weights,block,seconds\nX100,64,8,0.5\n")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) m:"):
        inverse_fisher_time.gpu_times(tmp_path)


def test_a_rate_is_the_one_by_which_times_were_made():
    times = pd.DataFrame({"weights": [100, 400, 100], "m": [3, 3, 30], "block": [5, 5, 10]})
    times["seconds"] = [6000 / 7, 24000 / 7, 120000 / 7]
    assert inverse_fisher_time.fitted_rate(times) == pytest.approx(7)
    times["seconds"] *= [4, 1, 0.25]  # off by as much to either side
    assert inverse_fisher_time.fitted_rate(times) == pytest.approx(7)
