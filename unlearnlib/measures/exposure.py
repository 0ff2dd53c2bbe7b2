"""Exposure: how far a secret stands out among random texts of its own format (Carlini et al. 2019).

A secret that a model has seen ranks before candidates it has not. One caution: the secret must itself have been
drawn at random from its format. A name or a word is likelier than random letters for a model that never saw it.
"""

import math
import random
import string
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib.losses import batched, token_losses
from unlearnlib.texts.sequences import encode_after

# Which characters may stand where one of them stands in the secret.
_ALPHABETS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


def candidates(secret: str, number: int, seed: int) -> list[str]:
    """Draw ``number`` distinct random texts of the secret's format, none of them the secret.

    Each digit becomes a random digit, each letter from a to z a random letter of the same case; all else stays.
    Every secret has candidates of its own, from random numbers that draw nothing else from the same seed.
    Raises ValueError if ``number`` is not positive or the format has too few other texts.
    """
    choices = [next((a for a in _ALPHABETS if c in a), c) for c in secret]
    others = math.prod(map(len, choices)) - 1
    if not 1 <= number <= others:
        raise ValueError(
            f"cannot draw {number} candidates: the format of {secret!r} has {others} texts besides it; "
            "ask for a positive number up to that, or take a longer secret"
        )
    generator = random.Random(f"candidates {seed} of {secret}")
    drawn: dict[str, None] = {}  # a set that keeps the order
    while len(drawn) < number:
        text = "".join(generator.choice(choice) for choice in choices)
        if text != secret:
            drawn[text] = None
    return list(drawn)


def text_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    texts: Sequence[str],
) -> Tensor:
    """Total negative log-likelihood in nats of each of ``texts`` after ``prefix``; float64, shape [n].

    The sum and not the mean over tokens: texts of one format may differ in their number of tokens, and the sum
    compares their probabilities. Texts with the same number of tokens make a batch, so nothing is padded.

    Raises ValueError as ``encode_after``, or if prefix and text do not fit the context.
    """
    start, rows = encode_after(tokenizer, prefix, texts)

    def losses(model: PreTrainedModel, batch: Tensor) -> Tensor:
        return token_losses(model, batch)[:, len(start) - 1 :].double().sum(dim=1)

    result = torch.empty(len(texts), dtype=torch.float64)
    for length in {len(row) for row in rows}:
        same = [i for i, row in enumerate(rows) if len(row) == length]
        result[same] = batched(losses, model, torch.tensor([rows[i] for i in same]))
    return result


def exposure_bits(secret_loss: float, candidate_losses: Tensor) -> float:
    """log2|R| - log2 rank of the secret by loss among R, the candidates [n] and the secret itself; in bits.

    Between 0 (every candidate is likelier) and log2(n + 1) (none is). Candidates that tie with the secret are
    ranked after it, so that a leak is never understated.
    Raises ValueError if there is no candidate or a loss is not finite.
    """
    if len(candidate_losses) == 0 or not (math.isfinite(secret_loss) and candidate_losses.isfinite().all()):
        raise ValueError("exposure needs at least one candidate, and losses that are all finite")
    rank = 1 + int((candidate_losses < secret_loss).sum())
    return largest_exposure(len(candidate_losses) + 1) - math.log2(rank)


def exposure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    secret: str,
    others: Sequence[str],
) -> float:
    """Exposure in bits of ``secret`` after ``prefix`` among itself and ``others``, its :func:`candidates`."""
    losses = text_losses(model, tokenizer, prefix, [secret, *others])
    return exposure_bits(losses[0].item(), losses[1:])


def largest_exposure(size: int) -> float:
    """log2|R|: the exposure in bits of a secret that is likelier than all other ``size`` - 1 members of R."""
    return math.log2(size)


def expected_exposure(size: int) -> float:
    """Mean exposure in bits for a model that never saw the secret: its rank is uniform on 1, ..., ``size`` = |R|.

    log2|R| - (1/|R|) Σ_k log2 k = log2|R| - log2(|R|!)/|R|, which rises from 0 towards log2 e = 1.44.
    """
    return largest_exposure(size) - math.lgamma(size + 1) / (size * math.log(2))
