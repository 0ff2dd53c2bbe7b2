"""The relearning probe: was the text erased, or only hidden?"""

import copy

import torch
from torch import Tensor
from tqdm.auto import trange
from transformers import PreTrainedModel

from unlearnlib.losses import mean_loss, sequence_losses


def relearning_curve(model: PreTrainedModel, forget: Tensor, steps: int, learning_rate: float) -> list[float]:
    """Fine-tune a copy of ``model`` on every second forget sequence; watch the loss on the ones in between.

    Full-batch AdamW on the even rows of ``forget`` [n, tokens]. Returns the mean loss in nats on the odd rows
    before each step and after the last, ``steps + 1`` values. A text that was only hidden comes back with its
    neighbours: the curve falls. One that was never learnt does not, or no further than the retrained model's.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    curve = [mean_loss(model, forget[1::2])]
    for _ in trange(steps, desc="relearning", leave=False, mininterval=1.0):
        optimizer.zero_grad(set_to_none=True)
        sequence_losses(model, forget[::2]).mean().backward()
        optimizer.step()
        curve.append(mean_loss(model, forget[1::2]))
    return curve


def fall(curve: list[float]) -> float:
    """How far a relearning curve falls below its start, in nats; 0 if it only rises.

    The metric ``relearned_nats`` is the fall of a model minus the fall of the retrained model.
    """
    return curve[0] - min(curve)
