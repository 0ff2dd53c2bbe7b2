"""Krylov methods: what a few products with a large symmetric matrix tell about the matrix.

Vectors are rows of shape [d]; a matrix A is the function that multiplies by it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

Product = Callable[[Tensor], Tensor]


class NegativeCurvature(RuntimeError):
    """The matrix is not positive definite, so that there is no minimum to solve for."""


class NotConverged(RuntimeError):
    """The budget of iterations ran out before the tolerance was reached."""


REMEDY = (
    "Raise the damping beyond the size of a converged estimate (krylov.smallest_eigenvalue), "
    "or take a positive semi-definite matrix such as Gauss-Newton's"
)


@dataclass(frozen=True)
class Solution:
    """``x`` with A x ≈ b, and ``residuals``: ‖b − A x‖ / ‖b‖ before the first iteration and after each."""

    x: Tensor
    residuals: list[float]


def conjugate_gradients(
    product: Product,
    b: Tensor,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
    precondition: Product | None = None,
) -> Solution:
    """Solve A x = b for positive definite A (Hestenes & Stiefel 1952).

    Stops when the relative residual is at most ``tolerance``. ``precondition`` multiplies by an approximation of
    A⁻¹, symmetric and positive definite as well.

    Raises NegativeCurvature on meeting a direction p with pᵀAp ≤ 0, NotConverged when ``max_iterations`` do not
    suffice, and FloatingPointError when a product is not finite. A wrong answer is never returned.
    """
    x, r = torch.zeros_like(b), b.clone()
    scale = _length(b, "the right-hand side")
    if scale == 0:
        return Solution(x, [0.0])
    z = r if precondition is None else precondition(r)
    p, rz = z.clone(), r @ z
    residuals = [1.0]
    while residuals[-1] > tolerance:
        if len(residuals) > max_iterations:
            raise NotConverged(
                f"conjugate gradients are at a relative residual of {residuals[-1]:.1e} after {max_iterations} "
                f"iterations, and not at {tolerance:.1e}: allow more iterations, raise the damping or precondition"
            )
        q = product(p)
        _length(q, "a product with the matrix")
        curvature = p @ q
        if not curvature > 0:
            rayleigh = (curvature / (p @ p)).item()
            raise NegativeCurvature(
                f"iteration {len(residuals)} met a direction of curvature {rayleigh:.2e}, so the smallest "
                f"eigenvalue is that or less, and perhaps much less. {REMEDY}"
            )
        step = rz / curvature
        x = x + step * p
        r = r - step * q
        z = r if precondition is None else precondition(r)
        rz, before = r @ z, rz
        p = z + (rz / before) * p
        residuals.append(r.norm().item() / scale)
    return Solution(x, residuals)


@dataclass(frozen=True)
class Lanczos:
    """A few steps of Lanczos's method from a vector b: A ≈ V T Vᵀ on the space of b, Ab, A²b and so on.

    ``basis`` V [k, d] has orthonormal rows, ``matrix`` T [k, k] is tridiagonal, in float64 on the CPU; ``length``
    is ‖b‖, and ``beyond`` how strongly A couples the space to what lies outside it.
    """

    basis: Tensor
    matrix: Tensor
    length: float
    beyond: float

    def apply(self, function: Callable[[Tensor], Tensor], steps: int | None = None) -> Tensor:
        """f(A) b ≈ ‖b‖ V f(T) e₁ by the first ``steps`` steps (all of them where it is None).

        ``function`` acts on eigenvalues. With f(t) = 1/(t + λ) this is what conjugate gradients make of
        (A + λI) x = b in as many iterations, for every λ from one run.
        """
        k = len(self.matrix) if steps is None else steps
        values, vectors = torch.linalg.eigh(self.matrix[:k, :k])
        weights = self.length * (vectors @ (function(values) * vectors[0]))
        return weights.to(self.basis) @ self.basis[:k]

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights [k] of a measure with the moments bᵀAʲb / bᵀb: a coarse view of A's spectrum."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors[0] ** 2

    def smallest(self) -> tuple[float, float]:
        """The smallest Ritz value θ, an eigenvalue of T, and the residual ‖A x − θ x‖ of its unit vector x."""
        return _smallest_pair(self.matrix, self.beyond)

    def residual(self, damping: float, steps: int | None = None) -> float:
        """‖b − (A + λI) x‖ / ‖b‖ of the solution after ``steps`` steps, known without another product."""
        k = len(self.matrix) if steps is None else steps
        system = self.matrix[:k, :k] + damping * torch.eye(k, dtype=torch.float64)
        last = torch.linalg.solve(system, torch.eye(k, dtype=torch.float64)[0])[-1].abs().item()
        return last * (self.beyond if k == len(self.matrix) else self.matrix[k, k - 1].item())


@dataclass(frozen=True)
class Smallest:
    """An estimate of the smallest eigenvalue of A: ``value`` θ, its ``residual`` ‖A x − θ x‖, and the ``run``.

    Proved, up to rounding: λ_min ≤ θ, a Rayleigh quotient, and *some* eigenvalue lies within the residual of θ.
    Not proved: that this one is λ_min. Lanczos's method cannot know of an eigenvector that its start lacks, and is
    late in finding one that its start has little of. ``bound`` = θ − residual is below λ_min if θ has converged to
    it.
    """

    value: float
    residual: float
    run: Lanczos

    @property
    def bound(self) -> float:
        """θ − residual: a bound from below of λ_min, on the condition that θ has converged to λ_min."""
        return self.value - self.residual


def smallest_eigenvalue(
    product: Product, b: Tensor, tolerance: float = 0.1, max_steps: int = 300, description: str | None = None
) -> Smallest:
    """Lanczos's method from b until the residual of its smallest Ritz value θ is at most ``tolerance`` |θ|.

    A smaller tolerance is not only sharper but safer, for on its way down to λ_min a Ritz value may pause at an
    eigenvalue above it. For a singular matrix, whose θ tends to 0, rounding is what ends the run. One product a
    step. Start from a random vector unless it is known that b has a part along the eigenvector that is wanted.

    Raises NotConverged if ``max_steps`` steps do not suffice, and what :func:`lanczos` raises.
    """
    rounding = 100 * torch.finfo(b.dtype).eps

    def settled(matrix: Tensor, beyond: float) -> bool:
        values, (value, residual) = torch.linalg.eigvalsh(matrix), _smallest_pair(matrix, beyond)
        return residual <= max(tolerance * abs(value), rounding * values.abs().max().item())

    run = lanczos(product, b, max_steps, description, settled)
    value, residual = run.smallest()
    if not settled(run.matrix, run.beyond):
        raise NotConverged(
            f"after {max_steps} steps of Lanczos's method the smallest Ritz value is {value:.2e} with a residual "
            f"of {residual:.1e}, more than {tolerance:g} of its size: allow more steps"
        )
    return Smallest(value, residual, run)


def lanczos(
    product: Product,
    b: Tensor,
    steps: int,
    description: str | None = None,
    enough: Callable[[Tensor, float], bool] | None = None,
) -> Lanczos:
    """Run ``steps`` steps of Lanczos's method (1950) from b, each basis vector made orthogonal to all before it.

    Ends early where the space closes, or where ``enough(matrix, beyond)`` holds (see :class:`Lanczos`). A
    ``description`` puts a progress bar under that name. Raises ValueError if b is zero or ``steps`` not positive,
    FloatingPointError if a product is not finite.
    """
    if steps < 1:
        raise ValueError(f"need at least one step of Lanczos's method, not {steps}")
    length = _length(b, "the starting vector")
    if length == 0:
        raise ValueError("the starting vector is zero: nothing can be learnt from it")
    basis = [b / length]
    diagonal: list[float] = []
    beside: list[float] = []
    numbers: Iterable[int] = range(steps)
    for k in tqdm(numbers, description, disable=description is None, mininterval=1.0):
        w = product(basis[k])
        size = _length(w, "a product with the matrix")
        diagonal.append((w @ basis[k]).item())
        for _ in range(2):  # twice is enough (Parlett 1998); once loses the eigenvalues that converge first
            for v in basis:
                w = w - (w @ v) * v
        beside.append(w.norm().item())
        if beside[-1] <= 10 * torch.finfo(b.dtype).eps * size or k == steps - 1:
            break
        if enough is not None and enough(_tridiagonal(diagonal, beside[:-1]), beside[-1]):
            break
        basis.append(w / beside[-1])
    return Lanczos(torch.stack(basis), _tridiagonal(diagonal, beside[:-1]), length, beside[-1])


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)


def _smallest_pair(matrix: Tensor, beyond: float) -> tuple[float, float]:
    values, vectors = torch.linalg.eigh(matrix)
    return values[0].item(), beyond * vectors[-1, 0].abs().item()


def _length(v: Tensor, what: str) -> float:
    length = v.norm().item()
    if not math.isfinite(length):
        raise FloatingPointError(f"{what} is not finite: check the weights, the loss and the number format")
    return length
