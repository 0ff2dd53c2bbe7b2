"""Newton's step without a matrix: the loss whose minimum it leads to, for any optimizer to descend.

The divergence of the predictions on what stays has no gradient at θ₀, and its Hessian there is the Gauss–Newton
matrix G. So the minimum of KL(θ₀ ‖ θ) − αΔᵀ(θ − θ₀) is θ₀ + αG⁻¹Δ, up to terms of higher order in α. To stop early
is to damp: after a time T of gradient flow, about as (G + I/T)⁻¹ does.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.methods.first_order import Loss, kl_loss
from unlearnlib.weights import Vector, parameters


def check_share(share: float) -> None:
    """Raise ValueError unless α = n₋/n₊ is a positive, finite number."""
    if not (share > 0 and math.isfinite(share)):
        raise ValueError(f"the share α of what is removed must be positive and finite, not {share}")


def newton_loss(original: PreTrainedModel, delta: Vector, share: float) -> Loss:
    """KL(original ‖ model) on ``retain``, in nats a token, less ``share`` · Δᵀ(θ − θ₀), θ₀ the original's weights.

    ``delta`` is Δ, the gradient of the forget loss at θ₀, and ``share`` is α = n₋/n₊, the influence of n₋ removed
    sequences in a mean over the n₊ that stay. Unlike ascent, it removes what the texts have contributed, which is
    settled, and not what they would contribute to the model that it goes through: Δ stays as it is, and ``forget``
    is not read. This is the proximal Bregman objective of Bae et al. (2022) without its proximal term.

    Raises ValueError for a share that is not positive and finite.
    """
    check_share(share)
    keep, before = kl_loss(original), dict(original.named_parameters())

    def loss(model: PreTrainedModel, forget: Tensor, retain: Tensor) -> Tensor:
        moved = [((p - before[name].detach()) * delta[name]).sum() for name, p in parameters(model).items()]
        return keep(model, forget, retain) - share * torch.stack(moved).sum()

    return loss
