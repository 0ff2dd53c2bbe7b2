"""The exact Gauss–Newton matrix of each matrix of weights by itself, or of all of them, by a few steps of CG.

K-FAC approximates twice: terms between matrices of weights are dropped, and what is left of each is taken for a
Kronecker product. Here the first is done and the second is not, so that what either costs can be told apart. With
all the weights in one block nothing is dropped at all.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.kronecker_blocks import find_blocks
from unlearnlib.curvature.krylov import NegativeCurvature
from unlearnlib.curvature.newton import GaussNewton
from unlearnlib.curvature.protocol import Curvature, check_damping
from unlearnlib.weights import Vector, add, dot, parameters

Names = tuple[str, ...]
"""The parameters of one block."""


@dataclass(frozen=True)
class Iterate:
    """``x`` after so many steps, and by block the relative residual ‖v − (C + λI) x‖ / ‖v‖ there."""

    x: Vector
    residuals: dict[Names, float]


class BlockGaussNewton(GaussNewton):
    """The Gauss–Newton matrix of the mean loss over ``sequences`` [m, tokens] without its terms between blocks.

    ``blocks`` parts the parameters; it is one block a matrix of weights, with its bias, where it is None: the same
    blocks that K-FAC has. :meth:`solve` takes ``steps`` steps of conjugate gradients in each block, whether or not
    that is enough, so that the number of steps is a setting like λ; ``preconditioner`` is a curvature without
    terms between the blocks, such as K-FAC of the same sequences. A step takes one product of each block, and each
    of these at most a plain pass over the sequences: its change of the outputs has to be found by itself.

    Raises ValueError if the blocks do not hold every trainable parameter once, or for less than one step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        blocks: Sequence[Names] | None = None,
        steps: int = 8,
        preconditioner: Curvature | None = None,
    ) -> None:
        super().__init__(model, sequences)
        self.blocks = [block.names for block in find_blocks(self.model)] if blocks is None else list(blocks)
        self.steps, self.preconditioner = steps, preconditioner
        if sorted(name for block in self.blocks for name in block) != sorted(parameters(model)):
            raise ValueError("the blocks must hold every trainable parameter of the model once")
        if steps < 1:
            raise ValueError(f"cannot solve in {steps} steps: take at least 1")

    def batch_product(self, batch: Tensor, v: Vector) -> tuple[Tensor, ...]:
        """The products of all blocks with their parts of v: one graph, but a J v and a Jᵀ for each."""
        live = parameters(self.model)
        z = self.outputs(self.model, batch)
        top = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.output_loss(top, batch).sum(), top, create_graph=True)
        product: Vector = {}
        for names in self.blocks:
            change = self.output_change(batch, {name: v[name] for name in names})
            (bent,) = torch.autograd.grad(slope, top, grad_outputs=change, retain_graph=True)
            parts = torch.autograd.grad(z, [live[name] for name in names], grad_outputs=bent, retain_graph=True)
            product |= dict(zip(names, parts, strict=True))
        return tuple(product[name] for name in live)

    def solve(self, v: Vector, damping: float) -> Vector:
        """The last of :meth:`iterates`: (C + λI)⁻¹ v as far as ``steps`` steps lead."""
        *_, last = self.iterates(v, damping)
        return last.x

    def iterates(self, v: Vector, damping: float) -> Iterator[Iterate]:
        """Conjugate gradients on (C + λI) x = v in all blocks at once, each with step lengths of its own.

        A block is left alone once its residual is down to rounding, or if its part of v is zero. Raises
        NegativeCurvature if rounding has made a block indefinite: λ is too small for the number format.
        """
        check_damping(damping)
        x, r = {name: torch.zeros_like(value) for name, value in v.items()}, dict(v)
        z = self._precondition(r, damping)
        p, rz, lengths = z, self._dots(r, z), self._dots(r, r)
        residuals = {names: float(length > 0) for names, length in lengths.items()}
        rounding = 100 * torch.finfo(next(iter(v.values())).dtype).eps
        for _ in range(self.steps):
            q = add(self.matvec(p), p, damping)
            curvatures = self._dots(p, q)
            open_blocks = [names for names, residual in residuals.items() if residual > rounding]
            for names in open_blocks:
                if not curvatures[names] > 0:
                    raise NegativeCurvature(
                        f"the block of {names[0]!r} is not positive definite: raise the damping"
                    )
                step = rz[names] / curvatures[names]
                x |= {name: x[name] + step * p[name] for name in names}
                r |= {name: r[name] - step * q[name] for name in names}
            z, before = self._precondition(r, damping), rz
            rz, left = self._dots(r, z), self._dots(r, r)
            for names in open_blocks:
                p |= {name: z[name] + rz[names] / before[names] * p[name] for name in names}
                residuals[names] = math.sqrt(left[names] / lengths[names])
            yield Iterate(dict(x), dict(residuals))

    def _precondition(self, r: Vector, damping: float) -> Vector:
        return dict(r) if self.preconditioner is None else self.preconditioner.solve(r, damping)

    def _dots(self, a: Vector, b: Vector) -> dict[Names, float]:
        dots = [dot({name: a[name] for name in names}, {name: b[name] for name in names}) for names in self.blocks]
        return dict(zip(self.blocks, torch.stack(dots).tolist(), strict=True))
