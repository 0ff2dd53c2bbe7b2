"""Matrices of weights with a curvature each, diagonal in a product of two bases: what Kronecker factors end in."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.capture import Layer, find_layers
from unlearnlib.weights import Vector, divided_like, parameters, whole


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
        parts = [whole(v[name]) for name in self.names]
        if self.form == "row":
            return torch.cat(parts)[None]
        turned = [part.T if self.form == "transposed" and part.ndim == 2 else part for part in parts]
        return torch.cat([part[:, None] if part.ndim == 1 else part for part in turned], dim=1)

    def vector(self, matrix: Tensor, like: Vector) -> Vector:
        """The inverse of :meth:`matrix`, with the shapes and number formats of ``like``."""
        parts = matrix.split([like[name].numel() // len(matrix) for name in self.names], dim=1)
        turned = [part.T if self.form == "transposed" else part for part in parts]
        found = {}
        for name, part in zip(self.names, turned, strict=True):
            part = part.reshape(like[name].shape).to(like[name].device, like[name].dtype)
            found[name] = divided_like(part, like[name])
        return found

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
    """One block a matrix of trainable weights, without bases and with eigenvalues 0.

    Raises NotImplementedError naming a layer of no known kind, or a bias shared by layers that share no weight.
    """
    users: dict[str, list[Layer]] = {}
    for layer in find_layers(model):
        users.setdefault(layer.weight or layer.bias, []).append(layer)
    # Shapes say enough: no weights are read, which may be divided among processes.
    live = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in parameters(model).items()}
    blocks = []
    for layers in users.values():
        names = [layers[0].weight, *(layer.bias for layer in layers)]
        form = "row" if layers[0].kind == "norm" else "transposed" if layers[0].transposed else "plain"
        block = Block(tuple(filter(None, names)), tuple(layer.name for layer in layers), form, torch.empty(0))
        weights = block.matrix(live)
        precise = torch.promote_types(weights.dtype, torch.float32)
        blocks.append(replace(block, eigenvalues=torch.zeros(weights.shape, dtype=precise, device=model.device)))
    used = [name for block in blocks for name in block.names]
    if len(used) > len(live):
        twice = next(name for name in used if used.count(name) > 1)
        raise NotImplementedError(f"{twice!r} belongs to several matrices: freeze it with requires_grad_(False)")
    return blocks
