"""Matrices of weights with a curvature each, diagonal in a product of two bases: what Kronecker factors end in."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.curvature.capture import Layer, find_layers
from unlearnlib.weights import Vector, parameters


@dataclass(frozen=True)
class Block:
    """A matrix of weights [rows, columns] and its curvature, diagonal in a product of two orthonormal bases.

    ``names`` are the parameters that it joins and ``layers`` those that use it, two if it is tied. A linear layer
    is [out, in] (``form`` "plain", or "transposed" if it is stored the other way), with its bias as one more
    column; a "table" or a head is [vocabulary, width]; weights and biases of a norm are a single "row".
    ``left`` [rows, rows] and ``right`` [columns, columns] have basis vectors as columns, None is the identity.
    Of several processes the ``owner`` has all this, the others the shape of the eigenvalues only.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    form: str
    eigenvalues: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    owner: int = 0

    @property
    def whole(self) -> tuple[bool, bool]:
        """Whether left and right factor are whole matrices, or of what would be too much their diagonals."""
        return self.form in ("plain", "transposed"), self.form != "row"

    @property
    def factor_bytes(self) -> int:
        """What the factors of all its uses take."""
        sides = zip(self.eigenvalues.shape, self.whole, strict=True)
        numbers = len(self.layers) * sum(side**2 if whole else side for side, whole in sides)
        return numbers * self.eigenvalues.element_size()

    @property
    def mine(self) -> bool:
        """Whether this process owns the block."""
        return self.owner == distributed.rank()

    def to(self, device: torch.device | str) -> "Block":
        """The block with what it has on another device; shapes alone stay as they are."""
        if self.eigenvalues.is_meta:
            return self
        left, right = (side if side is None else side.to(device) for side in (self.left, self.right))
        return replace(self, eigenvalues=self.eigenvalues.to(device), left=left, right=right)

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

    def coordinates(self, v: Vector) -> Tensor:
        """The block's part of a vector in the two bases, [rows, columns] as its ``eigenvalues`` are."""
        x = self.matrix(v).to(self.eigenvalues)
        x = x if self.left is None else self.left.T @ x
        return x if self.right is None else x @ self.right

    def apply(self, function: Callable[[Tensor], Tensor], v: Vector) -> Vector:
        """f(C) v for this block: rotate into the bases, multiply by f of the eigenvalues, rotate back."""
        x = function(self.eigenvalues) * self.coordinates(v)
        x = x if self.left is None else self.left @ x
        x = x if self.right is None else x @ self.right.T
        return self.vector(x, v)


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """One block a matrix of trainable weights, without bases, and of eigenvalues their shape and format only.

    Several processes own a share each (:func:`assign_owners`).
    Raises NotImplementedError naming a layer of no known kind, or a bias shared by layers that share no weight.
    """
    users: dict[str, list[Layer]] = {}
    for layer in find_layers(model):
        users.setdefault(layer.weight or layer.bias, []).append(layer)
    live, head, blocks = parameters(model), model.get_output_embeddings(), []
    shapes = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in live.items()}
    for layers in users.values():
        names, first = [layers[0].weight, *(layer.bias for layer in layers)], layers[0]
        form = "row" if first.kind == "norm" else "transposed" if first.transposed else "plain"
        if first.kind == "embedding" or first.module is head:
            form = "table"
        block = Block(tuple(filter(None, names)), tuple(layer.name for layer in layers), form, torch.empty(0))
        weights = block.matrix(shapes)
        precise = torch.promote_types(weights.dtype, torch.float32)
        blocks.append(replace(block, eigenvalues=torch.empty_like(weights, dtype=precise)))
    used = [name for block in blocks for name in block.names]
    if len(used) > len(shapes):
        twice = next(name for name in used if used.count(name) > 1)
        raise NotImplementedError(f"{twice!r} belongs to several matrices: freeze it with requires_grad_(False)")
    owners = assign_owners([block.factor_bytes + block.eigenvalues.nbytes for block in blocks], distributed.size())
    return [replace(block, owner=owner) for block, owner in zip(blocks, owners, strict=True)]


def assign_owners(sizes: list[int], number: int) -> list[int]:
    """Which of ``number`` processes gets each thing, so that the most that one gets is little.

    The largest first, always to whoever has least: no more than 4/3 of the least possible (Graham 1969).
    """
    held, owners = [0] * number, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = held.index(min(held))
        held[owners[i]] += sizes[i]
    return owners
