"""Blocks of the Fisher matrix, inverted by the recursion of WoodFisher (Singh & Alistarh 2020).

F = (1/m) Σ gᵢ gᵢᵀ = GᵀG/m over m sequences, where gᵢ, row i of G [m, d], is the gradient of sequence i's own loss.
Columns of G are in the order of :func:`unlearnlib.weights.flatten`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unlearnlib import distributed
from unlearnlib.curvature.protocol import check_damping
from unlearnlib.weights import Vector, flatten, unflatten


class FisherRecursion:
    """Fisher blocks inverted by the recursion of WoodFisher (Singh & Alistarh 2020), ``at_once`` gradients a step.

    ``gradients`` is G [m, d]. Of F only the diagonal blocks of ``block_size`` neighbouring weights are kept, the
    last of which may be smaller; ``block_size >= d`` keeps all of F. The recursion starts from I/λ, so each λ
    runs it afresh, in O(m d block_size) time; the inverse of the last λ is kept, d · block_size numbers. One
    gradient a step is WoodFisher's; several give the same inverse, several times as fast (:func:`woodbury`).
    Smaller blocks than a step has gradients take one at a time, which is faster for them. Several processes divide
    the blocks among them.

    Raises ValueError for a block of less than one weight, or a step of less than one gradient.
    """

    def __init__(self, gradients: Tensor, block_size: int, at_once: int = 1) -> None:
        if block_size < 1:
            raise ValueError(f"the block size must be at least 1, not {block_size}")
        if at_once < 1:
            raise ValueError(f"a step must take at least 1 gradient, not {at_once}")
        self.d = gradients.shape[1]
        size = min(block_size, self.d)
        # Zeros after the last weight: they couple to nothing, so a last block that is shorter stays exact.
        padded = torch.nn.functional.pad(gradients, (0, -self.d % size))
        self.number = padded.shape[1] // size
        columns = [slice(some.start * size, some.stop * size) for some in distributed.shares(self.number)]
        padded = distributed.rows_to_columns(padded, columns)
        self.blocks = padded.view(len(padded), -1, size).transpose(0, 1)
        self.at_once = at_once
        self._inverse: tuple[float, Tensor] | None = None

    def matvec(self, v: Vector) -> Vector:
        """F v, block by block."""
        return self._apply(lambda rows: self.blocks.mT @ (self.blocks @ rows) / self.blocks.shape[1], v)

    def solve(self, v: Vector, damping: float) -> Vector:
        """(F + λI)⁻¹ v, with the recursion's inverse."""
        return self._apply(lambda rows: self.inverse(damping) @ rows, v)

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(F + λI)^p v. The recursion gives the inverse alone, so this takes each block's eigendecomposition."""
        check_damping(damping)
        s, u = torch.linalg.eigh(self.blocks.mT @ self.blocks / self.blocks.shape[1])
        powers = (s.clamp(min=0) + damping).pow(exponent)
        return self._apply(lambda rows: u @ (powers[..., None] * (u.mT @ rows)), v)

    def inverse(self, damping: float) -> Tensor:
        """The blocks of (F + λI)⁻¹ that are this process's, shape [blocks, size, size]."""
        check_damping(damping)
        if self._inverse is None or self._inverse[0] != damping:
            number, _, size = self.blocks.shape
            inverse = self.blocks.new_empty(number, size, size)
            together = blocks_at_once(size, inverse.device)
            for result, part in zip(inverse.split(together), self.blocks.split(together), strict=True):
                one_by_one = self.at_once == 1 or size < self.at_once
                inverted = sherman_morrison(part, damping) if one_by_one else woodbury(part, damping, self.at_once)
                result.copy_(inverted)
            self._inverse = damping, inverse
        return self._inverse[1]

    def _apply(self, function: Callable[[Tensor], Tensor], v: Vector) -> Vector:
        row = torch.nn.functional.pad(flatten(v), (0, -self.d % self.blocks.shape[2]))
        mine = row.view(self.number, -1, 1)[distributed.share(self.number)]
        return unflatten(distributed.joined(function(mine), self.number).reshape(-1)[: self.d], v)


def blocks_at_once(size: int, device: torch.device | str) -> int:
    """How many blocks of ``size`` weights are inverted together: as many as fit in a processor's cache, or one.

    A GPU's cache is larger, and so it should be: each of the m steps is started anew, and with few blocks the
    GPU would wait for that.
    """
    entries = 2**23 if torch.device(device).type == "cuda" else 2**18
    return max(1, entries // size**2)


def sherman_morrison(blocks: Tensor, damping: float) -> Tensor:
    """(BᵀB/m + λI)⁻¹ of each of ``blocks`` B [blocks, m, size], by m updates of rank one."""
    number, m, size = blocks.shape
    inverse = torch.eye(size, dtype=blocks.dtype, device=blocks.device).div(damping).repeat(number, 1, 1)
    for g in blocks.transpose(0, 1)[..., None].contiguous():
        column = inverse @ g
        column = column / (m + g.mT @ column).sqrt()
        inverse.baddbmm_(column, column.mT, alpha=-1)
    return inverse


def woodbury(blocks: Tensor, damping: float, at_once: int) -> Tensor:
    """The matrices of :func:`sherman_morrison`, by updates of rank ``at_once``.

    With rows G [at_once, size] of B, (A + GᵀG/m)⁻¹ = A⁻¹ − A⁻¹Gᵀ(mI + GA⁻¹Gᵀ)⁻¹GA⁻¹ (Woodbury 1950), which for one
    row is Sherman and Morrison's identity. Products of matrices use a number often for each time it is fetched.
    Raises FloatingPointError where λ is too small for the precision of the numbers.
    """
    number, m, size = blocks.shape
    inverse = torch.eye(size, dtype=blocks.dtype, device=blocks.device).div(damping).repeat(number, 1, 1)
    for g in blocks.split(at_once, dim=1):
        columns = inverse @ g.mT
        inner = g @ columns
        inner.diagonal(dim1=1, dim2=2).add_(m)
        root, failed = torch.linalg.cholesky_ex(inner)
        if failed.any():
            raise FloatingPointError(
                f"λ = {damping:g} is too small for numbers of {blocks.dtype}: take a larger one"
            )
        columns = torch.linalg.solve_triangular(root.mT, columns, upper=True, left=False)
        inverse.baddbmm_(columns, columns.mT, alpha=-1)
    return inverse


def unrolled_recursion(gradients: Tensor, v: Tensor, damping: float) -> Tensor:
    """(F + λI)⁻¹ v by the same recursion for all of F, without a matrix of d × d.

    Each update is kept as its vector, m in all, and applied to whatever is multiplied next: O(m² d) time.
    ``gradients`` is G [m, d], ``v`` [d].
    """
    check_damping(damping)
    m = len(gradients)
    columns = torch.empty_like(gradients)
    for i, g in enumerate(gradients):
        column = g / damping - (columns[:i] @ g) @ columns[:i]
        columns[i] = column / (m + g @ column).sqrt()
    return v / damping - (columns @ v) @ columns
