import gc
import itertools
import mmap
import os
import threading
import time

import numpy as np
import pytest
import torch
from helpers import random_sequences, tiny_model
from scipy import stats
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from unlearnlib import cost, losses, weights
from unlearnlib.losses import Passes, counted_passes, mean_loss, sequence_losses


def peak(function):
    return cost.measure(function, "cpu", runs=1, at_least=0.0).peak_bytes


def test_memory_of_known_tensors():
    def function():
        a = torch.ones(1000)  # 4,000 bytes
        b = torch.ones(5000, dtype=torch.float64)  # 40,000: the peak
        del b
        return a + 1  # 4,000

    assert peak(function) == 44_000
    assert peak(function) == 44_000


def test_memory_within_an_operation_counts():
    x = torch.ones(1000)
    assert peak(lambda: x.double().sum()) >= 8_000


def test_memory_from_before_does_not_count():
    held = [torch.ones(100_000)]
    assert peak(lambda: torch.ones(1000)) == 4_000

    def function():
        held.clear()
        return torch.ones(1000)

    assert peak(function) == 4_000


def test_a_function_without_tensors_needs_no_memory():
    assert peak(lambda: None) == 0


def test_what_an_earlier_measurement_left_behind_does_not_count():
    left = []
    assert peak(lambda: left.append(torch.ones(1000))) == 4_000
    assert peak(lambda: torch.ones(500)) == 2_000


def fake_clock(monkeypatch, name, *seconds):
    """Let the calls of a measured function last ``seconds``, one after the other, by the clock called ``name``."""
    readings = itertools.accumulate(s for second in seconds for s in (0.0, second))
    monkeypatch.setattr(f"unlearnlib.cost.time.{name}", lambda: next(readings))


@pytest.mark.parametrize(("threads", "clock"), [(1, "process_time"), (2, "perf_counter")])
def test_time_is_the_median_after_a_warm_up(monkeypatch, threads, clock):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    fake_clock(monkeypatch, clock, 5.0, 1.0, 2.0)
    calls = []
    assert cost.measure(lambda: calls.append(0), "cpu").seconds == 2.0
    assert len(calls) == 4


def test_quick_functions_are_called_more_often(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    fake_clock(monkeypatch, "process_time", *[0.25] * 10)
    calls = []
    cost.measure(lambda: calls.append(0), "cpu", at_least=2.0)
    assert len(calls) == 9


def test_a_time_needs_a_run():
    with pytest.raises(ValueError, match="at least one run"):
        cost.measure(lambda: None, "cpu", runs=0)


def test_cuda_is_synchronised_and_asked_for_its_memory(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    fake_clock(monkeypatch, "perf_counter", 9.0, 1.0, 2.0, 3.0)  # the first is for the memory
    assert cost.measure(lambda: log.append("call"), "cuda") == cost.Cost(2.0, 250)
    assert log == ["reset"] + 4 * ["wait", "call", "wait"]


def test_an_error_of_the_function_comes_through_and_leaves_no_trace():
    with pytest.raises(ZeroDivisionError):
        cost.measure(lambda: 1 / 0, "cpu")
    assert gc.isenabled()
    assert peak(lambda: torch.ones(1000)) == 4_000


def test_a_meter_sees_memory_that_comes_and_goes():
    with cost.Meter("cpu") as meter, mmap.mmap(-1, 2**27) as memory:
        for page in range(0, 2**27, mmap.PAGESIZE):  # a tensor might get pages that the process had to spare
            memory[page] = 1
        time.sleep(0.2)
    assert 0.9 * 2**27 < meter.cost.peak_bytes < 1.5 * 2**27
    with cost.Meter("cpu") as meter:
        time.sleep(0.1)
    assert meter.cost.peak_bytes < 2**24


@pytest.mark.parametrize(("threads", "clock"), [(1, "process_time"), (2, "perf_counter")])
def test_a_meter_reads_the_clock_twice(monkeypatch, threads, clock):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    fake_clock(monkeypatch, clock, 5.0)
    with cost.Meter("cpu") as meter:
        pass
    assert meter.cost.seconds == 5.0


def test_passes_are_counted_by_what_they_are_for():
    model, sequences = tiny_model(), random_sequences(70)  # more than a batch
    with counted_passes() as passes:
        mean_loss(model, sequences)
        assert passes == Passes(forward=70)
        cost.plain_pass(model, sequences[:6])
        sequence_losses(model, sequences[:2])
    assert passes == Passes(forward=70, differentiated=8)
    assert passes.plain == pytest.approx(8 + 70 / 3)
    mean_loss(model, sequences)
    assert passes == Passes(forward=70, differentiated=8)


def test_a_forward_pass_alone_is_a_third_of_a_plain_one():
    model, sequences = tiny_model(), random_sequences(6)
    with cost.Meter("cpu") as meter:
        mean_loss(model, sequences)
    assert meter.cost.plain_passes == 2
    with cost.Meter("cpu") as meter:
        cost.plain_pass(model, sequences)
    assert meter.cost.plain_passes == 6


def test_a_block_within_a_block_counts_for_both():
    model, sequences = tiny_model(), random_sequences(6)
    with cost.Meter("cpu") as outer:
        with cost.Meter("cpu") as inner:  # when it ends, both have counted the same
            mean_loss(model, sequences[:3])
        mean_loss(model, sequences)
    assert (inner.cost.plain_passes, outer.cost.plain_passes) == (1, 3)
    assert inner.cost.seconds <= outer.cost.seconds


def test_an_error_within_leaves_no_thread_and_no_count_behind():
    def kept():
        gc.collect()
        return sum(type(thing) is Passes for thing in gc.get_objects()), threading.active_count()

    before = kept()
    meter = cost.Meter("cpu")
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    assert threading.active_count() == before[1]
    assert meter.cost.plain_passes == 0
    del meter
    assert kept() == before
    with pytest.raises(ZeroDivisionError), counted_passes() as passes:
        raise ZeroDivisionError
    mean_loss(tiny_model(), random_sequences(3))
    assert passes == Passes()


def test_a_process_of_its_own_gives_results_and_errors_back():
    assert cost.in_own_process(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        cost.in_own_process(divmod, 1, 0)


def test_a_plain_pass_is_one_forward_and_one_backward_pass(monkeypatch):
    monkeypatch.setattr(losses, "MOST_SEQUENCES", 4)
    model, sequences = tiny_model(), random_sequences(6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sequence_losses(model, sequences)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        cost.plain_pass(model, sequences)
    assert counter.get_total_flops() == 3 * forward
    assert all(p.grad is None for p in model.parameters())


def test_an_epoch_is_a_plain_pass_in_steps_of_adamw_that_lead_nowhere():
    model, sequences, steps = tiny_model(), random_sequences(6), []
    before = weights.snapshot(model)
    with FlopCounterMode(display=False) as plain:
        cost.plain_pass(model, sequences)
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: steps.append(type(optimizer)))
    try:
        with FlopCounterMode(display=False) as counter:
            cost.training_epoch(model, sequences, batch_size=4)
    finally:
        handle.remove()
    assert steps == 2 * [torch.optim.AdamW]
    assert counter.get_total_flops() == plain.get_total_flops()
    assert weights.norm(weights.difference(weights.snapshot(model), before)) == 0
    assert all(p.grad is None for p in model.parameters())


def test_an_exact_power_law_is_found():
    x = np.array([1.0, 2.0, 5.0, 11.0])
    law = cost.fit_power_law(x, 3 * x**1.5)
    assert law.scale == pytest.approx(3)
    assert [law.low, law.exponent, law.high] == pytest.approx([1.5] * 3)


def test_what_does_not_grow_has_the_exponent_zero():
    law = cost.fit_power_law([1, 2, 3], [4, 4, 4])
    assert (law.scale, law.exponent, law.low, law.high) == (pytest.approx(4), 0, 0, 0)


def test_the_interval_holds_the_true_exponent_as_often_as_it_says():
    rng, x = np.random.default_rng(0), np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    hits = 0
    for _ in range(1000):
        law = cost.fit_power_law(x, 2 * x**0.7 * np.exp(0.1 * rng.normal(size=5)))
        hits += law.low <= 0.7 <= law.high
    low, high = stats.binom.interval(0.999, 1000, 0.95)
    assert low <= hits <= high


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 0, 2]), ([-1, 2, 3], [1, 1, 2])])
def test_what_cannot_be_a_power_law_is_an_error(x, y):
    with pytest.raises(ValueError, match="three positive points or more"):
        cost.fit_power_law(x, y)
