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
from torch.nn import functional as F
from transformers import PreTrainedModel

from unlearnlib.curvature.capture import Layer, capture, find_layers
from unlearnlib.curvature.protocol import check_damping, take
from unlearnlib.losses import logits
from unlearnlib.weights import Vector, parameters

Factors = dict[str, tuple[Tensor, Tensor]]
"""By layer E[l lᵀ] and E[r rᵀ]: a matrix [size, size], or where that is too much its diagonal [size].

So it is for words: of a head's E[l lᵀ] = E[diag p − p pᵀ] only the diagonal is kept, and what is dropped is the
covariance of any two words. Of a table's, which is one-hot on the left, nothing is dropped.
"""


@dataclass(frozen=True)
class Block:
    """A matrix of weights [rows, columns] and its curvature, diagonal in a product of two orthonormal bases.

    ``names`` are the parameters that it joins and ``layers`` those that use it, two if it is tied. A linear layer
    is [out, in] (``form`` "plain", or "transposed" if it is stored the other way), with its bias as one more
    column; a table or a head is [vocabulary, width]; weights and biases of a norm are a single "row".
    ``left`` [rows, rows] and ``right`` [columns, columns] have basis vectors as columns, None is the identity.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    form: str
    eigenvalues: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def matrix(self, v: Vector) -> Tensor:
        """The block's part of a vector, as a matrix."""
        parts = [v[name] for name in self.names]
        if self.form == "row":
            return torch.cat(parts)[None]
        turned = [part.T if self.form == "transposed" and part.ndim == 2 else part for part in parts]
        return torch.cat([part[:, None] if part.ndim == 1 else part for part in turned], dim=1)

    def vector(self, matrix: Tensor, like: Vector) -> Vector:
        """The inverse of :meth:`matrix`, with the shapes and number formats of ``like``."""
        parts = matrix.split([like[name].numel() // len(matrix) for name in self.names], dim=1)
        turned = [part.T if self.form == "transposed" else part for part in parts]
        pairs = zip(self.names, turned, strict=True)
        return {name: part.reshape(like[name].shape).to(like[name]) for name, part in pairs}

    def apply(self, function: Callable[[Tensor], Tensor], v: Vector) -> Vector:
        """f(C) v for this block: rotate into the bases, multiply by f of the eigenvalues, rotate back."""
        x = self.matrix(v).to(self.eigenvalues)
        x = x if self.left is None else self.left.T @ x
        x = x if self.right is None else x @ self.right
        x = function(self.eigenvalues) * x
        x = x if self.left is None else self.left @ x
        x = x if self.right is None else x @ self.right.T
        return self.vector(x, v)


@dataclass(frozen=True)
class Kronecker:
    """A curvature (:class:`unlearnlib.curvature.protocol.Curvature`) of one :class:`Block` a matrix of weights."""

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

    Memory does not grow with the number of sequences. Raises ValueError if there are fewer than ``number``
    sequences, FloatingPointError naming a sequence that makes something not finite, NotImplementedError naming a
    layer of no known kind, or a head whose output is not the logits.
    """
    return from_factors(model, layer_factors(model, sequences, number, seed))


def ekfac(model: PreTrainedModel, sequences: Tensor, number: int | None = None, seed: int = 0) -> Kronecker:
    """EK-FAC: K-FAC's bases with the best eigenvalues for them, from a second pass. Raises as :func:`kfac`."""
    return second_moments(model, sequences, kfac(model, sequences, number, seed), number, seed)


def diagonal(model: PreTrainedModel, sequences: Tensor, number: int | None = None, seed: int = 0) -> Kronecker:
    """The diagonal of the Fisher, as the same thing without bases. Raises as :func:`kfac`."""
    return second_moments(model, sequences, Kronecker(find_blocks(model)), number, seed)


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """One block a matrix of trainable weights, without bases and with eigenvalues 0.

    Raises NotImplementedError naming a layer of no known kind, or a bias shared by layers that share no weight.
    """
    users: dict[str, list[Layer]] = {}
    for layer in find_layers(model):
        users.setdefault(layer.weight or layer.bias, []).append(layer)
    live = {name: p.detach() for name, p in parameters(model).items()}
    blocks = []
    for layers in users.values():
        names = [layers[0].weight, *(layer.bias for layer in layers)]
        form = "row" if layers[0].kind == "norm" else "transposed" if layers[0].transposed else "plain"
        block = Block(tuple(filter(None, names)), tuple(layer.name for layer in layers), form, torch.empty(0))
        weights = block.matrix(live)
        precise = torch.promote_types(weights.dtype, torch.float32)
        blocks.append(replace(block, eigenvalues=torch.zeros_like(weights, dtype=precise)))
    found = [name for block in blocks for name in block.names]
    if len(found) > len(live):
        twice = next(name for name in found if found.count(name) > 1)
        raise NotImplementedError(f"{twice!r} belongs to several matrices: freeze it with requires_grad_(False)")
    return blocks


def layer_factors(model: PreTrainedModel, sequences: Tensor, number: int | None = None, seed: int = 0) -> Factors:
    """The Kronecker factors of every layer. Raises as :func:`kfac`."""
    head, sums = model.get_output_embeddings(), {}

    def receive(block: Block, layer: Layer, left: Tensor, right: Tensor) -> None:
        if layer.module is head:
            l = left.sum(dim=(0, 1))
        elif layer.kind == "embedding":
            l = torch.bincount(left.flatten(), minlength=len(block.eigenvalues)).to(right)
        else:
            l = _moment(left, full=layer.kind == "linear")
        new = (l, _moment(right, full=layer.kind != "norm"))
        sums[layer.name] = [a + b for a, b in zip(sums.get(layer.name, (0, 0)), new, strict=True)]

    chosen = take(sequences, number)
    blocks = find_blocks(model)
    _fisher_pass(model, chosen, blocks, seed, receive)
    tokens = chosen[:, 1:].numel()
    rows = {name for block in blocks if block.form == "row" for name in block.layers}
    # Means over tokens; but of a norm there is one term a sequence, and its left side is 1.
    return {name: (l / (len(chosen) if name in rows else tokens), r / tokens) for name, (l, r) in sums.items()}


def from_factors(model: PreTrainedModel, factors: Factors) -> Kronecker:
    """K-FAC's bases and eigenvalues, from decompositions of all factors in float64.

    A tied matrix has Σ L ⊗ R over its uses. The basis of either side is that of the sum of its factors, each
    weighted by the trace of its partner, and the eigenvalues are the diagonal of Σ L ⊗ R in the two bases.
    """
    blocks = []
    for block in find_blocks(model):
        uses = [factors[name] for name in block.layers]
        left = _eigenbasis([l for l, _ in uses], [_trace(r) for _, r in uses])
        right = _eigenbasis([r for _, r in uses], [_trace(l) for l, _ in uses])
        eigenvalues = sum(torch.outer(_diagonal_in(left, l), _diagonal_in(right, r)) for l, r in uses)
        blocks.append(replace(block, eigenvalues=eigenvalues, left=left, right=right))
    return Kronecker(blocks)


def second_moments(
    model: PreTrainedModel, sequences: Tensor, basis: Kronecker, number: int | None = None, seed: int = 0
) -> Kronecker:
    """The curvature that is diagonal in the bases of ``basis`` and closest to the Fisher in Frobenius norm.

    Its eigenvalues are the second moments of whole sequences' gradients in the bases (George et al. 2018), so they
    count what positions of a sequence have in common. Of a tied matrix, cross terms between its uses are left out,
    so there it is not quite the closest, and K-FAC can be closer. Raises as :func:`kfac`.
    """
    head = model.get_output_embeddings()
    sums = {block.names: torch.zeros_like(block.eigenvalues) for block in basis.blocks}

    def receive(block: Block, layer: Layer, left: Tensor, right: Tensor) -> None:
        total = sums[block.names]
        right = right if block.right is None else right @ block.right
        if layer.module is head:
            total += left.flatten(0, 1).T @ right.flatten(0, 1).square()
        elif layer.kind == "embedding":  # add up what a sequence says of the same row, and square only then
            sequence = torch.arange(len(left), device=left.device)[:, None]
            cells, cell = torch.unique(sequence * len(total) + left, return_inverse=True)
            gradients = right.new_zeros(len(cells), right.shape[2])
            gradients.index_add_(0, cell.flatten(), right.flatten(0, 1))
            total.index_add_(0, cells % len(total), gradients.square())
        else:
            left = left if block.left is None else left @ block.left
            for l, r in zip(left, right, strict=True):
                gradient = l.T @ r
                total.addcmul_(gradient, gradient)

    chosen = take(sequences, number)
    _fisher_pass(model, chosen, basis.blocks, seed, receive)
    tokens = chosen[:, 1:].numel()
    return Kronecker([replace(block, eigenvalues=sums[block.names] / tokens) for block in basis.blocks])


def _fisher_pass(
    model: PreTrainedModel,
    sequences: Tensor,
    blocks: list[Block],
    seed: int,
    receive: Callable[[Block, Layer, Tensor, Tensor], None],
    most_logits: int = 2**26,
) -> None:
    """Forward and backward over the sequences with labels drawn from the model.

    In batches of 32, or of fewer where these would have more than ``most_logits``, for several tensors of the
    logits' size are in memory at once.

    ``receive`` gets both sides of each layer's terms, [n, terms, rows] and [n, terms, columns]. The left side of
    an embedding is one-hot, and given by its row numbers, int64 [n, terms]. That of a head is p − e_y, and of it
    the *expected squares* over the labels y are given, p (1 − p): what is known needs no sampling. It matters for
    rare words, which are hardly ever drawn, and would seem to have no curvature at all.
    """
    head = model.get_output_embeddings()
    block_of = {name: block for block in blocks for name in block.layers}
    layers = [layer for layer in find_layers(model) if layer.name in block_of]

    def hand_on(layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        _check_finite(gradient, start, f"the gradients at {layer.name!r}")
        block = block_of[layer.name]
        left, right = _sides(block, layer, inputs, gradient.to(block.eigenvalues))
        if layer.module is head:
            if not torch.equal(gradient[0], delta[0]):
                raise NotImplementedError(f"the output of {layer.name!r} is not the logits: freeze its weights")
            left = torch.addcmul(p, p, p, value=-1).to(right)
        receive(block, layer, left, right)

    # One number a token, drawn on the CPU: the same labels on every device and in batches of any size.
    uniform = torch.rand(sequences[:, 1:].shape, generator=torch.Generator().manual_seed(seed))
    batch_size = max(1, min(32, most_logits // (uniform.shape[1] * len(head.weight))))
    with capture(model, layers, hand_on):
        for start in range(0, len(sequences), batch_size):
            z = logits(model, sequences[start : start + batch_size])
            _check_finite(z, start, "the predictions")
            p = z.detach().softmax(dim=2, dtype=torch.promote_types(z.dtype, torch.float32))
            labels = _draw(p, uniform[start : start + batch_size, :, None].to(p))
            delta = p.scatter_add(2, labels, -torch.ones_like(labels).to(p)).to(z)
            z.backward(delta)


def _draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Labels [n, tokens, 1] with the probabilities ``p`` [n, tokens, vocabulary], from numbers in [0, 1)."""
    cumulative = p.cumsum(dim=2)
    return torch.searchsorted(cumulative, (1 - uniform) * cumulative[..., -1:])


def _check_finite(x: Tensor, start: int, what: str) -> None:
    broken = ~x.detach().sum(dim=(1, 2), dtype=torch.float32).isfinite()
    if broken.any():
        sequence = start + int(broken.nonzero()[0])
        raise FloatingPointError(f"{what} are not finite for sequence {sequence}: are the weights damaged?")


def _sides(block: Block, layer: Layer, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of the terms of a layer's gradient; of a norm the one term is the whole sequence's gradient."""
    if layer.kind == "embedding":
        left, right = inputs, gradient
    elif layer.kind == "norm":
        parts = [gradient * inputs.to(gradient)] if layer.weight else []
        parts += [gradient] if layer.bias else []
        right = torch.cat(parts, dim=2).sum(dim=1, keepdim=True)
        left = torch.ones_like(right[..., :1])
    else:
        left, right = gradient, inputs.to(gradient) if layer.weight else inputs[..., :0].to(gradient)
        right = F.pad(right, (0, 1), value=1.0) if layer.bias else right
    missing = block.eigenvalues.shape[1] - right.shape[2]  # a tied table has no bias where its head has one
    return left, F.pad(right, (0, missing)) if missing else right


def _moment(side: Tensor, full: bool) -> Tensor:
    side = side.flatten(0, 1)
    return side.T @ side if full else side.square().sum(dim=0)


def _eigenbasis(moments: list[Tensor], weights: list[Tensor]) -> Tensor | None:
    if any(moment.ndim == 1 for moment in moments):
        return None
    total = sum(weight * moment for moment, weight in zip(moments, weights, strict=True))
    return torch.linalg.eigh(total.double())[1].to(total).contiguous()


def _diagonal_in(basis: Tensor | None, moment: Tensor) -> Tensor:
    """The diagonal of a moment in a basis."""
    if moment.ndim == 1:
        return moment
    if basis is None:
        return moment.diagonal()
    values = (basis.double() * (moment.double() @ basis.double())).sum(dim=0)
    return values.clamp(min=0).to(moment)


def _trace(moment: Tensor) -> Tensor:
    return moment.trace() if moment.ndim == 2 else moment.sum()
