"""The paper's two algorithms, over any curvature: Fisher Removal and Fisher Forgetting (Gu et al. 2024).

Both move the weights along C⁻¹Δ, where Δ is the gradient of the forget loss and C the damped curvature of what
stays. Fisher Removal does no more than that, in one step or in several; Fisher Forgetting adds noise C^p n.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature import Curvature
from unlearnlib.gradient_ascent import ascent_direction
from unlearnlib.matching import Match, match_direction
from unlearnlib.measures import mean_loss
from unlearnlib.weights import Vector, random_vector, snapshot

Build = Callable[[PreTrainedModel], Curvature]
"""Makes the curvature of what stays, at the weights that the model has now."""


def removal_direction(curvature: Curvature, delta: Vector, damping: float) -> Vector:
    """(C + λI)⁻¹Δ: the direction of Fisher Removal; θ + α times it is the step (Gu et al. 2024, our reading)."""
    return curvature.solve(delta, damping)


def forgetting_noise(
    curvature: Curvature, like: Vector, damping: float, seed: int, exponent: float = -0.25
) -> Vector:
    """(C + λI)^p n with n ~ N(0, I), drawn with ``seed``, in the names and shapes of ``like``.

    Fisher Forgetting adds (μσ²)^{1/4} times it. The exponent p is -1/4 in Golatkar et al. (2020, proposition 3)
    and in the paper, and -1/2 in the code of the former.
    """
    return curvature.power(random_vector(like, torch.Generator().manual_seed(seed)), exponent, damping)


def remove_in_steps(
    model: PreTrainedModel, forget: Tensor, target: float, build: Build, damping: float, steps: int, refresh: bool
) -> Match:
    """Fisher Removal in ``steps`` steps, each of which raises the forget loss by the same part of the way.

    Δ is taken anew at every step, the curvature with ``refresh`` too; without it the first one serves all. The
    model is changed in place. Returns the match of the last step (its ``strength`` is the α of that step alone),
    or of the first that fell short of its own target.
    """
    start, curvature = mean_loss(model, forget), None
    for step in range(1, steps + 1):
        if curvature is None or refresh:
            curvature = build(model)
        direction = removal_direction(curvature, ascent_direction(model, forget), damping)
        goal = start + (target - start) * step / steps
        match = match_direction(model, snapshot(model), direction, forget, goal)
        if not match.reached:
            break
    return match
