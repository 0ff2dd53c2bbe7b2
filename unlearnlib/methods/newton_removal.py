"""Newton's removal with its equation solved, and with the strength that theory gives.

The step is θ + α(G + λI)⁻¹Δ, with G the Gauss–Newton matrix of all that stays and α = n₋/n₊. G is known by
products alone, and a few have to do: directions are proposed by an approximation C of it, such as K-FAC, as in
preconditioned conjugate gradients, and in the space that they span the best step is taken, for every λ at the same
price. So λ is what brings the model to its target; 1/λ stands for how long it was trained, as in chapter 5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import trange
from transformers import PreTrainedModel

from unlearnlib.curvature.krylov import NegativeCurvature
from unlearnlib.curvature.protocol import Curvature, check_damping
from unlearnlib.losses import mean_loss
from unlearnlib.methods.matching import LeadsNowhere, Match, match_strength
from unlearnlib.methods.newton_descent import check_share
from unlearnlib.weights import Vector, flatten, set_weights, snapshot, unflatten

PRODUCTS = 8
"""How many products with the matrix a step takes."""

MOST_TRIED = 30
"""How many dampings are tried at the most."""


@dataclass(frozen=True)
class Subspace:
    """What a symmetric matrix G and a vector v are within a space of directions.

    ``basis`` V [k, d] has orthonormal rows, ``matrix`` is V G Vᵀ [k, k] and ``right`` is V v [k], both in float64
    on the CPU. ``like`` has the names and shapes of vectors.
    """

    basis: Tensor
    matrix: Tensor
    right: Tensor
    like: Vector

    def solve(self, damping: float) -> Vector:
        """The x of the space with the least ½xᵀ(G + λI)x − vᵀx: (G + λI)⁻¹v, if that lies in it (Galerkin).

        Raises ValueError for a damping λ that is not positive, and NegativeCurvature if G + λI is not positive
        definite within the space, as where λ is less than rounding has left of the matrix.
        """
        check_damping(damping)
        system = self.matrix + damping * torch.eye(len(self.right), dtype=torch.float64)
        root, failed = torch.linalg.cholesky_ex(system)
        if failed:
            raise NegativeCurvature(
                f"G + λI is not positive definite at a damping of {damping:.1e}: raise it, or use a wider format"
            )
        y = torch.cholesky_solve(self.right[:, None], root)[:, 0]
        return unflatten(y.to(self.basis) @ self.basis, self.like)

    def first(self, number: int) -> "Subspace":
        """The space of the first ``number`` directions, as so many products would have made it."""
        return Subspace(self.basis[:number], self.matrix[:number, :number], self.right[:number], self.like)


def krylov_subspace(
    curvature: Curvature, preconditioner: Curvature, v: Vector, damping: float, products: int = PRODUCTS
) -> Subspace:
    """The space that preconditioned conjugate gradients for (G + λI)x = v search in so many ``products`` with G.

    ``curvature`` is G and ``preconditioner`` C, an approximation of it. The space begins with (C + λI)⁻¹v, and
    every further direction is (C + λI)⁻¹(G + λI) times the one before, made orthogonal to all before it.
    Where nothing new is proposed the solution is found, and fewer products are made.

    Raises ValueError for less than one product or a damping that is not positive, LeadsNowhere if v, or what the
    preconditioner makes of it, is zero or not finite, and what the products raise.
    """
    check_damping(damping)
    if products < 1:
        raise ValueError(f"a space of {products} products has no direction: take at least 1")
    right = flatten(v)
    basis, system = right.new_empty(products, len(right)), right
    matrix = torch.zeros(products, products, dtype=torch.float64)
    found, rounding = 0, 10 * torch.finfo(right.dtype).eps
    for k in trange(products, desc="products", leave=False, mininterval=1.0):
        row = flatten(preconditioner.solve(unflatten(system, v), damping))
        length = row.norm().item()
        if not math.isfinite(length) or (k == 0 and not length > 0):
            raise LeadsNowhere(f"direction {k + 1} has length {length}: it leads nowhere")
        for _ in range(2):  # twice is enough (Parlett 1998)
            row = row - (basis[:k] @ row) @ basis[:k]
        rest = row.norm()
        if rest.item() <= rounding * length:
            break
        basis[k] = row / rest
        product = flatten(curvature.matvec(unflatten(basis[k], v)))
        found = k + 1
        matrix[:found, k] = matrix[k, :found] = (basis[:found] @ product).cpu().double()
        system = product + damping * basis[k]
    basis = basis[:found]
    return Subspace(basis, matrix[:found, :found], (basis @ right).cpu().double(), v)


class NaturalPath:
    """The path θ + α x(λ) with α fixed, as λ falls: its strength is 1/λ.

    A :class:`unlearnlib.methods.matching.Path`. ``solve(λ)`` is x(λ) = (C + λI)⁻¹Δ of some curvature, and
    ``share`` is α = n₋/n₊, the influence of n₋ removed sequences in a mean over the n₊ that stay. ``forget``
    [n, tokens] are the sequences whose loss is looked at. It starts from the weights that ``model`` has now, and
    the search for λ from ``damping``. Raises ValueError if that or the share is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        solve: Callable[[float], Vector],
        forget: Tensor,
        share: float,
        damping: float,
    ) -> None:
        check_damping(damping)
        check_share(share)
        self.model, self.solve, self.forget, self.share, self.damping = model, solve, forget, share, damping
        self.start = snapshot(model)

    def to(self, target: float) -> Match:
        """Put the model where its forget loss is ``target`` nats, by the damping.

        Where no damping is small enough the target is not reached: the space is too small, or the theory wrong.
        """
        match = match_strength(self._loss_at, target, start=1 / self.damping, max_evaluations=MOST_TRIED)
        self.go(match.strength)
        return match

    def go(self, strength: float) -> None:
        """Put the model at the place of a strength 1/λ; 0 is the start. Raises what ``solve`` raises."""
        step = self.solve(1 / strength) if strength > 0 else None
        set_weights(self.model, self.start, step, self.share)

    def _loss_at(self, strength: float) -> float:
        try:
            self.go(strength)
        except NegativeCurvature:  # less damping than numbers can resolve: too far, as a loss that overflows is
            return math.inf
        return mean_loss(self.model, self.forget)
