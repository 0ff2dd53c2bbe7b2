"""The relearning probe: was the text erased, or only hidden?"""

import copy
import math

import torch
from torch import Tensor
from tqdm.auto import trange
from transformers import PreTrainedModel

from unlearnlib.losses import mean_loss, sequence_losses


def relearning_curve(
    model: PreTrainedModel, taught: Tensor, watched: Tensor, steps: int, learning_rate: float
) -> list[float]:
    """Fine-tune a copy of ``model`` on the sequences ``taught``, and watch the loss on others.

    Full-batch AdamW; ``taught`` and ``watched`` are of shape [n, tokens]. Returns the mean loss in nats on
    ``watched`` before each step and after the last, ``steps + 1`` values.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    curve = [mean_loss(model, watched)]
    for _ in trange(steps, desc="relearning", leave=False, mininterval=1.0):
        optimizer.zero_grad(set_to_none=True)
        sequence_losses(model, taught).mean().backward()
        optimizer.step()
        curve.append(mean_loss(model, watched))
    return curve


def probe(
    model: PreTrainedModel, forget: Tensor, others: Tensor, steps: int, learning_rate: float
) -> tuple[list[float], list[float]]:
    """The relearning curve of one half of ``forget`` [n, tokens] after teaching the other half, and its control.

    Taught are the even rows, watched the odd ones. The control is taught as many of the ``others``, texts that the
    model has never seen: it shows how far the watched loss falls because *any* training mends what unlearning has
    damaged. A text that was only hidden comes back with its neighbours, further than with strangers.
    Raises ValueError if there are not two sequences to forget, or not as many others as are taught.
    """
    taught, watched = forget[::2], forget[1::2]
    if len(watched) < 1 or len(others) < len(taught):
        raise ValueError(
            f"{len(forget)} sequences to forget and {len(others)} others are too few: the probe takes at least "
            "2, and as many others as half of them"
        )
    return tuple(
        relearning_curve(model, rows, watched, steps, learning_rate) for rows in (taught, others[: len(taught)])
    )


def fall(curve: list[float]) -> float:
    """How far a relearning curve falls below its start, in nats; 0 if it only rises.

    NaN if any of the losses is not finite: a probe that diverged says nothing. The metric ``relearned_nats`` is
    the fall of a model minus the fall of the retrained model.
    """
    if not all(map(math.isfinite, curve)):
        return math.nan
    return curve[0] - min(curve)


def net_fall(curves: tuple[list[float], list[float]]) -> float:
    """What a model relearns of the watched texts beyond what strangers bring back: the falls' difference, in nats.

    The metric ``relearned_net_nats`` is that of a model minus that of the retrained model.
    """
    return fall(curves[0]) - fall(curves[1])
