"""What an erasure request does to the weights: each method in a few lines, over any model."""

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
from unlearnlib.curvature.newton import GaussNewton
from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.contenders import DAMPINGS, WEIGHTS
from unlearnlib.losses import mean_loss
from unlearnlib.methods import (
    TOLERANCE,
    Choice,
    Line,
    Match,
    NaturalPath,
    Path,
    adam_walk,
    ascent_direction,
    ascent_loss,
    choose,
    forgetting_noise,
    krylov_subspace,
    removal_direction,
    with_retain,
)
from unlearnlib.methods.newton_removal import PRODUCTS
from unlearnlib.methods.tuning import Knobs
from unlearnlib.own.request import Request
from unlearnlib.own.texts import Material
from unlearnlib.weights import Vector, difference, dot, norm, set_weights, snapshot

logger = logging.getLogger(__name__)

TRIAL = 0.5
"""Nats by which the forget loss rises while λ is chosen for a strength that is a number."""
MOST_STEPS = 200
"""Where gradient difference gives up."""
BATCH_SIZE = 32
"""Sequences of each kind in a step of gradient difference."""


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


Way = Line | NaturalPath
"""The path of a method that takes one step over a curvature."""


def unlearn(model: PreTrainedModel, material: Material, request: Request, target: float | None) -> Outcome:
    """Apply the request's method to ``model`` in place: to the forget loss ``target`` in nats or by its strength.

    Raises what the method raises.
    """
    if request.method == "gradient_difference":
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

    def line(damping: float) -> Line:
        return Line(model, removal_direction(curvature, delta, damping), forget, start)

    path = _natural_paths(model, material, curvature, delta) if request.method == "newton" else line
    setting, choice = {"damping": request.damping}, None
    if request.damping is None:
        grid = DAMPINGS.get(request.method.replace("newton", "newton_cg"), DAMPINGS["kfac"])
        goal = mean_loss(model, forget) + TRIAL if target is None else target
        setting, choice = _chosen({"damping": grid}, path, model, material, goal)
    way = path(**setting)
    if request.method == "fisher_forgetting":
        noise = forgetting_noise(curvature, delta, setting["damping"], request.seed)
        set_weights(model, start, noise, request.noise * norm(start) / norm(noise))
        way = Line(model, way.direction, forget)
    match = _go(way, request, target)
    if isinstance(way, NaturalPath):
        step = difference(snapshot(model), start)
        return Outcome(match, setting, choice, dot(gradient, step).item())
    return Outcome(match, setting, choice, match.strength * dot(gradient, way.direction).item())


def _natural_paths(
    model: PreTrainedModel, material: Material, factors: Curvature, delta: Vector
) -> Callable[[float], NaturalPath]:
    """The path of ``newton`` by the damping of its directions: each is made of its own products.

    The texts to keep are taken for all that stays, so that theory's α is n₋/n₊ by their numbers.
    """
    rows, share = material.estimation, len(material.forget) / len(material.retain)
    logger.info(
        "a step takes %d products with the Gauss–Newton matrix, about %d passes over %d sequences, and theory "
        "gives it the strength n₋/n₊ = %d/%d",
        *(PRODUCTS, 2 * PRODUCTS, len(rows), len(material.forget), len(material.retain)),
    )
    matrix = GaussNewton(model, rows)

    def path(damping: float) -> NaturalPath:
        logger.info("making the products, with directions by K-FAC at λ = %g", damping)
        space = krylov_subspace(matrix, factors, delta, damping)
        return NaturalPath(model, space.solve, material.forget, share, damping)

    return path


def _descend(model: PreTrainedModel, material: Material, request: Request, target: float | None) -> Outcome:
    """Gradient difference with Adam; learning rate and weight are chosen unless the weight is given."""
    rows, start = (material.forget, material.estimation), snapshot(model)

    def path(learning_rate: float, retain_weight: float) -> Path:
        loss = with_retain(ascent_loss, retain_weight)
        return adam_walk(model, loss, *rows, learning_rate, request.seed, MOST_STEPS, batch_size=BATCH_SIZE)

    rate, choice = request.learning_rate, None
    setting = {"learning_rate": rate, "retain_weight": request.retain_weight}
    if request.retain_weight is None:
        knobs = WEIGHTS | {"learning_rate": (rate / 4, rate, 4 * rate)}
        setting, choice = _chosen(knobs, path, model, material, target)
    set_weights(model, start)
    walk = path(**setting)
    if target is not None:
        logger.info("walking to a forget loss of %.3f nats", target)
        return Outcome(walk.to(target), setting, choice)
    for _ in itertools.islice(walk.steps, int(request.strength)):
        pass
    return Outcome(_end(model, material.forget, request.strength), setting)


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


def _go(way: Way, request: Request, target: float | None) -> Match:
    """Go to the target, or as far as the request's strength says."""
    if target is not None:
        logger.info("searching the strength for a forget loss of %.3f nats", target)
        return way.to(target)
    way.go(request.strength)
    return _end(way.model, way.forget, request.strength)


def _end(model: PreTrainedModel, forget: Tensor, strength: float) -> Match:
    """Where a model is after a strength that was given."""
    loss = mean_loss(model, forget)
    return Match(strength, loss, math.isfinite(loss), 1)
