"""Logistic regression with its exact Hessian: Newton removal, and the certificate of Guo et al. (2020).

The objective is a sum, J(θ; D) = Σ_{i∈D} [log(1 + exp(−y_i x_iᵀθ)) + λ/2 ‖θ‖²] + bᵀθ, not a mean: a document that
leaves takes its share of the regulariser along, and the tilt b stays as it is. scikit-learn's C is 1/(nλ), without
an intercept. Gradients and Hessians are those of the sum, n times those of the mean.
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

GAMMA = 1 / (6 * math.sqrt(3))
"""Lipschitz constant of the second derivative s(1 − s) of the logistic loss, the maximum of |s(1 − s)(1 − 2s)|."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What J is made of: ``features`` [n, d], ``labels`` [n] of −1 and +1, ``damping`` λ, ``tilt`` b [d]; float64.

    Raises ValueError for a damping that is not positive, other labels, shapes that do not fit, and rows of
    ``features`` longer than one, since the bounds below rest on ‖x_i‖ ≤ 1.
    """

    features: np.ndarray
    labels: np.ndarray
    damping: float
    tilt: np.ndarray | float = 0.0

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"the damping must be positive, not {self.damping}: without it H may have no inverse")
        n, d = self.features.shape
        if self.labels.shape != (n,) or np.shape(self.tilt) not in ((), (d,)):
            raise ValueError(f"{n} rows of {d} features need {n} labels and a tilt of {d} numbers")
        wrong = np.flatnonzero(~np.isin(self.labels, (-1, 1)))
        if len(wrong):
            raise ValueError(f"label {wrong[0]} is {self.labels[wrong[0]]}: labels must be -1 or +1")
        norms = np.linalg.norm(self.features, axis=1)
        wrong = np.flatnonzero(~(norms <= 1 + 1e-9))  # in this form true of NaN as well
        if len(wrong):
            raise ValueError(
                f"row(s) {wrong[:5].tolist()} of the features have a norm above one (row {wrong[0]}: "
                f"{norms[wrong[0]]:.4g}): divide all features by the largest norm"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def spectral_norm(self) -> float:
        """‖X‖₂, the largest singular value of the features. Removing rows never raises it."""
        return math.sqrt(np.linalg.eigvalsh(self.features.T @ self.features)[-1])

    def split(self, forget: ArrayLike) -> tuple["Problem", "Problem"]:
        """The problems on D⁺ and on D⁻, where D⁻ are the rows ``forget`` (indices); the tilt stays with D⁺.

        Raises ValueError if that is no row, a row twice, a row that does not exist, or every row.
        """
        forget = np.asarray(forget, dtype=int).reshape(-1)
        if len(forget) == 0:
            raise ValueError("the forget set is empty: name at least one row")
        if forget.min() < 0 or forget.max() >= len(self) or len(np.unique(forget)) < len(forget):
            raise ValueError(f"the forget set must name each row once, by an index from 0 to {len(self) - 1}")
        if len(forget) == len(self):
            raise ValueError(f"the forget set is all {len(self)} rows: nothing would be left to train on")
        retain = np.delete(np.arange(len(self)), forget)
        retained = replace(self, features=self.features[retain], labels=self.labels[retain])
        forgotten = replace(self, features=self.features[forget], labels=self.labels[forget], tilt=0.0)
        return retained, forgotten


def objective(problem: Problem, theta: np.ndarray) -> float:
    """J(θ) in nats, the sum over all rows."""
    losses = np.logaddexp(0, -problem.labels * (problem.features @ theta))
    ridge = len(problem) * problem.damping / 2 * theta @ theta
    return float(losses.sum() + ridge + np.sum(problem.tilt * theta))


def gradient(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """∇J(θ), shape [d]."""
    slopes = -problem.labels * expit(-problem.labels * (problem.features @ theta))
    return problem.features.T @ slopes + len(problem) * problem.damping * theta + problem.tilt


def row_gradients(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Each row's share of ∇J(θ), shape [n, d]; the tilt, which belongs to no row, is left out."""
    slopes = -problem.labels * expit(-problem.labels * (problem.features @ theta))
    return problem.features * slopes[:, None] + problem.damping * theta


def accuracy(problem: Problem, theta: np.ndarray) -> float:
    """The share of rows whose label is the sign of xᵀθ."""
    return float((np.sign(problem.features @ theta) == problem.labels).mean())


def hessian(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """∇²J(θ), shape [d, d]; its smallest eigenvalue is at least nλ."""
    s = expit(problem.features @ theta)
    rows = problem.features * np.sqrt(s * (1 - s))[:, None]
    return rows.T @ rows + len(problem) * problem.damping * np.eye(len(theta))


def solve(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Solve a symmetric positive definite system, by Cholesky."""
    return cho_solve(cho_factor(matrix), vector)


def fit(
    problem: Problem, start: np.ndarray | None = None, tolerance: float = 1e-13, max_steps: int = 50
) -> np.ndarray:
    """The one minimiser of J, shape [d], by Newton's method from ``start`` (default: zero).

    Stops when ‖∇J‖ ≤ ``tolerance`` (n + ‖b‖), which is what rounding allows. A step is halved until it shortens
    the gradient: along a Newton step the gradient shrinks at first, wherever H is positive definite.
    Raises RuntimeError if that takes more than ``max_steps`` steps or no step helps any more.
    """
    theta = np.zeros(problem.features.shape[1]) if start is None else start
    slope = gradient(problem, theta)
    target, steps = tolerance * (len(problem) + np.linalg.norm(problem.tilt)), 0
    while not (norm := np.linalg.norm(slope)) <= target:
        if steps == max_steps:
            raise RuntimeError(
                f"not converged in {max_steps} Newton steps: the gradient's norm is {norm:.3g} (wanted: "
                f"{target:.3g}); allow more steps or use more damping"
            )
        step, length = -solve(hessian(problem, theta), slope), 1.0
        while np.linalg.norm(new := gradient(problem, theta + length * step)) > (1 - length / 4) * norm:
            length /= 2
            if length < 1e-8:
                raise RuntimeError(
                    f"no step makes the gradient shorter than {norm:.3g} (wanted: {target:.3g}): "
                    "rounding is in the way; ask for a larger tolerance or use more damping"
                )
        theta, slope, steps = theta + length * step, new, steps + 1
    return theta


def newton_removal(retained: Problem, forgotten: Problem, theta: np.ndarray) -> np.ndarray:
    """θ + H⁻¹Δ: Δ the gradient of the forgotten rows (a sum), H the Hessian of the retained ones, both at θ."""
    return theta + solve(hessian(retained, theta), gradient(forgotten, theta))


def data_dependent_bound(retained: Problem, step: np.ndarray, spectral_norm: float) -> float:
    """γ/2 ‖X‖₂ ‖v‖ ‖Xv‖ for ``step`` v = H⁻¹Δ: bounds the gradient residual ‖∇J(θ + v; D⁺)‖ that v leaves behind.

    If θ was not quite an optimum, it bounds what is added to ‖∇J(θ; D)‖, so bounds of successive removals add up.
    After Corollary 1 of Guo et al. (2020), with the factor 1/2 of the Taylor remainder. ``spectral_norm`` is ‖X‖₂
    of the retained features, or of any features that contain them.
    """
    return float(GAMMA / 2 * spectral_norm * np.linalg.norm(step) * np.linalg.norm(retained.features @ step))


def worst_case_bound(rows: int, forgotten: int, damping: float, offset: float = 0.0) -> float:
    """The same for any data and any k = ``forgotten`` of n = ``rows`` rows: γ k² (2 + offset/n)² / (2 λ² (n − k)).

    After Theorem 1 of Guo et al. (2020). ``offset`` is ‖b‖ plus the gradient's norm at θ, zero for an optimum
    without a tilt.
    """
    length = forgotten * (2 + offset / rows)  # bounds ‖Δ‖
    return GAMMA * length**2 / (2 * damping**2 * (rows - forgotten))


def noise_per_residual(epsilon: float, delta: float) -> float:
    """c/ε with δ = 1.5 exp(−c²/2): a tilt b ~ N(0, σ²I) hides residuals up to σ ε/c (Guo et al. 2020, Theorem 3).

    Raises ValueError unless 0 < ``epsilon`` ≤ 2 ln 3 and 0 < ``delta`` ≤ 1/2, for which the formula is proved.
    """
    if not 0 < epsilon <= 2 * math.log(3) or not 0 < delta <= 0.5:
        raise ValueError(f"need 0 < epsilon <= 2 ln 3 = 2.197 and 0 < delta <= 0.5, not {epsilon} and {delta}")
    return math.sqrt(2 * math.log(1.5 / delta)) / epsilon
