"""Does a text come out when it is asked for in other words? Losses after a beginning that was tampered with."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.losses import batched, token_losses


def tampered(sequences: Tensor, share: float, seed: int) -> Tensor:
    """The ``sequences`` [n, tokens] with a share of the tokens of their first halves replaced.

    Each replacement is drawn from all tokens of the first halves, so that the frequencies of tokens stay. Nothing
    is drawn for a share of 0. Raises ValueError for a share that is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of tokens to replace must lie between 0 and 1, not {share}")
    generator = torch.Generator().manual_seed(seed)
    half = sequences.shape[1] // 2
    first = sequences[:, :half]
    drawn = first.reshape(-1)[torch.randint(first.numel(), first.shape, generator=generator)]
    replaced = torch.rand(first.shape, generator=generator) < share
    return torch.cat([torch.where(replaced, drawn, first), sequences[:, half:]], dim=1)


def second_half_losses(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """The loss of every token in the second half of ``sequences`` [n, tokens] after the first; [n, tokens / 2]."""
    half = sequences.shape[1] // 2
    return batched(lambda model, batch: token_losses(model, batch)[:, half - 1 :], model, sequences)
