"""Kronecker factors: curvature that is diagonal in a product basis, one matrix of weights at a time.

The gradient of a matrix of weights is a sum of terms l rᵀ, one a position: output gradient and input. Three
curvatures follow from how the two sides are treated:

    K-FAC     eigenbases of E[l lᵀ] and of E[r rᵀ], eigenvalues their products (Martens & Grosse 2015)
    EK-FAC    the same bases, eigenvalues the second moments of the gradients in them (George et al. 2018)
    diagonal  no bases, eigenvalues the second moments of the gradients

All approximate the true Fisher F = (1/m) Σ_i (1/T) E[s_i s_iᵀ] of m sequences with T predicted tokens each, where
s_i is the gradient of the *summed* loss of sequence i with labels drawn from the model: in expectation the
Gauss–Newton matrix of the mean loss L. K-FAC assumes that l lᵀ and r rᵀ of a position drawn at random are
uncorrelated: not only independent at each position, but all positions alike (Grosse & Martens 2016).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.curvature.capture import Layer
from unlearnlib.curvature.fisher_pass import receive_terms
from unlearnlib.curvature.kronecker_blocks import Block, find_blocks
from unlearnlib.curvature.protocol import check_damping, in_full_precision, take
from unlearnlib.weights import Vector

Factors = dict[str, tuple[Tensor, Tensor]]
"""By layer E[l lᵀ] and E[r rᵀ]: a matrix [size, size], or where that is too much its diagonal [size].

So it is for words: of a head's E[l lᵀ] = E[diag p − p pᵀ] only the diagonal is kept, and what is dropped is the
covariance of any two words. Of a table's, which is one-hot on the left, nothing is dropped.
"""


@dataclass(frozen=True)
class Kronecker:
    """A curvature (:class:`unlearnlib.curvature.protocol.Curvature`) of one :class:`Block` a matrix of weights.

    Blocks may be kept where there is more room than on the device of the vectors, to which each is brought in its
    turn. Of several processes each applies its own blocks, and tells the others what it got.
    """

    blocks: list[Block]

    def matvec(self, v: Vector) -> Vector:
        """The product C v."""
        return self._apply(lambda eigenvalues: eigenvalues, v)

    def solve(self, v: Vector, damping: float) -> Vector:
        """(C + λI)⁻¹ v, damped in the eigenbasis."""
        return self.power(v, -1.0, damping)

    @in_full_precision
    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(C + λI)^p v for any real p."""
        check_damping(damping)
        return self._apply(lambda eigenvalues: (eigenvalues + damping) ** exponent, v)

    def _apply(self, function: Callable[[Tensor], Tensor], v: Vector) -> Vector:
        parts: Vector = {}
        for block in self.blocks:
            given = {name: distributed.whole(v[name]) for name in block.names}
            parts |= given if block.mine else {}
        for block in self.blocks:
            if block.mine:
                parts |= block.to(v[block.names[0]].device).apply(function, parts)
        for block in self.blocks:
            for name in block.names:
                like = v[name]
                if block.mine:
                    part = parts[name].contiguous()
                else:
                    part = torch.empty(like.shape, dtype=like.dtype, device=like.device)
                distributed.copy_from(part, block.owner)
                parts[name] = distributed.divided_like(part, like)
        return {name: parts[name] for name in v}


def kfac(model: PreTrainedModel, sequences: Tensor, number: int | None = None, seed: int = 0) -> Kronecker:
    """K-FAC from the first ``number`` sequences [n, tokens], or all; ``seed`` draws the labels. One pass.

    Memory does not grow with the number of sequences. Raises ValueError if there are fewer than ``number``
    sequences, FloatingPointError naming a sequence that makes something not finite, NotImplementedError naming a
    layer of no known kind, or a head whose output is not the logits.
    """
    return from_factors(model, layer_factors(model, sequences, number, seed))


def ekfac(model: PreTrainedModel, sequences: Tensor, number: int | None = None, seed: int = 0) -> Kronecker:
    """EK-FAC: K-FAC's bases with the best eigenvalues for them, from a second pass. Raises as :func:`kfac`."""
    return second_moments(model, sequences, kfac(model, sequences, number, seed), number, seed)


def diagonal_fisher(
    model: PreTrainedModel, sequences: Tensor, number: int | None = None, seed: int = 0
) -> Kronecker:
    """The diagonal of the Fisher, as the same thing without bases. Raises as :func:`kfac`."""
    return second_moments(model, sequences, Kronecker(find_blocks(model)), number, seed)


def layer_factors(
    model: PreTrainedModel,
    sequences: Tensor,
    number: int | None = None,
    seed: int = 0,
    blocks: list[Block] | None = None,
) -> Factors:
    """The Kronecker factors of every layer, or of the layers of ``blocks`` only.

    Several processes take a share of the sequences each, and get the factors of their own blocks, and of the
    others' the shapes (on the ``meta`` device). Raises as :func:`kfac`.
    """
    blocks = find_blocks(model) if blocks is None else blocks
    head, sums = model.get_output_embeddings(), {}
    for block in blocks:
        sides = zip(block.eigenvalues.shape, block.whole, strict=True)
        shapes = [(side, side) if whole else (side,) for side, whole in sides]
        for name in block.layers:
            sums[name] = [torch.zeros(s, dtype=block.eigenvalues.dtype, device=model.device) for s in shapes]

    def receive(block: Block, layer: Layer, left: Tensor, right: Tensor) -> None:
        l, r = sums[layer.name]
        if layer.module is head:
            l += left.sum(dim=(0, 1))
        elif layer.kind == "embedding":
            l.index_add_(0, left.flatten(), right.new_ones(left.numel()))
        else:
            add_moment(l, left)
        add_moment(r, right)

    chosen = take(sequences, number)
    receive_terms(model, chosen, blocks, seed, receive)
    tokens = chosen[:, 1:].numel()
    factors = {}
    for block in blocks:
        # Means over tokens; but of a norm there is one term a sequence, and its left side is 1.
        terms = len(chosen) if block.form == "row" else tokens
        for name in block.layers:
            l, r = sums.pop(name)
            for side in (l, r):
                distributed.sum_to(side, block.owner)
            l, r = (l.div_(terms), r.div_(tokens)) if block.mine else (l.to("meta"), r.to("meta"))
            factors[name] = l, r
    return factors


def from_factors(model: PreTrainedModel, factors: Factors, blocks: list[Block] | None = None) -> Kronecker:
    """K-FAC's bases and eigenvalues, from decompositions of all factors.

    A tied matrix has Σ L ⊗ R over its uses. The basis of either side is that of the sum of its factors, each
    weighted by the trace of its partner, and the eigenvalues are the diagonal of Σ L ⊗ R in the two bases.
    Of ``blocks`` only, where they are given.
    """
    built = []
    for block in find_blocks(model) if blocks is None else blocks:
        uses = [factors[name] for name in block.layers]
        left, ls = _decompose([l for l, _ in uses], [_trace(r) for _, r in uses])
        right, rs = _decompose([r for _, r in uses], [_trace(l) for l, _ in uses])
        eigenvalues = sum(torch.outer(l, r) for l, r in zip(ls, rs, strict=True))
        built.append(replace(block, eigenvalues=eigenvalues, left=left, right=right))
    return Kronecker(built)


def second_moments(
    model: PreTrainedModel, sequences: Tensor, basis: Kronecker, number: int | None = None, seed: int = 0
) -> Kronecker:
    """The curvature that is diagonal in the bases of ``basis`` and closest to the Fisher in Frobenius norm.

    Its eigenvalues are the second moments of whole sequences' gradients in the bases (George et al. 2018), so they
    count what positions of a sequence have in common. Of a tied matrix, cross terms between its uses are left out,
    so there it is not quite the closest, and K-FAC can be closer. Raises as :func:`kfac`.
    """
    head = model.get_output_embeddings()
    blocks = [_everywhere(block, model.device) for block in basis.blocks]
    sums = {b.names: torch.zeros_like(b.eigenvalues, device=model.device) for b in blocks}

    def receive(block: Block, layer: Layer, left: Tensor, right: Tensor) -> None:
        total = sums[block.names]
        right = right if block.right is None else right @ block.right
        if layer.module is head:
            total += left.flatten(0, 1).T @ right.flatten(0, 1).square()
        elif layer.kind == "embedding":  # add up what a sequence says of the same row, and square only then
            sequence = torch.arange(len(left), device=left.device)[:, None]
            cells, order = (sequence * len(total) + left).flatten().sort(stable=True)
            cell = (cells[1:] != cells[:-1]).cumsum(0)  # neighbours that are the same have the same number
            cell = torch.nn.functional.pad(cell, (1, 0))
            gradients = torch.zeros_like(right).flatten(0, 1)
            gradients.index_add_(0, cell, right.flatten(0, 1)[order])
            rows = torch.zeros_like(cells).index_copy_(0, cell, cells % len(total))
            total.index_add_(0, rows, gradients.square_())
        else:
            left = left if block.left is None else left @ block.left
            for l, r in zip(left, right, strict=True):
                gradient = l.T @ r
                total.addcmul_(gradient, gradient)

    chosen = take(sequences, number)
    receive_terms(model, chosen, blocks, seed, receive)
    tokens, found = chosen[:, 1:].numel(), []
    for block in basis.blocks:
        total = sums.pop(block.names)
        distributed.sum_to(total, block.owner)
        found.append(replace(block, eigenvalues=total.div_(tokens)) if block.mine else block)
    return Kronecker(found)


def build_group(
    model: PreTrainedModel,
    sequences: Tensor,
    group: list[Block],
    seed: int,
    corrected: bool,
    keep: Callable[[Block], Block],
) -> list[Block]:
    """K-FAC's blocks of one group of matrices, or EK-FAC's if ``corrected``; ``keep`` puts each where it stays.

    The factors of the group are all in memory at once; of what is built from them, K-FAC's one block at a time.
    ``group`` are some of :func:`find_blocks`. Raises as :func:`kfac`.
    """
    factors, built = layer_factors(model, sequences, seed=seed, blocks=group), []
    for block in group:
        [found] = from_factors(model, {name: factors.pop(name) for name in block.layers}, [block]).blocks
        built.append(found if corrected else keep(found))
        del found
    if not corrected:
        return built
    return [keep(block) for block in second_moments(model, sequences, Kronecker(built), seed=seed).blocks]


def add_moment(total: Tensor, side: Tensor) -> None:
    """Add Σ x xᵀ over all terms x of one side [n, terms, size] to ``total``, or if that is a row its diagonal."""
    side = side.flatten(0, 1)
    if total.ndim == 2:
        total.addmm_(side.T, side)
    else:
        total += side.square().sum(dim=0)


def _everywhere(block: Block, device: torch.device) -> Block:
    """The block with its owner's bases on ``device``, in every process."""

    def copy(side: Tensor | None) -> Tensor | None:
        if side is not None:
            side = side.to(device) if block.mine else torch.empty_like(side, device=device)
            distributed.copy_from(side, block.owner)
        return side

    return replace(block, left=copy(block.left), right=copy(block.right))


def _decompose(moments: list[Tensor], weights: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """The basis in which the weighted sum of the moments is diagonal, and the diagonal of each moment in it.

    None for a basis where one of them is known by its diagonal alone. A moment that is alone needs no weight.

    The eigensolver works in float64, whatever format the moments have and the results get. Its basis diagonalises
    M + E with ‖E‖₂ ≤ c(n) ε ‖M‖₂, where E knows no small eigenvalues from large ones (Golub & Van Loan 2013,
    section 8.3), so that a solution x of (M + λI) x = v has an error of up to ‖E‖₂ ‖x‖/λ, whatever v is. With
    ε = 6e-8, that of float32, it was 1e-4 ‖x‖ at λ = 1e-6 λ₁, λ₁ the largest eigenvalue of C, with factors and
    gradients of a small trained model, and 8e-4 ‖x‖ of SmolLM2-135M. Nothing else needs float64: entries of a
    basis that are rounded to float32 change x by no more than ε (‖x‖ + ‖v‖/λ), to first order, which was 1e-6 ‖x‖
    there, and the eigenvalues of a moment come with its basis. Those of a sum over two uses are products, and
    must be in float64: rounding would add ε ‖M‖₂ to the smallest.
    """
    if any(moment.ndim == 1 for moment in moments):
        return None, [moment if moment.ndim == 1 else moment.diagonal() for moment in moments]
    [first, *others] = precise = [moment.double() for moment in moments]
    total = sum(weight * moment for moment, weight in zip(precise, weights, strict=True)) if others else first
    values, basis = torch.linalg.eigh(total)
    diagonals = [(basis * (moment @ basis)).sum(dim=0) for moment in precise] if others else [values]
    return basis.to(moments[0]).contiguous(), [x.clamp(min=0).to(moments[0]) for x in diagonals]


def _trace(moment: Tensor) -> Tensor:
    return moment.trace() if moment.ndim == 2 else moment.sum()
