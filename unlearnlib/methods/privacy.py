"""What differential privacy promises, and the accounts of DP-SGD by which it is kept (accountants by Opacus).

Neighbouring data sets differ by one sequence. An accountant turns the noise multiplier σ, the sampling rate q and
the number of steps into (ε, δ).
"""

import dataclasses
import math
import warnings

from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.utils import get_noise_multiplier

ORDERS = [1.01, 1.02, 1.05, *RDPAccountant.DEFAULT_ALPHAS, 128, 256, 512]
"""Rényi orders among which the accountant looks for the one that gives the smallest ε."""


@dataclasses.dataclass(frozen=True)
class Privacy:
    """The promise: ``epsilon`` and ``delta`` for one sequence. Without ``epsilon`` there is clipping but no noise.

    Raises ValueError if ε is not positive and finite or δ not between 0 and 1.
    """

    epsilon: float | None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if self.epsilon is not None and not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon must be positive and finite, not {self.epsilon}: None means no noise")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, not {self.delta}: take it well below 1/n")


def noise_multiplier(privacy: Privacy, rate: float, steps: int) -> float:
    """The σ with which ``steps`` steps at sampling rate q keep the promise, to within 1 % of its ε."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)  # see spent_epsilon
        return get_noise_multiplier(
            target_epsilon=privacy.epsilon,
            target_delta=privacy.delta,
            sample_rate=rate,
            steps=steps,
            accountant="rdp",
            epsilon_tolerance=0.01 * privacy.epsilon,
            alphas=ORDERS,
        )


def spent_epsilon(noise: float, rate: float, steps: int, delta: float, size: int = 1) -> float:
    """ε at ``delta`` after ``steps`` steps, for ``size`` sequences together (Mironov et al. 2019, by Opacus).

    For more than one sequence: a batch holds at least one of them with probability 1 - (1 - q)^size, and then
    they move the sum of the clipped gradients by no more than size × C. Every order of Rényi divergence gives a
    valid bound, so that one at the end of the list (of which Opacus warns) may at most be loose.
    Raises ValueError for a size below one.
    """
    _check_group(size)
    accountant = RDPAccountant()
    accountant.history = [(noise / size, 1 - (1 - rate) ** size, steps)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)
        return accountant.get_epsilon(delta, alphas=ORDERS)


def tighter_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """ε at ``delta`` after ``steps`` steps, for one sequence, from the distribution of the privacy loss itself.

    By the PRV accountant of Opacus, to within 0.01. It shows by how much :func:`spent_epsilon` is too large, and
    cannot take its place: what is known of groups is about Rényi divergences.
    """
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)  # of a first guess by Rényi divergences
        warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)  # log(1 - q) of full batches
        return float(accountant.get_epsilon(delta, eps_error=0.01))


def group_guarantee(privacy: Privacy, size: int) -> tuple[float, float]:
    """ε and δ that hold for ``size`` sequences together, from those for one alone, whatever the mechanism.

    (kε, δ (e^{kε} - 1)/(e^ε - 1)), derived in the chapter. A δ of 1 or more promises nothing.
    Raises ValueError for a size below one, or if nothing was promised to begin with.
    """
    _check_group(size)
    epsilon = privacy.epsilon
    if epsilon is None:
        raise ValueError("without noise nothing is promised to one sequence, and so nothing to more: set epsilon")
    try:
        factor = math.expm1(size * epsilon) / math.expm1(epsilon)
    except OverflowError:
        factor = math.inf
    return size * epsilon, privacy.delta * factor


def _check_group(size: int) -> None:
    if size < 1:
        raise ValueError(f"a group has at least one sequence, not {size}")


def auc_bound(epsilon: float, delta: float) -> float:
    """1 - e^{-ε}(1/2 - δ): the largest mean AUC of an attack on the membership of one sequence.

    Proved in the chapter, for a sequence and a stranger that only membership tells apart.
    """
    return 1 - math.exp(-epsilon) * (0.5 - delta)
