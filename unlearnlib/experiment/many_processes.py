"""One second-order update made by several processes on this machine, and what each of them spends on it."""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from unlearnlib import distributed
from unlearnlib.curvature import FisherDual, Kronecker, sequence_gradients
from unlearnlib.curvature.kronecker import from_factors, layer_factors, second_moments
from unlearnlib.losses import mean_loss
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.models.loading import load_model
from unlearnlib.weights import Vector, flatten

Result = TypeVar("Result")


def in_processes(number: int, function: Callable[..., Result], *arguments: object) -> list[Result]:
    """What ``function(*arguments)`` returns in each of ``number`` fresh processes, which share the work.

    They are started by what torchrun itself is made of, with new interpreters: a copy of this process, as
    accelerate's ``notebook_launcher`` makes it, would wait for ever where PyTorch has computed with several
    threads, and may not use CUDA where it has been used here. The function has to stand in a module. What one
    process fails of ends all of them.

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
    """A part of an update, as one process sees it: ``seconds`` on the wall, and of its processor.

    ``communicated`` are the bytes that it handed to collective operations, by the operation's name.
    """

    seconds: float = 0.0
    processor_seconds: float = 0.0
    communicated: Counter[str] = field(default_factory=Counter)


@dataclass
class Share:
    """What one process did for an update: its ``phases``, by name, and what of the curvature it keeps.

    ``owners`` has for each matrix of weights, by its parameters' names, who owns it. ``kept_bytes`` are those of
    the K-FAC blocks that are its own. ``steps`` are the solutions [d] by method, which all processes know.
    """

    phases: dict[str, Phase]
    owners: dict[tuple[str, ...], int]
    kept_bytes: int
    steps: dict[str, Any]
    loss: float


def shared_updates(
    configurations: list[dict[str, Any]],
    retain: Tensor,
    forget: Tensor,
    damping: float,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> list[Share]:
    """This process's share of updates of models with random weights, one after the other, with one thread.

    Each forgets ``forget`` [n, tokens] by K-FAC, EK-FAC and the dual form, with curvature from ``retain``
    [m, tokens]. To be called in every process (:func:`in_processes`). The first model is done twice, so that what
    is done once in a process is not in its times.
    """
    torch.set_num_threads(1)
    with distributed.started(device):
        updates = []
        for source in [configurations[0], *configurations]:
            model = load_model(source, device=device, dtype=dtype)
            updates.append(_update(model, retain, forget, damping))
        return updates[1:]


def _update(model: Any, retain: Tensor, forget: Tensor, damping: float) -> Share:
    phases: dict[str, Phase] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with distributed.together():
            pass  # all begin together
        started, processor = time.perf_counter(), time.process_time()
        with distributed.counted_bytes() as communicated:
            yield
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        phases[name] = Phase(
            time.perf_counter() - started, time.process_time() - processor, Counter(communicated)
        )

    def solved(C: Kronecker | FisherDual) -> Any:
        step: Vector = C.solve(delta, damping)
        return flatten(step).cpu().numpy()

    with phase("gradient"):
        delta = ascent_direction(model, forget)
    with phase("factors"):
        factors = layer_factors(model, retain)
    with phase("decompositions"):
        kfac = from_factors(model, factors)
    steps = {}
    with phase("solution"):
        steps["kfac"] = solved(kfac)
    with phase("second moments"):
        ekfac = second_moments(model, retain, kfac)
    steps["ekfac"] = solved(ekfac)
    with phase("gradients of sequences"):
        gradients = sequence_gradients(model, retain)
    with phase("dual form"):
        steps["fisher_dual"] = solved(FisherDual(gradients))
    with phase("losses"):
        loss = mean_loss(model, forget)
    owned = [block for block in kfac.blocks if block.mine]
    kept = [x for block in owned for x in (block.eigenvalues, block.left, block.right) if x is not None]
    return Share(
        phases,
        {block.names: block.owner for block in kfac.blocks},
        sum(x.numel() * x.element_size() for x in kept),
        steps,
        loss,
    )
