"""What a model says of a text when it is given the beginning: greedy continuations and how much they give away."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.losses import batches, check_length


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Tensor, tokens: int, cached: bool = True) -> Tensor:
    """Continue each of ``prompts`` [n, prompt tokens] by the most likely token, ``tokens`` times; [n, tokens].

    An end token does not stop it: the book's sequences run on from document to document. Unless ``cached``, all
    is read again for every token, which any architecture can do.
    Raises ValueError if prompt and continuation do not fit the model's context, or if either is empty.
    """
    if prompts.shape[1] < 1 or tokens < 1:
        raise ValueError(
            f"need at least one token to continue and one to add, not {prompts.shape[1]} and {tokens}"
        )
    check_length(model, prompts.shape[1] + tokens)
    following, cache, found = prompts.to(model.device), None, []
    if not cached:
        for _ in range(tokens):
            out = model(input_ids=following, use_cache=False)
            following = torch.cat([following, out.logits[:, -1:].argmax(dim=2)], dim=1)
        return following[:, -tokens:].cpu()
    for _ in range(tokens):
        out = model(input_ids=following, past_key_values=cache, use_cache=True, logits_to_keep=1)
        following, cache = out.logits.argmax(dim=2), out.past_key_values
        found.append(following)
    return torch.cat(found, dim=1).cpu()


@torch.no_grad()
def has_cache(model: PreTrainedModel, prompt: Tensor) -> bool:
    """Whether ``model`` goes on from its cache as if it had read ``prompt`` [1, 2 tokens or more] again.

    Recurrent architectures, and some older ones, have a cache of their own kind, or none.
    """
    prompt = prompt.to(model.device)
    again = model(input_ids=prompt, use_cache=False).logits[:, -1]
    try:
        out = model(input_ids=prompt[:, :-1], past_key_values=None, use_cache=True, logits_to_keep=1)
        last = {"past_key_values": out.past_key_values, "use_cache": True, "logits_to_keep": 1}
        following = model(input_ids=prompt[:, -1:], **last).logits[:, -1]
    except Exception:  # whatever an architecture raises that cannot do this
        return False
    return bool((following - again).abs().max() <= 1e-2 * again.abs().max())


def recites(model: PreTrainedModel, sequences: Tensor, given: int) -> Tensor:
    """Which of ``sequences`` [n, tokens] the model says to the end, ``given`` so many of their tokens; [n]."""
    rest = sequences[:, given:]
    return (continuations(model, sequences[:, :given], rest.shape[1]) == rest.cpu()).all(dim=1)


def verbatim_length(generated: Tensor, truth: Tensor) -> int:
    """Number of leading tokens of ``generated`` that equal ``truth``."""
    differs = (generated != truth[: len(generated)]).nonzero()
    return len(generated) if len(differs) == 0 else int(differs[0])


def overlap(generated: Tensor, truth: Tensor, n: int) -> float:
    """Share of the n-grams of ``generated`` that occur in ``truth``, rows of at least n token ids.

    An n-gram that is generated twice counts twice, and where in ``truth`` it occurs does not matter.
    """
    known = {tuple(gram) for gram in truth.unfold(0, n, 1).tolist()}
    grams = [tuple(gram) in known for gram in generated.unfold(0, n, 1).tolist()]
    return sum(grams) / len(grams)


def extraction_likelihood(model: PreTrainedModel, sequences: Tensor, n: int = 10, stride: int = 8) -> float:
    """EL_n of ``sequences`` [m, T], averaged over them (Jang et al. 2023); between 0 and 1.

    The model is given the first t tokens and writes the other T - t; counted is the share of the n-grams it
    writes that occur in the tokens it should have written. Jang et al. average over t = 1, 2, ..., T - n, after
    which there is no n-gram left; here t = ``stride``, 2 ``stride``, ..., and a stride of 1 is their definition.

    Raises ValueError if the sequences are too short for one n-gram after ``stride`` tokens, or too long for the
    model's context.
    """
    tokens = sequences.shape[1]
    lengths = range(stride, tokens - n + 1, stride)
    if not lengths:
        raise ValueError(
            f"sequences of {tokens} tokens are too short for {n}-grams after {stride} tokens: "
            f"they need {n + stride}, or take a smaller n or stride"
        )
    shares, cached = [], has_cache(model, sequences[:1, : lengths[0] + 1])
    for length in lengths:
        for batch in batches(model, sequences):
            generated = continuations(model, batch[:, :length], tokens - length, cached)
            shares += [overlap(g, s[length:], n) for g, s in zip(generated, batch, strict=True)]
    return sum(shares) / len(shares)
