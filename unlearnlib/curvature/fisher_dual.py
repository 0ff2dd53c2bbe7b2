"""All of the Fisher matrix, and every power of it, through inner products of gradients: the dual form.

F = (1/m) Σ gᵢ gᵢᵀ = GᵀG/m over m sequences, where gᵢ, row i of G [m, d], is the gradient of sequence i's own loss.
Columns of G are in the order of :func:`unlearnlib.weights.flatten`.
"""

import torch
from torch import Tensor

from unlearnlib import distributed
from unlearnlib.curvature.protocol import check_damping
from unlearnlib.weights import Vector, flatten, unflatten

COLUMNS = 2**24
"""How many columns of G are multiplied at a time: CUDA's matrix products count them with 32 bits."""


class FisherDual:
    """All of F, through the m × m matrix GGᵀ, which has the eigenvalues of GᵀG: no blocks, no recursion.

    With GGᵀ = U diag(s) Uᵀ, for every exponent p and damping λ

        (F + λI)^p v = λ^p v + Gᵀ U diag(((s/m + λ)^p − λ^p)/s) Uᵀ G v.

    ``gradients`` is G [m, d], which is kept and not copied. ``eigenvalues`` of F [m], ascending; all others are 0.
    Several processes divide the columns among them, and add up what products over columns give.
    """

    def __init__(self, gradients: Tensor) -> None:
        self.columns = distributed.shares(gradients.shape[1])
        self.gradients = distributed.rows_to_columns(gradients, self.columns)
        inner = gram(self.gradients)
        distributed.sum_over([inner])
        s, self.vectors = torch.linalg.eigh(inner, UPLO="L")
        self.eigenvalues = s.clamp(min=0) / len(inner)

    def matvec(self, v: Vector) -> Vector:
        """F v."""
        return unflatten(self._combination(self._products(flatten(v))), v)

    def solve(self, v: Vector, damping: float) -> Vector:
        """(F + λI)⁻¹ v."""
        return self.power(v, -1.0, damping)

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(F + λI)^p v."""
        check_damping(damping)
        row, gain = flatten(v), power_gain(self.eigenvalues, exponent, damping)
        mixture = self.vectors @ (gain * (self.vectors.mT @ self._products(row)))
        return unflatten(damping**exponent * (row + self._combination(mixture)), v)

    def _products(self, row: Tensor) -> Tensor:
        """G v in float64, [m]."""
        mine = row[self.columns[distributed.rank()]]
        products = mine.new_zeros(len(self.gradients), dtype=torch.float64)
        for part, x in zip(self.gradients.split(COLUMNS, dim=1), mine.split(COLUMNS), strict=True):
            products += part @ x
        distributed.sum_over([products])
        return products

    def _combination(self, weights: Tensor) -> Tensor:
        """Gᵀw/m, [d]."""
        change = self.gradients.new_empty(self.gradients.shape[1])
        for part, out in zip(self.gradients.split(COLUMNS, dim=1), change.split(COLUMNS), strict=True):
            torch.mv(part.T, weights.to(part.dtype), out=out)
        return distributed.joined(change.div_(len(self.gradients)), self.columns[-1].stop)


def power_gain(eigenvalues: Tensor, exponent: float, damping: float) -> Tensor:
    """((f + λ)^p / λ^p − 1) / f for each eigenvalue f, and its limit p/λ for f → 0.

    Without loss of digits where f is small beside λ.
    """
    f = eigenvalues
    return torch.where(f > 0, torch.expm1(exponent * torch.log1p(f / damping)) / f, exponent / damping)


def gram(gradients: Tensor, columns: int = 4096, rows: int = 128) -> Tensor:
    """The lower triangle of GGᵀ [m, m], in float64 whatever G has: rounding shows in small eigenvalues."""
    gram = gradients.new_zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(columns, dim=1):
        part = part.double()
        for i in range(0, len(part), rows):
            gram[i:, i : i + rows].addmm_(part[i:], part[i : i + rows].T)
    return gram


def effective_rank(gram: Tensor, number: int | None = None) -> float:
    """(tr F)² / tr F², estimated from the inner products ``gram`` = GGᵀ [m, m] of gradients drawn at random.

    F is the Fisher of ``number`` sequences, of which these m are a sample without replacement, or where it is None
    of the whole population they come from. tr F² is the mean of (gᵢᵀgⱼ)² over all pairs, and (tr F)² that of
    gᵢᵀgᵢ gⱼᵀgⱼ. The pairs i = j have the share 1/number, none in a population, and must not be given the share 1/m
    that they have in the sample. Both means are then without bias, and their quotient nearly so.

    Raises ValueError if there are less than two gradients, or more than ``number``.
    """
    m = len(gram)
    if m < 2 or (number is not None and number < m):
        raise ValueError(f"need 2 gradients or more, and no more than there are ({number}), not {m}")
    gram = gram.double()
    lengths, same = gram.diagonal(), 0.0 if number is None else 1 / number
    equal = lengths.square().sum()

    def mean(over_all_pairs: Tensor) -> Tensor:
        return same * equal / m + (1 - same) * (over_all_pairs - equal) / (m * (m - 1))

    return (mean(lengths.sum().square()) / mean(gram.square().sum())).item()
