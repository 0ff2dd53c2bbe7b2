"""The steps that serve one request after the other, each from wherever the last one has left the model."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.contenders import MAX_STEPS
from unlearnlib.methods.first_order import ascent_direction, ascent_loss, with_retain
from unlearnlib.methods.fisher_updates import Build, forgetting_noise, removal_direction
from unlearnlib.methods.matching import Line, Match, Path
from unlearnlib.methods.walks import adam_walk, sgd_walk
from unlearnlib.weights import Vector, add, difference, dot, parameters, set_weights, snapshot

Step = Callable[[PreTrainedModel, Tensor, int], Path]
"""How a method serves one request: from the model as it now is, the set to forget [n, tokens] and the request's
number, counted from 1, the path along which the model then goes, in place, until the set has its target. It does
not move for a set whose loss is there already, or above."""


def served(match: Match, target: float) -> bool:
    """Whether a set was brought to its ``target`` in nats, or is above it, as it may have been before its turn."""
    return match.reached or match.loss > target


def ascent_step(model: PreTrainedModel, forget: Tensor, request: int) -> Path:
    """One step along the gradient of the forget loss."""
    return Line(model, ascent_direction(model, forget), forget)


class Opening:
    """The first requests of a series, served in turn by ``step``: a :class:`unlearnlib.methods.matching.Path`.

    Each of ``sets`` has its own of ``targets`` in nats, so that whom the path is asked to lead to is the last.
    """

    def __init__(
        self, model: PreTrainedModel, step: Step, sets: Sequence[Tensor], targets: Sequence[float]
    ) -> None:
        self.model, self.step, self.start = model, step, snapshot(model)
        self.requests = list(enumerate(zip(sets, targets, strict=False), start=1))

    def to(self, target: float) -> Match:
        """Serve the requests from the start on.

        The strength and the evaluations of the match are sums, its loss is that of the last set, and it is
        reached if every set was brought to its target or was above it before its turn.
        """
        set_weights(self.model, self.start)
        matches = []
        for request, (forget, wanted) in self.requests:
            matches.append((wanted, self.step(self.model, forget, request).to(wanted)))
        return Match(
            sum(match.strength for _, match in matches),
            matches[-1][1].loss,
            all(served(match, wanted) for wanted, match in matches),
            sum(match.evaluations for _, match in matches),
        )


def batches_step(learning_rate: float, seed: int, most: int = MAX_STEPS) -> Step:
    """Ascent with plain SGD, each batch a quarter of the set; ``most`` steps a request at the most."""

    def step(model: PreTrainedModel, forget: Tensor, request: int) -> Path:
        batch, own_seed = max(1, len(forget) // 4), 1000 * seed + request
        return sgd_walk(model, ascent_loss, forget, forget, learning_rate, own_seed, most, batch)

    return step


def difference_step(
    kept: Tensor, learning_rate: float, retain_weight: float, seed: int, most: int = MAX_STEPS
) -> Step:
    """Gradient difference with Adam: −L(set) + ``retain_weight`` L(kept), ``most`` steps a request at the most.

    With weight 0 it is ascent with Adam, which does not read ``kept``.
    """
    loss = with_retain(ascent_loss, retain_weight) if retain_weight else ascent_loss

    def step(model: PreTrainedModel, forget: Tensor, request: int) -> Path:
        return adam_walk(model, loss, forget, kept, learning_rate, 1000 * seed + request, most)

    return step


def fisher_step(
    build: Build,
    damping: float,
    refresh: bool,
    kept: Tensor | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Step:
    """Fisher Removal: one step along C⁻¹Δ, with C built at the first request, or with ``refresh`` at each.

    With ``kept`` sequences the direction is C⁻¹(Δ − g), with g the gradient of their loss: gradient difference
    with curvature. With ``noise`` > 0 it is Fisher Forgetting: before the step, and even if there is none to take,
    noise C^(-1/4) n is added, scaled so that C, taken for the Hessian, expects that many nats of damage from it.
    It is drawn anew for each request, from ``seed``.
    """
    current: list[Curvature] = []

    def step(model: PreTrainedModel, forget: Tensor, request: int) -> Path:
        if refresh or not current:
            current.clear()  # before the next is built, as two of them may not fit into memory
            current.append(build(model))
        [curvature] = current
        start, delta = snapshot(model), ascent_direction(model, forget)
        if kept is not None:
            delta = difference(delta, ascent_direction(model, kept))
        direction = removal_direction(curvature, delta, damping)
        if noise:
            drawn = forgetting_noise(curvature, start, damping, seed=1000 * seed + request)
            start = add(start, drawn, noise_length(curvature, drawn, noise))
        return Line(model, direction, forget, start)

    return step


def noise_step(curvature: Curvature, damping: float, seed: int) -> Step:
    """Noise C^(-1/4) n alone, as much as the target wants; drawn anew at each request."""

    def step(model: PreTrainedModel, forget: Tensor, request: int) -> Path:
        noise = forgetting_noise(curvature, parameters(model), damping, seed=1000 * seed + request)
        return Line(model, noise, forget)

    return step


class Together(Line):
    """A line along which several sets are forgotten: it leads to the mean of all ``targets``, in nats.

    Asked for is the target of the last set, which joins them.
    """

    targets: list[float]

    def to(self, target: float) -> Match:
        """Put the model where the loss of all sets is the mean of their targets."""
        self.targets.append(target)
        return super().to(sum(self.targets) / len(self.targets))


def joint_step(original: PreTrainedModel, curvature: Curvature, damping: float) -> Step:
    """Fisher Removal of all sets so far, each time from the ``original`` weights, which must have been kept.

    All sets together are brought to the mean of their targets. They must be equally large, and come in order.
    """
    start = snapshot(original)
    forgotten: list[Tensor] = []
    targets: list[float] = []
    total = {name: torch.zeros_like(value) for name, value in start.items()}

    def step(model: PreTrainedModel, forget: Tensor, request: int) -> Path:
        nonlocal total
        forgotten.append(forget)
        total = add(total, ascent_direction(original, forget))
        line = Together(model, removal_direction(curvature, total, damping), torch.cat(forgotten), start)
        line.targets = targets
        return line

    return step


def noise_length(curvature: Curvature, drawn: Vector, damage: float) -> float:
    """The s at which s times the noise ``drawn`` costs ``damage`` nats to second order: s² nᵀCn / 2 = damage.

    In many dimensions nᵀCn of one draw is close to its mean. Raises ValueError if the curvature is zero along n.
    """
    squared = dot(drawn, curvature.matvec(drawn)).item()
    if not squared > 0:
        raise ValueError("the curvature is zero along the noise: no length of it does any damage")
    return math.sqrt(2 * damage / squared)
