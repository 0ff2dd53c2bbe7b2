"""Matrices of weights with a curvature each, diagonal in a product of two bases: what Kronecker factors end in."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.curvature.capture import Layer, find_layers
from unlearnlib.weights import Vector, parameters


@dataclass(frozen=True)
class Block:
    """A matrix of weights [rows, columns] and its curvature, diagonal in a product of two orthonormal bases.

    ``names`` are the parameters that it joins and ``layers`` those that use it, two if it is tied. A linear layer
    is [out, in] (``form`` "plain", or "transposed" if it is stored the other way), with its bias as one more
    column; a table or a head is [vocabulary, width]; weights and biases of a norm are a single "row".
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
    def mine(self) -> bool:
        """Whether this process owns the block."""
        return self.owner == distributed.rank()

    def to(self, device: torch.device | str) -> "Block":
        """The block with what it has on another device."""
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
    shapes = {name: torch.empty_like(p, device="meta") for name, p in parameters(model).items()}
    blocks, sizes, head = [], [], model.get_output_embeddings()
    for layers in users.values():
        names = [layers[0].weight, *(layer.bias for layer in layers)]
        form = "row" if layers[0].kind == "norm" else "transposed" if layers[0].transposed else "plain"
        block = Block(tuple(filter(None, names)), tuple(layer.name for layer in layers), form, torch.empty(0))
        weights = block.matrix(shapes)
        precise = torch.promote_types(weights.dtype, torch.float32)
        blocks.append(replace(block, eigenvalues=torch.empty_like(weights, dtype=precise)))
        sides = zip(weights.shape, whole_sides(layers[0], head), strict=True)
        sizes.append(weights.numel() + sum(side**2 for side, whole in sides if whole))
    used = [name for block in blocks for name in block.names]
    if len(used) > len(shapes):
        twice = next(name for name in used if used.count(name) > 1)
        raise NotImplementedError(f"{twice!r} belongs to several matrices: freeze it with requires_grad_(False)")
    owners = assign_owners(sizes, distributed.size())
    return [replace(block, owner=owner) for block, owner in zip(blocks, owners, strict=True)]


def assign_owners(sizes: list[int], number: int) -> list[int]:
    """Which of ``number`` processes gets each thing, so that the most that one gets is little.

    The largest first, always to whoever has least: at most 4/3 − 1/(3 · number) of the best possible (Graham 1969).
    """
    held, owners = [0] * number, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = held.index(min(held))
        held[owners[i]] += sizes[i]
    return owners


def whole_sides(layer: Layer, head: nn.Module) -> tuple[bool, bool]:
    """Whether a layer's left and right factors are whole matrices, or of what would be too much their diagonals.

    ``head`` is the output layer: its left side has the size of the vocabulary, as a table's has.
    """
    return layer.kind == "linear" and layer.module is not head, layer.kind != "norm"
