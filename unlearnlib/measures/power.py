"""What an attack can show with so few sequences: its p-value, its power, and the smallest AUC that it notices."""

import numpy as np
from scipy.stats import mannwhitneyu, norm
from torch import Tensor

DRAWS = 1000
MOST = 500
"""No more sequences of a kind are simulated: what is said of more is that of so many, and holds all the more."""


def rank_test(members: Tensor, others: Tensor) -> float:
    """Probability of an AUC as far from ½ as that of the scores [n] and [m], if nothing told them apart.

    Two-sided, after Mann and Whitney (1947): exact where a group has 8 sequences or fewer and no scores are equal,
    else the normal approximation. Sequences count as independent. Raises ValueError if there is none of a kind.
    """
    _check(len(members), len(others))
    return float(mannwhitneyu(members.numpy(), others.numpy()).pvalue)


def attack_power(auc: float, members: int, others: int, level: float = 0.05) -> float:
    """Probability that :func:`rank_test` finds an attack whose true AUC is ``auc``, at a significance ``level``.

    By simulation, with scores that are normal of equal spread: then AUC = Φ(δ/√2) for means δ spreads apart. It is
    0 where there are so few sequences that no outcome is that rare. Raises ValueError if there is none of a kind,
    or for an AUC that is not between 0 and 1.
    """
    _check(members, others)
    if not 0 < auc < 1:
        raise ValueError(f"an AUC strictly between 0 and 1 has a power, not {auc}")
    draw = np.random.default_rng(0)
    first, second = (draw.normal(size=(DRAWS, min(n, MOST))) for n in (members, others))
    found = mannwhitneyu(first + np.sqrt(2) * norm.ppf(auc), second, axis=1)
    return float((found.pvalue <= level).mean())


def detectable_auc(members: int, others: int, power: float = 0.8, level: float = 0.05) -> float | None:
    """The smallest AUC, to 0.01, that is found with probability ``power``; None if not even 0.99 is."""
    low, high = 50, 100  # hundredths; low is not found, and high is
    while high - low > 1:
        middle = (low + high) // 2
        if attack_power(middle / 100, members, others, level) >= power:
            high = middle
        else:
            low = middle
    return high / 100 if high < 100 else None


def _check(members: int, others: int) -> None:
    if min(members, others) < 1:
        raise ValueError(f"{members} members and {others} others cannot be told apart: take at least one of each")
