"""What the streaming form of the dual costs on a real language model, of whose gradients G would not fit."""

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unlearnlib.cost import Cost, Meter, plain_pass
from unlearnlib.curvature.fisher_dual_streaming import StreamingFisher
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.models.loading import SMOLLM2, load_model, load_tokenizer, parameter_count
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.sequences import make_splits

FORGET = 32
"""How many sequences Δ is the gradient of."""


@dataclass(frozen=True)
class StreamingCost:
    """Of a model of ``d`` weights: the build, one solution, and a plain pass over the same sequences.

    ``peak_bytes`` is the most memory that the process has ever had, and not only what these three took.
    """

    d: int
    build: Cost
    solve: Cost
    plain: Cost
    peak_bytes: int


def streaming_cost(source: str | dict[str, Any], sequences: Tensor, forget: Tensor) -> StreamingCost:
    """Measure it on a CPU, for the model that ``load_model(source)`` loads, and sequences [n, tokens].

    Raises ImportError where the system does not tell how much memory a process has had, as on Windows.
    """
    import resource

    model = load_model(source, device="cpu")
    delta = ascent_direction(model, forget)
    with Meter(model.device) as build:
        fisher = StreamingFisher(model, sequences, v=delta)
    with Meter(model.device) as solve:
        fisher.solve(delta, fisher.eigenvalues.mean().item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # KiB
    with Meter(model.device) as plain:
        plain_pass(model, sequences)
    return StreamingCost(parameter_count(model), build.cost, solve.cost, plain.cost, peak)


def streaming_cost_of_smollm2(m: int, tokens: int) -> StreamingCost:
    """:func:`streaming_cost` of SmolLM2-135M and ``m`` sequences of the tales.

    To be called by :func:`unlearnlib.cost.in_own_process`, as ``peak_bytes`` is of the whole process.
    """
    splits = make_splits(
        load_corpus("tales"), load_tokenizer(SMOLLM2), length=tokens, forget=FORGET, retain=m, holdout=1, seed=0
    )
    return streaming_cost(SMOLLM2, splits.retain, splits.forget)
