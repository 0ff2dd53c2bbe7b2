"""Gradient ascent on the forget loss (Jang et al. 2023), and the terms that are added to keep the rest.

A method is one loss to descend: ``loss(model, forget_batch, retain_batch)`` in nats, a scalar.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from unlearnlib.losses import log_probabilities, sequence_losses, token_losses
from unlearnlib.methods.matching import Walk
from unlearnlib.weights import Vector, mean_gradient

Loss = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]


def ascent_direction(model: PreTrainedModel, forget: Tensor) -> Vector:
    """Δ: the gradient of the mean forget loss. θ + αΔ is the one-step form of gradient ascent."""
    return mean_gradient(model, forget, sequence_losses)


def ascent_loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
    """−L(forget): plain gradient ascent. It has no lower bound, and never looks at ``retain``."""
    return -sequence_losses(model, forget).mean()


def gradient_difference_loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
    """−L(forget) + L(retain): gradient difference, a baseline of TOFU (Maini et al. 2024)."""
    return ascent_loss(model, forget, retain) + sequence_losses(model, retain).mean()


def with_retain(loss: Loss, weight: float, keep: Loss | None = None) -> Loss:
    """``loss`` plus ``weight`` times a term that keeps what stays, by default the retain loss."""
    keep = keep or retain_loss
    return lambda model, forget, retain: loss(model, forget, retain) + weight * keep(model, forget, retain)


def kl_loss(original: PreTrainedModel) -> Loss:
    """KL(original ‖ model) on ``retain``, in nats a token (Yao et al. 2023): stay where you were."""

    def loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        return kl_retain_loss(original)(model, forget, retain) - ascent_loss(model, forget, retain)

    return loss


def kl_retain_loss(original: PreTrainedModel) -> Loss:
    """−L(forget) + KL(original ‖ model) on ``retain``, in nats a token (Yao et al. 2023): stay where you were."""

    def loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        with torch.no_grad():
            before = log_probabilities(original, retain)
        after = log_probabilities(model, retain)
        kl = F.kl_div(after, before, log_target=True, reduction="none").sum(dim=2).mean()
        return ascent_loss(model, forget, retain) + kl

    return loss


def npo_loss(original: PreTrainedModel, beta: float) -> Loss:
    """Negative preference optimisation, (2/β) log(1 + (p/p₀)^β), averaged over ``forget`` (Zhang et al. 2024).

    p and p₀ are the probabilities of a whole sequence under the model and under ``original``: its log-probability
    is the sum over its tokens, in nats, and β is in units of one over nats. Never below 0; never looks at
    ``retain``. Its gradient is that of Σ log p with each sequence weighted by 2p^β/(p^β + p₀^β). For β → 0 the
    weights are 1, which is ascent. Raises ValueError if β is not positive.
    """
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"β of NPO must be positive and finite, not {beta}; for β → 0 take ascent_loss")

    def loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        with torch.no_grad():
            before = -token_losses(original, forget).sum(dim=1)
        log_ratio = -token_losses(model, forget).sum(dim=1) - before
        return 2 / beta * F.softplus(beta * log_ratio).mean()

    return loss


def retain_loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
    """L(retain): fine-tuning on what stays, in the hope that the rest fades."""
    return sequence_losses(model, retain).mean()


def descend(
    model: PreTrainedModel,
    loss: Loss,
    forget: Tensor,
    retain: Tensor,
    optimizer: torch.optim.Optimizer,
    seed: int,
    batch_size: int = 32,
) -> Iterator[float]:
    """Minimise ``loss`` in place, endlessly; each ``next`` is one step and gives the loss before it, in nats.

    Batches of ``forget`` and of ``retain`` [n, tokens] are drawn without replacement within an epoch of each, in
    an order set by ``seed``. The caller decides when to stop, usually a ``Walk``.

    Raises FloatingPointError when the loss is no longer finite: for ascent, a question of time.
    """
    streams = (_batches(forget, batch_size, seed), _batches(retain, batch_size, seed + 1))
    for forget_batch, retain_batch in zip(*streams, strict=True):
        value = loss(model, forget_batch, retain_batch)
        if not math.isfinite(value.item()):
            raise FloatingPointError("the loss is not finite any more: stop earlier or take smaller steps")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        yield value.item()


def adam_walk(
    model: PreTrainedModel,
    loss: Loss,
    forget: Tensor,
    retain: Tensor,
    learning_rate: float,
    seed: int,
    max_steps: int = 1000,
    batch_size: int = 32,
) -> Walk:
    """The path of :func:`descend` with Adam (Kingma & Ba 2015), by targets of the loss on ``forget``.

    It starts from the weights that ``model`` has now, and is of ``max_steps`` steps at the most.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    steps = descend(model, loss, forget, retain, optimizer, seed, batch_size)
    return Walk(model, steps, forget, max_steps)


def sgd_walk(
    model: PreTrainedModel,
    loss: Loss,
    forget: Tensor,
    retain: Tensor,
    learning_rate: float,
    seed: int,
    max_steps: int = 1000,
    batch_size: int = 32,
) -> Walk:
    """As :func:`adam_walk` with plain stochastic gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    return Walk(model, descend(model, loss, forget, retain, optimizer, seed, batch_size), forget, max_steps)


def _batches(sequences: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from sequences[torch.randperm(len(sequences), generator=generator)].split(batch_size)
