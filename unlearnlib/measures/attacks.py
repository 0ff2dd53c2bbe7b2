"""Attacks on membership that know more than the model's own losses, and how to judge an attack.

A *score* is a number that an attack gives to a sequence; a higher one speaks for membership.
"""

import math

import torch
from scipy import stats
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
    Raises ValueError if there is no member, if one of the others is more than ``false_alarms`` of them, or for
    scores that are not finite.
    """
    if not (members.isfinite().all() and others.isfinite().all()):
        raise ValueError("some scores are not finite: a model whose losses overflow cannot be attacked by them")
    if not 0 < false_alarms < 1:
        raise ValueError(f"the share of false alarms must lie between 0 and 1, not {false_alarms}")
    allowed = math.floor(false_alarms * len(others) + 1e-9)
    if len(members) == 0 or allowed < 1:
        raise ValueError(
            f"{len(members)} members and {len(others)} others are too few for a share of {false_alarms:.3g} "
            f"false alarms: take at least one member and {math.ceil(1 / false_alarms)} others"
        )
    threshold = others.sort(descending=True).values[allowed]  # above it are at most as many as are allowed
    return (members > threshold).double().mean().item()


def rate_chance(members: Tensor, others: Tensor, false_alarms: float = 0.01) -> float:
    """How likely a blind attack is to find as many ``members`` as :func:`true_positive_rate` says, or more.

    Exact where all orders of the scores are equally likely: the number of members above the r-th highest of the
    others is negative hypergeometric. Ties, which are not found, only make it larger.
    Raises ValueError as that function does.
    """
    found = round(true_positive_rate(members, others, false_alarms) * len(members))
    r = math.floor(false_alarms * len(others) + 1e-9) + 1
    return float(stats.nhypergeom(len(members) + len(others), len(members), r).sf(found - 1))


def rate_interval(found: int, members: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a rate of which ``found`` of ``members`` were counted (Clopper & Pearson 1934)."""
    low, high = stats.binomtest(found, members).proportion_ci(level, method="exact")
    return float(low), float(high)


def lira(scores: Tensor, shadow_scores: Tensor, inside: Tensor, per_sequence: bool = False) -> Tensor:
    """The likelihood-ratio attack, LiRA (Carlini et al. 2022): log N(s; in) - log N(s; out) of every score.

    ``scores`` [n] are of the model under attack, ``shadow_scores`` [models, n] of shadow models, of which those
    where ``inside`` [models, n] is true were trained on the sequence. Both normals have their means from the
    sequence's own shadow models. Their variances are pooled over all sequences, as Carlini et al. advise for fewer
    than 64 shadow models, unless they are to be ``per_sequence``. Shape [n].

    Raises ValueError where a sequence has fewer than two shadow models on a side, if the shapes do not fit, or if
    the scores of a side do not vary at all.
    """
    if shadow_scores.shape != inside.shape or shadow_scores.shape[1:] != scores.shape:
        raise ValueError(
            f"scores {tuple(scores.shape)} need shadow scores and membership of shape [models, n], not "
            f"{tuple(shadow_scores.shape)} and {tuple(inside.shape)}"
        )
    scores, shadow_scores, log_density = scores.double(), shadow_scores.double(), []
    for side, name in ((inside, "inside"), (~inside, "outside")):
        number = side.sum(dim=0)
        if len(scores) == 0 or number.min() < 2:
            raise ValueError(f"every sequence must be {name} of two shadow models or more: train more of them")
        mean = torch.where(side, shadow_scores, 0.0).sum(dim=0) / number
        squares = torch.where(side, (shadow_scores - mean) ** 2, 0.0).sum(dim=0)
        variance = squares / (number - 1) if per_sequence else squares.sum() / (number - 1).sum()
        if not (variance > 0).all():
            raise ValueError(f"the scores of the shadow models that are {name} are all tied: they tell nothing")
        log_density.append(-((scores - mean) ** 2) / (2 * variance) - variance.log() / 2)
    return log_density[0] - log_density[1]


def normal_auc(members: tuple[float, float], others: tuple[float, float]) -> float:
    """The AUC of scores that are normal, each side with a mean and a standard deviation: Φ(Δμ/√(σ₁² + σ₂²))."""
    return float(stats.norm.cdf((members[0] - others[0]) / math.hypot(members[1], others[1])))


def normal_rate(members: tuple[float, float], others: tuple[float, float], false_alarms: float = 0.01) -> float:
    """The true-positive rate at so many false alarms for scores that are normal: Φ((Δμ - z σ₂)/σ₁)."""
    z = stats.norm.isf(false_alarms)
    return float(stats.norm.cdf((members[0] - others[0] - z * others[1]) / members[1]))
