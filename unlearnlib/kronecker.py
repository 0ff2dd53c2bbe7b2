"""Kronecker factors: curvature that is diagonal in a product basis, one matrix of weights at a time.

The gradient of a matrix of weights is a sum of outer products Σ_t l_t r_tᵀ, one a position: output gradient and
input. Three curvatures follow from how the two sides are treated:

    K-FAC     eigenbases of the second moments of l and of r, eigenvalues their products (Martens & Grosse 2015)
    EK-FAC    the same bases, eigenvalues the second moments of the gradients in them (George et al. 2018)
    diagonal  no bases, eigenvalues the second moments of the gradients

All approximate the true Fisher F = (1/m) Σ_i (1/T) E[s_i s_iᵀ] of m sequences with T predicted tokens each, where
s_i is the gradient of the *summed* loss of sequence i with labels drawn from the model: in expectation the
Gauss–Newton matrix of the mean loss L.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from unlearnlib.capture import Layer, capture, find_layers
from unlearnlib.curvature import check_damping, take
from unlearnlib.measures import log_probabilities
from unlearnlib.weights import Vector, parameters

CHUNK = 2**24
"""Most entries of sequences' own gradients held at once; those of a vocabulary are made in pieces."""


@dataclass(frozen=True)
class Block:
    """A matrix of weights [rows, columns] and its curvature, diagonal in a product of two orthonormal bases.

    A linear layer is [out, in], with its bias as one more column; a table or a head [vocabulary, width]; the
    weights and biases of a norm together are a single row. ``layers`` are those that use the matrix, two if it is
    tied. ``left`` [rows, rows] and ``right`` [columns, columns] have basis vectors as columns, None is the
    identity; ``eigenvalues`` are [rows, columns].
    """

    layers: tuple[Layer, ...]
    eigenvalues: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def matrix(self, v: Vector) -> Tensor:
        """The block's part of a vector, as a matrix."""
        layer, parts = self.layers[0], []
        if layer.weight:
            w = v[layer.weight]
            parts.append(w[None] if w.ndim == 1 else w.T if layer.transposed else w)
        for bias in self._biases():
            parts.append(v[bias][None] if layer.kind == "norm" else v[bias][:, None])
        return torch.cat(parts, dim=1)

    def vector(self, matrix: Tensor, like: Vector) -> Vector:
        """The inverse of :meth:`matrix`, with the shapes and number formats of ``like``."""
        layer, found = self.layers[0], {}
        if layer.weight:
            w = like[layer.weight]
            columns = w.numel() if w.ndim == 1 else w.shape[0 if layer.transposed else 1]
            part, matrix = matrix[:, :columns], matrix[:, columns:]
            found[layer.weight] = (part.T if layer.transposed else part).reshape(w.shape).to(w.dtype)
        for bias in self._biases():
            found[bias] = matrix.reshape(-1).to(like[bias].dtype)
        return found

    def apply(self, function: Callable[[Tensor], Tensor], v: Vector) -> Vector:
        """f(C) v for this block: rotate, multiply by f of the eigenvalues, rotate back."""
        m = self.matrix(v).to(self.eigenvalues.dtype)
        m = function(self.eigenvalues) * _rotate(m, self.left, self.right)
        left, right = (None if basis is None else basis.T for basis in (self.left, self.right))
        return self.vector(_rotate(m, left, right), v)

    def _biases(self) -> list[str]:
        return [layer.bias for layer in self.layers if layer.bias]


@dataclass(frozen=True)
class Kronecker:
    """A curvature (:class:`unlearnlib.curvature.Curvature`) of one :class:`Block` a matrix of weights."""

    blocks: list[Block]

    def matvec(self, v: Vector) -> Vector:
        """The product C v."""
        return self._apply(lambda eigenvalues: eigenvalues, v)

    def solve(self, v: Vector, damping: float) -> Vector:
        """(C + λI)⁻¹ v, damped in the eigenbasis."""
        return self.power(v, -1.0, damping)

    def power(self, v: Vector, exponent: float, damping: float) -> Vector:
        """(C + λI)^p v for any real p."""
        check_damping(damping)
        return self._apply(lambda eigenvalues: (eigenvalues + damping) ** exponent, v)

    def _apply(self, function: Callable[[Tensor], Tensor], v: Vector) -> Vector:
        found: Vector = {}
        for block in self.blocks:
            found |= block.apply(function, v)
        return {name: found[name] for name in v}


def kfac(model: PreTrainedModel, sequences: Tensor, number: int | None = None, seed: int = 0) -> Kronecker:
    """K-FAC from the first ``number`` sequences [n, tokens], or all; ``seed`` draws the labels. One pass.

    Memory does not grow with the number of sequences. Where a side has no full factor, its diagonal stands in:
    token frequencies for an embedding, the output side of a head (a vocabulary squared would be too much), both
    sides of a norm. A tied head and embedding adds the factors of both uses, in a common basis.

    Raises ValueError if there are fewer than ``number`` sequences, FloatingPointError naming a sequence whose
    predictions are not finite, NotImplementedError naming a layer that is of no known kind.
    """
    blocks, head = _blocks(model), model.get_output_embeddings()
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def receive(index: int, layer: Layer, left: Tensor, right: Tensor) -> None:
        if layer.kind == "embedding":  # the left side is one-hot, given by its row numbers
            l = torch.bincount(left.flatten(), minlength=len(blocks[index].eigenvalues)).to(right.dtype)
        else:
            l = _second_moment(left, full=layer.kind == "linear" and layer.module is not head)
        r = _second_moment(right, full=layer.kind != "norm")
        before = sums.get(layer.name, (0, 0))
        sums[layer.name] = before[0] + l, before[1] + r

    tokens = _sampled_pass(model, blocks, take(sequences, number), seed, receive)
    found = []
    for block in blocks:
        # Means over tokens; the gradient of a norm comes as one row a sequence, whose left side is 1.
        uses = [(sums[layer.name][0] / tokens, sums[layer.name][1] / tokens) for layer in block.layers]
        if block.layers[0].kind == "norm":
            uses = [(torch.ones_like(l), r) for l, r in uses]
        left = right = None
        if all(l.ndim == 2 for l, _ in uses):
            left = _eigenbasis(sum(l * _trace(r) for l, r in uses))
        if all(r.ndim == 2 for _, r in uses):
            right = _eigenbasis(sum(r * _trace(l) for l, r in uses))
        eigenvalues = sum(torch.outer(_diagonal_in(left, l), _diagonal_in(right, r)) for l, r in uses)
        found.append(replace(block, eigenvalues=eigenvalues, left=left, right=right))
    return Kronecker(found)


def ekfac(model: PreTrainedModel, sequences: Tensor, number: int | None = None, seed: int = 0) -> Kronecker:
    """EK-FAC: K-FAC's bases with the best eigenvalues for them, from a second pass. Raises as :func:`kfac`."""
    return second_moments(model, sequences, kfac(model, sequences, number, seed), number, seed)


def diagonal(model: PreTrainedModel, sequences: Tensor, number: int | None = None, seed: int = 0) -> Kronecker:
    """The diagonal of the Fisher, as the same thing without bases. Raises as :func:`kfac`."""
    return second_moments(model, sequences, Kronecker(_blocks(model)), number, seed)


def second_moments(
    model: PreTrainedModel, sequences: Tensor, basis: Kronecker, number: int | None = None, seed: int = 0
) -> Kronecker:
    """The curvature that is diagonal in the bases of ``basis`` and closest to the Fisher in Frobenius norm.

    Its eigenvalues are the second moments of whole sequences' gradients in the basis (George et al. 2018, theorem
    2), so they count what positions of a sequence have in common. Raises as :func:`kfac`.
    """
    blocks = [
        replace(block, left=old.left, right=old.right)
        for block, old in zip(_blocks(model), basis.blocks, strict=True)
    ]
    waiting: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks]

    def receive(index: int, layer: Layer, left: Tensor, right: Tensor) -> None:
        block = blocks[index]
        left = left if block.left is None else left @ block.left
        waiting[index].append((left, right if block.right is None else right @ block.right))
        if len(waiting[index]) == len(block.layers):  # both uses of a tied matrix make one gradient
            _add_squares(block.eigenvalues, waiting[index])
            waiting[index].clear()

    tokens = _sampled_pass(model, blocks, take(sequences, number), seed, receive)
    return Kronecker([replace(block, eigenvalues=block.eigenvalues / tokens) for block in blocks])


def _blocks(model: PreTrainedModel) -> list[Block]:
    """One block a matrix of trainable weights, with eigenvalues zero."""
    uses: dict[str, list[Layer]] = {}
    for layer in find_layers(model):
        uses.setdefault(layer.weight or layer.bias, []).append(layer)
    live = {name: p.detach() for name, p in parameters(model).items()}
    found = []
    for layers in uses.values():
        empty = Block(tuple(layers), torch.empty(0))
        shape = empty.matrix(live)
        dtype = torch.promote_types(shape.dtype, torch.float32)
        found.append(replace(empty, eigenvalues=torch.zeros_like(shape, dtype=dtype)))
    return found


def _sampled_pass(
    model: PreTrainedModel,
    blocks: list[Block],
    sequences: Tensor,
    seed: int,
    receive: Callable[[int, Layer, Tensor, Tensor], None],
    batch_size: int = 32,
) -> int:
    """One pass over the sequences with labels drawn from the model; returns the number of predicted tokens.

    ``receive`` gets the block's index, the layer, and the two sides of its gradient, [n, tokens, rows] and
    [n, tokens, columns]; the left side of an embedding is row numbers, int64 [n, tokens].
    """
    index = {layer.name: i for i, block in enumerate(blocks) for layer in block.layers}

    def hand_on(layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        i = index[layer.name]
        receive(i, layer, *_sides(layer, inputs, gradient, blocks[i].eigenvalues.shape[1]))

    # One number a token, drawn on the CPU: the same labels on every device and in batches of any size.
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(sequences), sequences.shape[1] - 1, 1, dtype=torch.float64, generator=generator)
    with capture(model, [layer for block in blocks for layer in block.layers], hand_on):
        for start in range(0, len(sequences), batch_size):
            log_p = log_probabilities(model, sequences[start : start + batch_size])
            broken = (~torch.isfinite(log_p.detach()).all(dim=(1, 2))).nonzero()
            if len(broken):
                raise FloatingPointError(
                    f"the predictions for sequence {start + int(broken[0])} are not finite: are the weights "
                    "damaged?"
                )
            labels = _draw(log_p.detach(), uniform[start : start + batch_size])
            (-log_p.gather(2, labels).sum()).backward()
    return uniform.numel()


def _draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Labels [n, tokens, 1] with log-probabilities ``log_p`` [n, tokens, vocabulary], from uniform numbers."""
    cumulative = log_p.double().exp().cumsum(2)
    return torch.searchsorted(cumulative, (1 - uniform.to(cumulative.device)) * cumulative[..., -1:])


def _sides(layer: Layer, inputs: Tensor, gradient: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Left and right side of each position's part of the gradient of the layer's block, which has ``columns``."""
    if layer.kind == "norm":  # one row of weights and biases: the sequence's whole gradient, at one position
        parts = [(gradient * inputs).sum(1, keepdim=True)] if layer.weight else []
        parts += [gradient.sum(1, keepdim=True)] if layer.bias else []
        right = torch.cat(parts, dim=2)
        return torch.ones_like(right[..., :1]), right
    if layer.kind == "embedding":
        if layer.module.padding_idx is not None:
            gradient = gradient * (inputs != layer.module.padding_idx)[..., None]
        return inputs, F.pad(gradient, (0, columns - gradient.shape[2]))
    parts = [inputs] if layer.weight else []
    parts += [torch.ones_like(inputs[..., :1])] if layer.bias else []
    right = torch.cat(parts, dim=2)
    return gradient, F.pad(right, (0, columns - right.shape[2]))


def _second_moment(side: Tensor, full: bool) -> Tensor:
    side = side.flatten(0, 1)
    return side.T @ side if full else side.square().sum(0)


def _add_squares(total: Tensor, uses: list[tuple[Tensor, Tensor]]) -> None:
    """Add the squares of every sequence's own gradient, summed over its positions and uses, to ``total``."""
    n, columns = len(uses[0][1]), total.shape[1]
    rows = max(1, CHUNK // (n * columns))
    for start in range(0, len(total), rows):
        part = total[start : start + rows]
        gradient = torch.zeros(n, *part.shape, dtype=total.dtype, device=total.device)
        for left, right in uses:
            if left.is_floating_point():
                gradient += left[..., start : start + rows].mT @ right
            else:
                sequence, position = ((left >= start) & (left < start + rows)).nonzero(as_tuple=True)
                where = (sequence, left[sequence, position] - start)
                gradient.index_put_(where, right[sequence, position].to(total.dtype), accumulate=True)
        part += gradient.square().sum(0)


def _rotate(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    matrix = matrix if left is None else left.T @ matrix
    return matrix if right is None else matrix @ right


def _eigenbasis(matrix: Tensor) -> Tensor:
    """Eigenvectors as columns, computed in float64: small eigenvalues drown in rounding otherwise."""
    return torch.linalg.eigh(matrix.double())[1].to(matrix.dtype).contiguous()


def _diagonal_in(basis: Tensor | None, moment: Tensor) -> Tensor:
    """The diagonal of a second moment, full [k, k] or itself a diagonal [k], in a basis."""
    if moment.ndim == 1:
        return moment
    if basis is None:
        return moment.diagonal()
    values = (basis.double() * (moment.double() @ basis.double())).sum(0)
    return values.clamp_min(0).to(moment.dtype)


def _trace(moment: Tensor) -> Tensor:
    return moment.trace() if moment.ndim == 2 else moment.sum()
