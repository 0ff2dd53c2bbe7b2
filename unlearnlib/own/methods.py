"""What an erasure request does to the weights: each method in a few lines, over any model."""

import copy
import itertools
import logging
import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature import kronecker
from unlearnlib.curvature.fisher_diagonal import FisherDiagonal
from unlearnlib.curvature.fisher_dual_streaming import StreamingFisher
from unlearnlib.curvature.kronecker_groups import kfac_in_groups
from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.contenders import DAMPINGS, WEIGHTS
from unlearnlib.losses import mean_loss
from unlearnlib.methods import (
    TOLERANCE,
    Choice,
    Line,
    Match,
    Path,
    adam_walk,
    ascent_direction,
    ascent_loss,
    choose,
    forgetting_noise,
    newton_loss,
    removal_direction,
    with_retain,
)
from unlearnlib.methods.first_order import Loss
from unlearnlib.methods.tuning import Knobs
from unlearnlib.own.request import DESCENTS, Request
from unlearnlib.own.texts import Material
from unlearnlib.weights import Vector, difference, dot, norm, set_weights, snapshot

logger = logging.getLogger(__name__)

TRIAL = 0.5
"""Nats by which the forget loss rises while λ is chosen for a strength that is a number."""
MOST_STEPS = 200
"""Where gradient difference and newton give up."""
BATCH_SIZE = 32
"""Sequences of each kind in a step of gradient difference or newton."""


@dataclass(frozen=True)
class Outcome:
    """How the model was unlearned: the end of the search, the setting of each knob, and how it was chosen, if so.

    ``slope``, where there is a curvature, is the rise of the loss on what stays along the step to first order, in
    nats: nothing if the model was at a minimum of it.
    """

    match: Match
    setting: dict[str, float] = field(default_factory=dict)
    choice: Choice | None = None
    slope: float | None = None


def unlearn(model: PreTrainedModel, material: Material, request: Request, target: float | None) -> Outcome:
    """Apply the request's method to ``model`` in place: to the forget loss ``target`` in nats or by its strength.

    Raises what the method raises.
    """
    if request.method in DESCENTS:
        return _descend(model, material, request, target)
    forget = material.forget
    logger.info("differentiating the loss on %d sequences to forget", len(forget))
    start, delta = snapshot(model), ascent_direction(model, forget)
    if request.method == "gradient_ascent":
        return Outcome(_go(Line(model, delta, forget, start), request, target))
    gradient = ascent_direction(model, material.estimation)  # g
    if request.method == "kfac:difference":
        delta = difference(delta, gradient)
    logger.info("building the curvature of %d sequences to keep", len(material.estimation))
    curvature = build_curvature(model, material.estimation, request, delta)

    def path(damping: float) -> Line:
        return Line(model, removal_direction(curvature, delta, damping), forget, start)

    setting, choice = {"damping": request.damping}, None
    if request.damping is None:
        grid = DAMPINGS.get(request.method, DAMPINGS["kfac"])
        goal = mean_loss(model, forget) + TRIAL if target is None else target
        setting, choice = _chosen({"damping": grid}, path, model, material, goal)
    line = path(**setting)
    if request.method == "fisher_forgetting":
        noise = forgetting_noise(curvature, delta, setting["damping"], request.seed)
        set_weights(model, start, noise, request.noise * norm(start) / norm(noise))
        line = Line(model, line.direction, forget)
    match = _go(line, request, target)
    return Outcome(match, setting, choice, match.strength * dot(gradient, line.direction).item())


def _descend(model: PreTrainedModel, material: Material, request: Request, target: float | None) -> Outcome:
    """Gradient difference, or the step of Newton, with Adam.

    For a target the learning rate is chosen, and with it the weight of gradient difference, unless that is given.
    """
    rows, start = (material.forget, material.estimation), snapshot(model)
    newton = _newton_loss(model, material) if request.method == "newton" else None

    def path(learning_rate: float, retain_weight: float | None = None) -> Path:
        loss = newton or with_retain(ascent_loss, retain_weight)
        return adam_walk(model, loss, *rows, learning_rate, request.seed, MOST_STEPS, batch_size=BATCH_SIZE)

    rate, choice = request.learning_rate, None
    setting, knobs = {"learning_rate": rate}, {"learning_rate": (rate / 4, rate, 4 * rate)}
    if newton is None:
        setting, knobs = setting | {"retain_weight": request.retain_weight}, WEIGHTS | knobs
    if target is not None and (newton or request.retain_weight is None):
        setting, choice = _chosen(knobs, path, model, material, target)
    set_weights(model, start)
    walk = path(**setting)
    setting |= {"alpha": material.share} if newton else {}
    if target is not None:
        logger.info("walking to a forget loss of %.3f nats", target)
        return Outcome(walk.to(target), setting, choice)
    for _ in itertools.islice(walk.steps, int(request.strength)):
        pass
    return Outcome(_end(model, material.forget, request.strength), setting)


def _newton_loss(model: PreTrainedModel, material: Material) -> Loss:
    """What newton descends. The texts to keep are taken for all that stays: α is n₋/n₊ by their tokens."""
    logger.info("differentiating the loss on %d sequences to forget", len(material.forget))
    logger.info("theory gives the step the strength n₋/n₊ = %.3g", material.share)
    return newton_loss(copy.deepcopy(model), ascent_direction(model, material.forget), material.share)


def build_curvature(model: PreTrainedModel, sequences: Tensor, request: Request, delta: Vector) -> Curvature:
    """The curvature of the retained ``sequences`` [m, tokens] that the request's method asks for."""
    if request.method == "fisher_diagonal":
        return FisherDiagonal(model, sequences)
    if request.method == "fisher_dual":
        return StreamingFisher(model, sequences, v=delta)
    corrected = request.method == "ekfac"
    if request.factors is not None:
        folder = pathlib.Path(request.factors)
        return kfac_in_groups(model, sequences, seed=request.seed, corrected=corrected, folder=folder)
    return (kronecker.ekfac if corrected else kronecker.kfac)(model, sequences, seed=request.seed)


def _chosen(
    knobs: Knobs, path: Callable[..., Path], model: PreTrainedModel, material: Material, goal: float
) -> tuple[dict[str, float], Choice | None]:
    """The setting by :func:`unlearnlib.methods.choose`; that of the grids' middles if there is nothing to do."""
    if mean_loss(model, material.forget) >= goal - TOLERANCE:
        return {name: grid[len(grid) // 2] for name, grid in knobs.items()}, None
    logger.info("choosing %s on %d sequences", " and ".join(knobs), len(material.validation))
    choice = choose(knobs, path, material.validation, goal)
    return choice.setting, choice


def _go(line: Line, request: Request, target: float | None) -> Match:
    """Take a line to the target, or as far as the request's strength says."""
    if target is not None:
        logger.info("searching the strength for a forget loss of %.3f nats", target)
        return line.to(target)
    line.go(request.strength)
    return _end(line.model, line.forget, request.strength)


def _end(model: PreTrainedModel, forget: Tensor, strength: float) -> Match:
    """Where a model is after a strength that was given."""
    loss = mean_loss(model, forget)
    return Match(strength, loss, math.isfinite(loss), 1)
