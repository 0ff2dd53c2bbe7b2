"""Weights rounded to a few bits: an edit that is small beside the grid's spacing is rounded away again."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def grid(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Where each row of ``weights`` [rows, columns] lies on its grid: whole numbers, and the spacings [rows, 1].

    The grid has 2^bits - 1 values, evenly spaced and symmetric about 0. The largest entry of a row sets the
    spacing, that entry / (2^(bits - 1) - 1). Raises ValueError for fewer than 2 bits.
    """
    if bits < 2:
        raise ValueError(f"{bits} bit(s) leave nothing but zero: take at least 2")
    spacing = weights.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(spacing > 0, weights / spacing, 0).round(), spacing


def round_to_nearest(weights: Tensor, bits: int) -> Tensor:
    """Round each row of ``weights`` [rows, columns] to its :func:`grid`; the largest entry is kept exactly."""
    numbers, spacing = grid(weights, bits)
    return numbers * spacing


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """By name, the weights of the linear layers that are rounded for deployment, as views [outputs, inputs].

    Embeddings, norms and the output layer are not among them: these keep their precision in common practice.
    """
    head = model.get_output_embeddings()
    return {
        f"{name}.weight": module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, Conv1D | nn.Linear) and module is not head
    }


def rounded(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy of ``model`` with its :func:`matrices` rounded, output by output, as for deployment.

    Zhang et al. (2025) found that this alone brings back much of what gradient ascent had made a model forget.
    """
    model = copy.deepcopy(model)
    for weights in matrices(model).values():
        weights.copy_(round_to_nearest(weights, bits))
    return model


@dataclass(frozen=True)
class Survival:
    """What rounding leaves of a movement: of all rounded weights, the share whose place on the grid ``changed``.

    ``expected`` is that share were every weight's position between two grid values uniform, and the grid the same
    before and after: the mean of min(1, |d| / spacing). ``kept`` is how far the rounded weights have moved along
    the movement d, ⟨Q(θ + d) − Q(θ), d⟩ / ⟨d, d⟩: 1 if rounding undoes nothing on average, 0 if it undoes all.
    """

    changed: float
    expected: float
    kept: float


def survival(before: PreTrainedModel, after: PreTrainedModel, bits: int) -> Survival:
    """What rounding to ``bits`` leaves of the movement from one model to another of the same architecture.

    Raises ValueError if none of the weights that are rounded has moved.
    """
    number = changed = expected = along = square = 0.0
    for old, new in zip(matrices(before).values(), matrices(after).values(), strict=True):
        (there, old_spacing), (here, new_spacing) = grid(old, bits), grid(new, bits)
        d = (new - old).double()
        number += d.numel()
        changed += (here != there).sum().item()
        expected += (d.abs() / old_spacing).clamp(max=1).nan_to_num().sum().item()
        along += ((here * new_spacing - there * old_spacing) * d).sum().item()
        square += d.square().sum().item()
    if square == 0:
        raise ValueError("none of the weights that are rounded has moved")
    return Survival(changed / number, expected / number, along / square)
