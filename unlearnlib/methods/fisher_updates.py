"""The paper's two algorithms, over any curvature: Fisher Removal and Fisher Forgetting (Gu et al. 2024).

Both move the weights along C⁻¹Δ, where Δ is the gradient of the forget loss and C the damped curvature of what
stays. Fisher Removal does no more than that, in one step or in several; Fisher Forgetting adds noise C^p n.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.protocol import Curvature
from unlearnlib.losses import mean_loss, sequence_losses
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.methods.matching import Line, Match
from unlearnlib.weights import Vector, dot, mean_gradient, random_vector, set_weights, snapshot

Build = Callable[[PreTrainedModel], Curvature]
"""Makes the curvature of what stays, at the weights that the model has now."""


def removal_direction(curvature: Curvature, delta: Vector, damping: float) -> Vector:
    """(C + λI)⁻¹Δ: the direction of Fisher Removal; θ + α times it is the step (Gu et al. 2024, our reading)."""
    return curvature.solve(delta, damping)


def held_direction(curvature: Curvature, delta: Vector, gradient: Vector, damping: float) -> Vector:
    """(C + λI)⁻¹(Δ − κg) with the smallest κ ≥ 0 along which the loss with ``gradient`` g does not rise.

    For its length in C + λI no other direction gains more along Δ without raising that loss, to first order.
    """
    direction, back = curvature.solve(delta, damping), curvature.solve(gradient, damping)
    rise, most = dot(direction, gradient).clamp(min=0), dot(back, gradient)
    kappa = rise / most.clamp(min=torch.finfo(most.dtype).tiny)  # g = 0 has nothing to hold
    return {name: direction[name] - kappa * back[name] for name in direction}


def forgetting_noise(
    curvature: Curvature, like: Vector, damping: float, seed: int, exponent: float = -0.25
) -> Vector:
    """(C + λI)^p n with n ~ N(0, I), drawn with ``seed``, in the names and shapes of ``like``.

    Fisher Forgetting adds (μσ²)^{1/4} times it. The exponent p is -1/4 in Golatkar et al. (2020, proposition 4)
    and in the paper, and -1/2 in the code of the former; 0 is isotropic noise.
    """
    return curvature.power(random_vector(like, torch.Generator().manual_seed(seed)), exponent, damping)


def noise_kl(curvature: Curvature, residual: Vector, damping: float, scale: float, exponent: float) -> float:
    """KL in nats between two models ``residual`` h apart, once ``scale`` (C + λI)^p n is added to either.

    hᵀ(C + λI)^(-2p)h / (2 scale²): no attack on the noisy weights, and nothing computed from them, can tell the
    two apart by more. Raises ValueError if ``scale`` is not positive: without noise the KL is infinite.
    """
    if not scale > 0:
        raise ValueError(f"the scale of the noise must be positive, not {scale}: without noise the KL is infinite")
    return dot(residual, curvature.power(residual, -2 * exponent, damping)).item() / (2 * scale**2)


class RemovalInSteps:
    """Fisher Removal in ``steps`` steps, each of which raises the forget loss by the same part of the way.

    A :class:`unlearnlib.methods.matching.Path`. Δ is the gradient of the forget loss at the start, or with
    ``renew`` at every step; the curvature is the one at the start, or with ``refresh`` that at every step. With
    neither all steps together are one. With ``hold``, sequences [n, tokens], no step raises the loss of these to
    first order (:func:`held_direction`). Raises ValueError for less than one step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forget: Tensor,
        build: Build,
        damping: float,
        steps: int,
        refresh: bool,
        renew: bool = False,
        hold: Tensor | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"cannot remove in {steps} steps: take at least 1")
        self.model, self.forget, self.start = model, forget, snapshot(model)
        self.build, self.damping, self.steps = build, damping, steps
        self.refresh, self.renew, self.hold = refresh, renew, hold

    def to(self, target: float) -> Match:
        """Take all steps from the start on, in place.

        Returns the match of the last step (its ``strength`` is the α of that step alone), or of the first that
        fell short of its own part.
        """
        set_weights(self.model, self.start)
        first = mean_loss(self.model, self.forget)
        for step in range(1, self.steps + 1):
            if step == 1 or self.refresh:
                curvature = self.build(self.model)
            if step == 1 or self.renew:
                delta = ascent_direction(self.model, self.forget)
            if self.hold is None:
                direction = removal_direction(curvature, delta, self.damping)
            else:
                gradient = mean_gradient(self.model, self.hold, sequence_losses)
                direction = held_direction(curvature, delta, gradient, self.damping)
            part = first + (target - first) * step / self.steps
            match = Line(self.model, direction, self.forget).to(part)
            if not match.reached:
                break
        return match
