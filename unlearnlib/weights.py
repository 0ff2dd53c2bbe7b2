"""Vectors in weight space: dictionaries from parameter name to tensor, as in ``torch.func``."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearnlib import distributed
from unlearnlib.losses import shared_batches

Vector = dict[str, Tensor]


def outline(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """A copy of the model with new tensors of the same shapes on ``device``, without numbers; ties are kept."""
    copied: dict[int, Any] = {id(b): torch.empty_like(b, device=device) for b in model.buffers()}
    for p in model.parameters():
        copied[id(p)] = nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
    return copy.deepcopy(model, copied)


def parameters(model: PreTrainedModel) -> Vector:
    """The model's trainable parameters by name: the live tensors, each tied one once, frozen ones left out."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_whole(model: PreTrainedModel, what: str) -> None:
    """Raise NotImplementedError if the model's weights are sharded, naming ``what`` needs all in one place."""
    if distributed.are_divided(model.parameters()):
        raise NotImplementedError(
            f"{what} needs all weights in one place, and this model's are divided among processes: use gradient "
            "ascent and other first-order methods, K-FAC, EK-FAC or kronecker.diagonal_fisher, or load it whole"
        )


def snapshot(model: PreTrainedModel) -> Vector:
    """A detached copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in parameters(model).items()}


@torch.no_grad()
def set_weights(
    model: PreTrainedModel, start: Vector, direction: Vector | None = None, scale: float = 1.0
) -> None:
    """Set the weights to ``start + scale * direction`` (to ``start`` where no direction is given)."""
    for name, p in parameters(model).items():
        p.copy_(start[name])
        if direction is not None and scale != 0:  # zero times what is not finite would not be zero
            p.add_(direction[name], alpha=scale)


def dot(a: Vector, b: Vector) -> Tensor:
    """Inner product of two vectors, a scalar tensor."""
    return distributed.whole(torch.stack([(a[name] * b[name]).sum() for name in a]).sum())


def norm(a: Vector) -> float:
    """Euclidean length of a vector."""
    return dot(a, a).sqrt().item()


def difference(a: Vector, b: Vector) -> Vector:
    """The vector ``a - b``."""
    return {name: a[name] - b[name] for name in a}


def add(a: Vector, b: Vector, scale: float = 1.0) -> Vector:
    """The vector ``a + scale * b``."""
    return {name: a[name] + scale * b[name] for name in a}


def cosine(a: Vector, b: Vector) -> float:
    """The cosine of the angle between two vectors. Raises ZeroDivisionError if one is zero."""
    return dot(a, b).item() / (norm(a) * norm(b))


def unit(a: Vector) -> Vector:
    """The vector of length 1 in the direction of ``a``, which must not be zero."""
    length = norm(a)
    return {name: value / length for name, value in a.items()}


def flatten(a: Vector) -> Tensor:
    """All entries of a vector in one row, shape [d], parameter after parameter."""
    return torch.cat([value.reshape(-1) for value in a.values()])


def unflatten(row: Tensor, like: Vector) -> Vector:
    """The inverse of :func:`flatten`: a row [d] as a vector with the names and shapes of ``like``."""
    parts = row.split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}


def random_vector(like: Vector, generator: torch.Generator) -> Vector:
    """Standard normal entries with the names, shapes, dtype and device of ``like``.

    Drawn on the CPU, so that a seed gives the same vector on every device.
    """
    return {
        name: distributed.divided_like(
            torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device), value
        )
        for name, value in like.items()
    }


def mean_gradient(
    model: PreTrainedModel,
    sequences: Tensor,
    loss: Callable[[PreTrainedModel, Tensor], Tensor],
    factors: Tensor | None = None,
) -> Vector:
    """Gradient of the mean over ``sequences`` of ``loss(model, batch)``, which must return one value a sequence.

    Each value is multiplied by the sequence's factor where ``factors`` [n] are given. Batches are added up, so
    memory does not grow with the number of sequences [n, tokens]. Several processes take a share each.
    Raises FloatingPointError naming the sequence if a loss is not finite.
    """
    live, number = parameters(model), len(sequences)
    total = {name: torch.zeros_like(p) for name, p in live.items()}
    divided = distributed.are_divided(live.values())
    start = distributed.share(number).start
    with distributed.together(met_within=divided):
        for batch, real in shared_batches(model, sequences):
            losses = loss(model, batch)[:real]
            if not torch.isfinite(losses).all():
                bad = start + int((~torch.isfinite(losses)).nonzero()[0])
                raise FloatingPointError(f"the loss of sequence {bad} is not finite: are the weights damaged?")
            if factors is not None:
                losses = losses * factors[start : start + real].to(losses)
            gradients = _divided_gradients if divided else torch.autograd.grad
            for name, gradient in zip(live, gradients(losses.sum(), list(live.values())), strict=True):
                total[name] += gradient / number
            start += real
    if not divided:
        distributed.sum_over(total.values())
    return total


def _divided_gradients(value: Tensor, live: list[Tensor]) -> list[Tensor]:
    """The gradient of the sum of all processes' values, where the weights are divided among them."""
    for p in live:
        p.grad = None
    # The graph has whole weights, which only stand in for the live parts; FSDP takes the mean of what they get.
    (value * distributed.size()).backward()
    gradients = [p.grad for p in live]
    for p in live:
        p.grad = None
    return gradients
