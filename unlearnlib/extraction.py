"""What a model says of a text when it is given the beginning: greedy continuations and how much they give away."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.measures import check_length


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Tensor, tokens: int) -> Tensor:
    """Continue each of ``prompts`` [n, prompt tokens] by the most likely token, ``tokens`` times; [n, tokens]."""
    check_length(model, prompts.shape[1] + tokens)
    following, cache, found = prompts.to(model.device), None, []
    for _ in range(tokens):
        out = model(input_ids=following, past_key_values=cache, use_cache=True)
        following, cache = out.logits[:, -1:].argmax(dim=2), out.past_key_values
        found.append(following)
    return torch.cat(found, dim=1).cpu()


def overlap(generated: Tensor, truth: Tensor, n: int) -> float:
    """Share of the n-grams of ``generated`` that occur in ``truth``, rows of at least n token ids."""
    known = {tuple(gram) for gram in truth.unfold(0, n, 1).tolist()}
    grams = [tuple(gram) in known for gram in generated.unfold(0, n, 1).tolist()]
    return sum(grams) / len(grams)


def extraction_likelihood(model: PreTrainedModel, sequences: Tensor, n: int = 10, stride: int = 8) -> float:
    """EL_n of ``sequences`` [m, tokens], averaged (Jang et al. 2023, equations 2 and 3).

    The model is given the first t tokens and continues to the end; counted is which share of the n-grams it
    writes is in the rest of the text. Jang et al. average over every t; here every ``stride``-th.
    """
    tokens = sequences.shape[1]
    lengths = range(stride, tokens - n + 1, stride)
    if not lengths:
        raise ValueError(f"sequences of {tokens} tokens are too short for {n}-grams after {stride} tokens")
    shares = []
    for length in lengths:
        generated = continuations(model, sequences[:, :length], tokens - length)
        shares += [overlap(g, s[length:], n) for g, s in zip(generated, sequences, strict=True)]
    return sum(shares) / len(shares)
