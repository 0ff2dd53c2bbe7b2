"""What an erasure request does to the weights: each method in a few lines, over any model."""

import itertools
import math
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature import kronecker
from unlearnlib.curvature.fisher_diagonal import FisherDiagonal
from unlearnlib.curvature.fisher_dual_streaming import StreamingFisher
from unlearnlib.curvature.protocol import Curvature
from unlearnlib.losses import mean_loss
from unlearnlib.methods import matching
from unlearnlib.methods.first_order import ascent_direction, ascent_loss, with_retain
from unlearnlib.methods.fisher_updates import forgetting_noise, removal_direction
from unlearnlib.methods.matching import Line, Match
from unlearnlib.methods.walks import adam_walk
from unlearnlib.own.request import Request
from unlearnlib.own.texts import Material
from unlearnlib.weights import Vector, norm, set_weights, snapshot

DAMPINGS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""The λ that are tried where none is given."""
TRIAL = 0.5
"""Nats by which the forget loss rises while λ is chosen for a strength that is a number."""
MOST_STEPS = 500
"""Where gradient difference gives up."""
BATCH_SIZE = 32
"""Sequences of each kind in a step of gradient difference."""


@dataclass(frozen=True)
class Outcome:
    """How the model was unlearned: the end of the search, the λ, and by λ tried the validation loss in nats.

    A λ whose direction did not reach the forget loss at which all are compared has none.
    """

    match: Match
    damping: float | None = None
    sweep: dict[float, float | None] | None = None


def unlearn(model: PreTrainedModel, material: Material, request: Request, target: float | None) -> Outcome:
    """Apply the request's method to ``model`` in place: to the forget loss ``target`` in nats or by its strength.

    Raises what the method raises.
    """
    forget = material.forget
    if request.method == "gradient_difference":
        rows, rate = (forget, material.estimation), request.learning_rate
        walk = adam_walk(
            model, with_retain(ascent_loss, 1.0), *rows, rate, request.seed, MOST_STEPS, batch_size=BATCH_SIZE
        )
        if target is not None:
            return Outcome(walk.to(target))
        for _ in itertools.islice(walk.steps, int(request.strength)):
            pass
        return Outcome(_end(model, forget, request.strength))
    start, delta = snapshot(model), ascent_direction(model, forget)
    direction, damping, sweep = delta, None, None
    if request.method != "gradient_ascent":
        curvature = build_curvature(model, material.estimation, request, delta)
        goal = mean_loss(model, forget) + TRIAL if target is None else target
        damping = request.damping
        if damping is None:
            table = matching.sweep(
                DAMPINGS,
                lambda tried: Line(model, removal_direction(curvature, delta, tried), forget, start),
                material.validation,
                goal,
            )
            # Where no λ gets there, the largest makes the direction that is closest to plain ascent.
            damping = matching.best_setting(table) if table["reached"].any() else max(DAMPINGS)
            sweep = {row.setting: row.validation_loss if row.reached else None for row in table.itertuples()}
        direction = removal_direction(curvature, delta, damping)
        if request.method == "fisher_forgetting":
            noise = forgetting_noise(curvature, delta, damping, request.seed)
            set_weights(model, start, noise, request.noise * norm(start) / norm(noise))
            start = snapshot(model)
    line = Line(model, direction, forget, start)
    if target is not None:
        return Outcome(line.to(target), damping, sweep)
    line.go(request.strength)
    return Outcome(_end(model, forget, request.strength), damping, sweep)


def build_curvature(model: PreTrainedModel, sequences: Tensor, request: Request, delta: Vector) -> Curvature:
    """The curvature of the retained ``sequences`` [m, tokens] that the request's method asks for."""
    if request.method == "fisher_diagonal":
        return FisherDiagonal(model, sequences)
    if request.method == "fisher_dual":
        return StreamingFisher(model, sequences, v=delta)
    build = kronecker.ekfac if request.method == "ekfac" else kronecker.kfac
    return build(model, sequences, seed=request.seed)


def _end(model: PreTrainedModel, forget: Tensor, strength: float) -> Match:
    """Where a model is after a strength that was given."""
    loss = mean_loss(model, forget)
    return Match(strength, loss, math.isfinite(loss), 1)
