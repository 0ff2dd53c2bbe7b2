"""One second-order update made by several processes on this machine, and what each of them spends on it."""

import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.cost import clock
from unlearnlib.curvature import FisherDual, sequence_gradients
from unlearnlib.curvature.kronecker import from_factors, layer_factors, second_moments
from unlearnlib.losses import mean_loss
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.models.loading import load_model
from unlearnlib.weights import flatten

Result = TypeVar("Result")

LONG = 2**20
"""Numbers in the long message by which a link is measured."""


def in_processes(number: int, function: Callable[..., Result], *arguments: object) -> list[Result]:
    """What ``function(*arguments)`` returns in each of ``number`` fresh processes, which share the work.

    They are started by what torchrun itself is made of, with new interpreters: a copy of this process, as
    accelerate's ``notebook_launcher`` makes it, would wait for ever where PyTorch has computed with several
    threads, and may not use CUDA where it has been used here. The function has to stand in a module. An error in
    one process ends all of them.

    Raises ChildFailedError, whose message has the first failure's.
    """
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id="unlearnlib",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # whichever port is free
        local_addr="localhost",
        max_restarts=0,
        start_method="spawn",
        signals_to_handle="SIGTERM",
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        found = elastic_launch(settings, function)(*arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    return [found[rank] for rank in range(number)]


@dataclass
class Phase:
    """A part of an update, as one process sees it: ``seconds`` by :func:`unlearnlib.cost.clock`, and on the wall.

    ``communicated`` are the bytes that it handed to collective operations, by the operation's name.
    """

    seconds: float
    wall_seconds: float
    communicated: Counter[str]


@dataclass
class Matrix:
    """A matrix of weights, by its parameters' ``names``, and the sides of its bases, 0 where there is none."""

    names: tuple[str, ...]
    owner: int
    left: int
    right: int


@dataclass
class Share:
    """What one process did for an update: its ``phases``, by name, and what of the curvature is whose.

    ``kept_bytes`` are those of the K-FAC blocks that are its own. ``steps`` are the solutions, NumPy's [d], by
    method, and ``loss`` the mean loss of the sequences that are forgotten: all processes know both.
    """

    phases: dict[str, Phase]
    matrices: list[Matrix]
    kept_bytes: int
    steps: dict[str, Any]
    loss: float


@dataclass
class Link:
    """To the next process: seconds of ``latency`` that a message takes, however short, and ``bytes_a_second``."""

    latency: float
    bytes_a_second: float


def shared_updates(
    configurations: list[dict[str, Any]], retain: Tensor, forget: Tensor, damping: float, device: str
) -> tuple[list[Share], Link | None]:
    """Return this process's share of updates of models with random weights, one after the other, with one thread.

    Each forgets ``forget`` [n, tokens] by K-FAC, EK-FAC and the dual form, with curvature from ``retain``
    [m, tokens]. To be called in every process (:func:`in_processes`); where there are several, the link between
    them is measured as well. The first model comes once more, and before all others, in double precision: there
    the times are of no use, since what is done once in a process is in them.
    """
    torch.set_num_threads(1)
    updates = []
    with distributed.started(device):
        for i, source in enumerate([configurations[0], *configurations]):
            model = load_model(source, device=device, dtype=torch.float32 if i else torch.float64)
            updates.append(_update(model, retain.to(model.device), forget.to(model.device), damping))
        return updates, _link(model.device)


def _update(model: PreTrainedModel, retain: Tensor, forget: Tensor, damping: float) -> Share:
    phases: dict[str, Phase] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with distributed.together():
            pass  # all begin at once
        read = clock(model.device)
        started, wall = read(), time.perf_counter()
        with distributed.counted_bytes() as communicated:
            yield
        phases[name] = Phase(read() - started, time.perf_counter() - wall, communicated)

    steps = {}
    with phase("gradient"):
        delta = ascent_direction(model, forget)
    with phase("factors"):
        factors = layer_factors(model, retain)
    with phase("decompositions"):
        kfac = from_factors(model, factors)
    with phase("solution"):
        steps["kfac"] = kfac.solve(delta, damping)
    with phase("second moments"):
        ekfac = second_moments(model, retain, kfac)
    steps["ekfac"] = ekfac.solve(delta, damping)
    with phase("gradients of sequences"):
        gradients = sequence_gradients(model, retain)
    with phase("dual form"):
        steps["fisher_dual"] = FisherDual(gradients).solve(delta, damping)
    with phase("losses"):
        loss = mean_loss(model, forget)

    owned = [block for block in kfac.blocks if block.mine]
    kept = [x for block in owned for x in (block.eigenvalues, block.left, block.right) if x is not None]
    matrices = [
        Matrix(block.names, block.owner, *(0 if x is None else len(x) for x in (block.left, block.right)))
        for block in kfac.blocks
    ]
    size = sum(x.numel() * x.element_size() for x in kept)
    flat = {method: flatten(step).cpu().numpy() for method, step in steps.items()}
    return Share(phases, matrices, size, flat, loss)


def _link(device: torch.device) -> Link | None:
    """From the time of a short all-reduce and of a long one, in a ring (Thakur et al. 2005)."""
    number = distributed.size()
    if number == 1:
        return None

    def seconds(numbers: int, repeats: int) -> float:
        tensor, times = torch.zeros(numbers, device=device), []
        for _ in range(repeats):
            started = _now(device)
            distributed.sum_over([tensor])
            times.append(_now(device) - started)
        return statistics.median(times)

    short, long = seconds(1, 30), seconds(LONG, 7)
    return Link(short / (2 * (number - 1)), 2 * (1 - 1 / number) * 4 * LONG / (long - short))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
