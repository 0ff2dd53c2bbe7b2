"""Weights rounded to a few bits: an edit that is small beside the grid's spacing is rounded away again."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def round_to_nearest(weights: Tensor, bits: int) -> Tensor:
    """Round each row of ``weights`` [rows, columns] to 2^bits - 1 values, evenly spaced and symmetric about 0.

    The largest entry of a row is kept exactly and sets the spacing, that entry / (2^(bits - 1) - 1).
    Raises ValueError for fewer than 2 bits.
    """
    if bits < 2:
        raise ValueError(f"{bits} bit(s) leave nothing but zero: take at least 2")
    spacing = weights.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(spacing > 0, (weights / spacing).round() * spacing, weights)


def rounded(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy of ``model`` with the linear layers' matrices rounded, output by output, as for deployment.

    Embeddings, norms and the output layer keep their precision, as they do in common practice. Zhang et al. (2025)
    found that this alone brings back much of what gradient ascent had made a model forget.
    """
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Conv1D):  # stored as [inputs, outputs]
                module.weight.copy_(round_to_nearest(module.weight.T, bits).T)
            elif isinstance(module, nn.Linear) and module is not head:
                module.weight.copy_(round_to_nearest(module.weight, bits))
    return model
