"""How long the recursion takes to make the inverse of the Fisher's blocks, for models of any size."""

import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from unlearnlib.cost import clock
from unlearnlib.curvature import FisherRecursion, blocks_at_once

MOST_PARTS = 64
"""How many parts of a large model are timed, of which each has as many blocks as are inverted together."""

DAMPING = 1e-3


def inverse_fisher_seconds(
    weights: int, m: int, block: int, device: torch.device | str, repeats: int = 3, at_once: int = 1
) -> float:
    """Seconds that the recursion takes to invert the Fisher's blocks and solve once, given G [m, weights].

    In blocks of ``block`` weights, in float32, on random numbers, since the time does not depend on the values.
    Making G takes a plain pass over m sequences, which is not counted here. A step takes ``at_once`` gradients:
    one, as in WoodFisher and the paper, reads and writes the inverse for each.

    The blocks are worked off in parts, each of as many as the library inverts together. Where a model has more
    than :data:`MOST_PARTS` parts, so many are timed and the time is *extrapolated* in proportion to the blocks,
    which all take the same work. Each part is drawn before it is timed and forgotten afterwards, so that memory is
    that of one part, some ``blocks_at_once(block) · block · (3m + 3 block)`` numbers, whatever the model.

    The median of ``repeats`` times by the :func:`unlearnlib.cost.clock` of ``device``, after a warm-up.
    Raises ValueError if a number is less than 1.
    """
    for name, value in (
        ("weights", weights),
        ("m", m),
        ("block", block),
        ("repeats", repeats),
        ("at_once", at_once),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    size = min(block, weights)
    blocks = -(-weights // size)
    part = min(blocks, blocks_at_once(size, device))
    timed = [part] * min(blocks // part, MOST_PARTS)
    if len(timed) < MOST_PARTS and blocks % part:
        timed.append(blocks % part)
    read, generator = clock(device), torch.Generator(device).manual_seed(0)

    def seconds(number: int) -> float:
        gradients = torch.randn(m, number * size, device=device, generator=generator)
        v = gradients[0].clone()
        started = read()
        FisherRecursion(gradients, size, at_once).solve({"weights": v}, DAMPING)
        return read() - started

    seconds(part)
    totals = [sum(map(seconds, timed)) for _ in range(repeats)]
    return statistics.median(totals) * blocks / sum(timed)


GPU_TIMES = "inverse_fisher_gpu.csv"
"""The file of what was measured on GPUs. It is committed, as it can be measured again on such a card alone."""


def gpu_times(folder: str | Path) -> pd.DataFrame:
    """What :func:`inverse_fisher_seconds` has measured on GPUs, from ``folder``; empty if it has not been run.

    A row a measurement: ``card`` names the GPU, ``weights``, ``m`` and ``block`` the shape, and then ``seconds``;
    there may be further columns. Raises ValueError if the file lacks one of these.
    """
    columns, path = ["card", "weights", "m", "block", "seconds"], Path(folder) / GPU_TIMES
    if not path.exists():
        return pd.DataFrame(columns=columns)
    table = pd.read_csv(path)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"{path.name} lacks the column(s) {', '.join(missing)}: write them where it was measured")
    return table[columns]


def operations(weights: float, m: float, block: float) -> float:
    """4 m d b: for every gradient a product with each block and an update of it, of 2 b² operations each."""
    return 4.0 * m * weights * block


def fitted_rate(times: pd.DataFrame) -> float:
    """The rate of a machine, in operations a second, that comes closest to ``times`` in ratio: the geometric mean.

    ``times`` has the columns ``weights``, ``m``, ``block`` and ``seconds``.
    """
    rates = operations(times["weights"], times["m"], times["block"]) / times["seconds"]
    return float(np.exp(np.log(rates.astype(float)).mean()))
