"""What something costs on this machine: its time, its memory, and how both grow."""

import contextlib
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import torch
from scipy import stats
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from unlearnlib.losses import batches, counted_passes, sequence_losses
from unlearnlib.weights import parameters

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """Time in ``seconds``, and the most memory in use above what was in use before, ``peak_bytes``.

    ``plain_passes`` counts sequences that went through models, in forward and backward passes
    (:class:`unlearnlib.losses.Passes`); of what is not counted it is 0.
    """

    seconds: float
    peak_bytes: int
    plain_passes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """What two things cost that were done one after the other."""
        peak = max(self.peak_bytes, other.peak_bytes)
        return Cost(self.seconds + other.seconds, peak, self.plain_passes + other.plain_passes)


def clock(device: torch.device | str) -> Callable[[], float]:
    """The clock for work on ``device``: a function that reads it, in seconds, when all work so far is done.

    One thread of a CPU is timed by its own clock, which stands still while other processes run; several threads,
    and CUDA, by the clock on the wall.
    """
    device = torch.device(device)
    if device.type == "cuda":

        def read() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return read
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


class Meter:
    """Measures what a block of code costs, once, while it runs; afterwards ``cost`` tells.

    Time by the :func:`clock` of the device. Memory on CUDA is that of PyTorch's tensors, on a CPU that of the
    process, looked at twenty times a second: it is for what takes long, :func:`measure` is exact.
    """

    cost: Cost

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def __enter__(self) -> "Meter":
        self._stack = contextlib.ExitStack()
        self._passes = self._stack.enter_context(counted_passes())
        self._base = self._peak = self._used()
        self._ended = threading.Event()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            watcher = threading.Thread(target=self._watch, daemon=True)
            watcher.start()
            self._stack.callback(watcher.join)
            self._stack.callback(self._ended.set)
        self._read = clock(self.device)
        self._started = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = self._read() - self._started
        self._stack.close()
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)
        self.cost = Cost(seconds, self._peak - self._base, self._passes.plain)

    def _used(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self._peak = max(self._peak, self._used())


def measure(
    function: Callable[[], object], device: torch.device | str, runs: int = 3, at_least: float = 0.1
) -> Cost:
    """Call ``function`` once for its memory, which warms it up, then ``runs`` times or more for its median time.

    It is called until ``at_least`` seconds have gone by in all, by the :func:`clock` of the device.

    Raises ValueError if ``runs`` is less than one.
    """
    if runs < 1:
        raise ValueError(f"need at least one run to measure a time, not {runs}")
    device = torch.device(device)
    peak = _peak_bytes(function, device)
    read, times = clock(device), []
    while len(times) < runs or sum(times) < at_least:
        started = read()
        function()
        times.append(read() - started)
    return Cost(statistics.median(times), peak)


def _peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        with Meter(device) as meter:
            function()
        return meter.cost.peak_bytes
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler says when it starts and when it stops
    gc.disable()  # else memory from before goes now and then, and makes a peak look lower
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    finally:
        gc.enable()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    totals = [change["args"]["Total Allocated"] for change in changes]
    start = totals[0] - changes[0]["args"]["Bytes"] if changes else 0
    return max([start, *totals]) - start


def in_own_process(function: Callable[..., Result], *arguments: object) -> Result:
    """What ``function(*arguments)`` returns in a fresh process, whose memory holds nothing else.

    Function, arguments and result are pickled, so the function has to stand in a module. Errors come through.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def plain_pass(model: PreTrainedModel, sequences: Tensor) -> None:
    """One forward and backward pass over ``sequences`` [m, tokens]: the unit in which all else is counted."""
    live = list(parameters(model).values())
    for batch in batches(model, sequences):
        torch.autograd.grad(sequence_losses(model, batch).sum(), live)


def training_epoch(model: PreTrainedModel, sequences: Tensor, batch_size: int = 32) -> None:
    """AdamW once over ``sequences`` [m, tokens], at a learning rate of 0: it works as hard, and goes nowhere.

    A step takes ``batch_size`` sequences. The gradients are freed at the end.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for batch in sequences.split(batch_size):
        optimizer.zero_grad()
        sequence_losses(model, batch).mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@dataclass(frozen=True)
class PowerLaw:
    """y = ``scale`` · x^``exponent``, with the ends ``low`` and ``high`` of the exponent's 95 % interval."""

    scale: float
    exponent: float
    low: float
    high: float


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares of log y on log x; the interval is Student's, for points that scatter about one line.

    Raises ValueError if there are fewer than three points, or one is not positive.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3 or not ((x > 0).all() and (y > 0).all()):
        raise ValueError(f"a power law needs three positive points or more, not x = {x}, y = {y}")
    line = stats.linregress(np.log(x), np.log(y))
    scatter = 0.0 if np.ptp(y) == 0 else line.stderr  # which scipy leaves undefined for a constant
    reach = stats.t.ppf(0.975, len(x) - 2) * scatter
    return PowerLaw(float(np.exp(line.intercept)), line.slope, line.slope - reach, line.slope + reach)
