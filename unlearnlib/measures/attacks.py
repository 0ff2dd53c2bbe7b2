"""Attacks on membership that know more than the model's own losses, and how to judge an attack.

A *score* is a number that an attack gives to a sequence; a higher one speaks for membership.
"""

import math

from torch import Tensor


def calibrated(scores: Tensor, reference_scores: Tensor) -> Tensor:
    """Scores [n] minus their means over reference models, ``reference_scores`` [models, n]; shape [n].

    Some texts are likely under any model. Reference models, which saw none of the texts in question, tell which,
    and what is left of a score is what this model knows more than they do (Watson et al. 2022).
    Raises ValueError if there is no reference model, or if the shapes do not fit.
    """
    if reference_scores.ndim != 2 or len(reference_scores) == 0 or reference_scores.shape[1:] != scores.shape:
        raise ValueError(
            f"scores {tuple(scores.shape)} need the scores of at least one reference model on the same sequences, "
            f"not {tuple(reference_scores.shape)}"
        )
    return scores - reference_scores.mean(dim=0)


def true_positive_rate(members: Tensor, others: Tensor, false_alarms: float = 0.01) -> float:
    """The share of ``members`` [n] found at a threshold at which at most ``false_alarms`` of ``others`` [m] are.

    Found is what scores *above* the threshold, which is the score of one of the others: so ties are not found, and
    the share of false alarms is never exceeded. Few others cannot tell what is rare.
    Raises ValueError if there is no member, or if one of the others is more than ``false_alarms`` of them.
    """
    allowed = math.floor(false_alarms * len(others) + 1e-9)
    if len(members) == 0 or allowed < 1:
        raise ValueError(
            f"{len(members)} members and {len(others)} others are too few for a share of {false_alarms:.3g} "
            f"false alarms: take at least one member and {math.ceil(1 / false_alarms)} others"
        )
    threshold = others.sort(descending=True).values[allowed]  # above it are at most as many as are allowed
    return (members > threshold).double().mean().item()
