"""Losses of first-order unlearning: what pushes a text out, and what is added to keep the rest.

A method is one loss to descend: ``loss(model, forget_batch, retain_batch)`` is a scalar. :func:`with_retain` makes
one of a loss that forgets and a term that keeps; :mod:`unlearnlib.methods.walks` descends it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from unlearnlib.losses import hidden_states, log_probabilities, sequence_losses, token_losses
from unlearnlib.weights import Vector, mean_gradient

Loss = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]


def ascent_direction(model: PreTrainedModel, forget: Tensor) -> Vector:
    """Δ: the gradient of the mean forget loss. θ + αΔ is the one-step form of gradient ascent."""
    return mean_gradient(model, forget, sequence_losses)


def ascent_loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
    """−L(forget), in nats a token: gradient ascent (Jang et al. 2023). No lower bound; ``retain`` is not read."""
    return -sequence_losses(model, forget).mean()


def retain_loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
    """L(retain), in nats a token: fine-tuning on what stays. Alone it hopes that the rest fades."""
    return sequence_losses(model, retain).mean()


def kl_loss(original: PreTrainedModel) -> Loss:
    """KL(original ‖ model) on ``retain``, in nats a token: stay where you were (Yao et al. 2023)."""

    def loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        with torch.no_grad():
            before = log_probabilities(original, retain)
        after = log_probabilities(model, retain)
        return F.kl_div(after, before, log_target=True, reduction="none").sum(dim=2).mean()

    return loss


def with_retain(loss: Loss, weight: float, keep: Loss = retain_loss) -> Loss:
    """``loss + weight · keep``, with the retain loss as the term that keeps where no other is given.

    Of :func:`ascent_loss` it makes gradient difference, a baseline of TOFU (Maini et al. 2024, with weight 1). The
    weight is in units of ``loss`` over those of ``keep``. Raises ValueError if it is negative or not finite.
    """
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"the weight of what is kept must be finite and at least 0, not {weight}")

    def total(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        return loss(model, forget, retain) + weight * keep(model, forget, retain)

    return total


def npo_loss(original: PreTrainedModel, beta: float) -> Loss:
    """Negative preference optimisation, (2/β) log(1 + (p/p₀)^β), averaged over ``forget`` (Zhang et al. 2024).

    p and p₀ are the probabilities of a whole sequence under the model and under ``original``: its log-probability
    is the sum over its tokens, in nats, and β is in units of one over nats. Never below 0; never looks at
    ``retain``. Its gradient is that of Σ log p with each sequence weighted by 2p^β/(p^β + p₀^β). For β → 0 the
    weights are 1, which is ascent. Raises ValueError if β is not positive.
    """
    _check_beta("NPO", beta)

    def loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        with torch.no_grad():
            before = -token_losses(original, forget).sum(dim=1)
        log_ratio = -token_losses(model, forget).sum(dim=1) - before
        return 2 / beta * F.softplus(beta * log_ratio).mean()

    return loss


def simnpo_loss(beta: float, gamma: float = 0.0) -> Loss:
    """SimNPO, −(2/β) log σ(−(β/T) log p − γ), averaged over ``forget`` (Fan et al. 2024, eq. 4).

    p is the probability of a whole sequence of T predicted tokens, so that −(1/T) log p is its loss in nats a
    token and β is in tokens over nats; no original model is needed. γ, a pure number, is the margin. The gradient
    is that of log p / T with each sequence weighted by 2σ((β/T) log p + γ): for β → 0 and γ = 0 the weights are 1,
    which is ascent. Never below 0; never looks at ``retain``. Raises ValueError if β is not positive or γ is
    negative.
    """
    _check_beta("SimNPO", beta)
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"the margin γ of SimNPO must be finite and at least 0, not {gamma}")

    def loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        return 2 / beta * F.softplus(gamma - beta * sequence_losses(model, forget)).mean()

    return loss


def rmu_loss(layer: int, length: float, seed: int) -> Loss:
    """Representation misdirection (RMU), mean ‖h − c u‖² over the tokens of ``forget`` (Li et al. 2024).

    h are the model's activations after ``layer`` blocks, c is ``length``, in their units, and u a unit vector with
    the direction of independent entries uniform on [0, 1), drawn from ``seed``. The gradient reaches the weights
    up to that layer and no others. What is kept is :func:`activation_loss`, by :func:`with_retain`. The authors
    train the MLP weights of three layers; here all weights that the gradient reaches are trained. Raises
    ValueError if ``length`` is not positive.
    """
    if not (length > 0 and math.isfinite(length)):
        raise ValueError(f"the length of RMU's random vector must be positive and finite, not {length}")

    def loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        h = hidden_states(model, forget, layer)
        u = torch.rand(h.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (h - (length * u / u.norm()).to(h)).square().sum(dim=2).mean()

    return loss


def activation_loss(original: PreTrainedModel, layer: int) -> Loss:
    """Mean ‖h − h₀‖² over the tokens of ``retain``: what RMU keeps are the activations after ``layer`` blocks."""

    def loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        with torch.no_grad():
            before = hidden_states(original, retain, layer)
        return (hidden_states(model, retain, layer) - before).square().sum(dim=2).mean()

    return loss


def _check_beta(name: str, beta: float) -> None:
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"β of {name} must be positive and finite, not {beta}; for β → 0 take ascent_loss")
