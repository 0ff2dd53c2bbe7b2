"""Requests that come one after the other: the steps that serve them, and what the model is after each of them."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam
from transformers import PreTrainedModel

from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.case import Case
from unlearnlib.losses import mean_loss
from unlearnlib.measures.evaluation import Reading, mean_kl, membership, read
from unlearnlib.methods import first_order
from unlearnlib.methods.fisher_updates import Build, forgetting_noise, removal_direction
from unlearnlib.methods.matching import Line, Match, Walk
from unlearnlib.models.training import Run, load_trained
from unlearnlib.weights import Vector, difference, dot, parameters, snapshot

Step = Callable[[PreTrainedModel, Tensor, float, int], Match]
"""Serves one request in place: of a model, the set to forget [n, tokens], its target in nats and the request's
number, counted from 1. No step is taken for a set whose loss is at its target already, or above it."""


PROBED = 64
"""How many sequences at the most the validation loss and the divergence are measured on."""


@dataclass
class Series:
    """Requests of equal size to the original model of one case, and a table of what was measured after each.

    The sets are cut from the training sequences in order: first the case's forget sequences, then its first retain
    sequences. A set's target is its loss in the model that is trained without *all* of them. The model is measured
    after every ``every`` requests. Of the validation sequences one half is for choosing settings, and the other,
    which nothing has read, for measuring what the choice has cost.

    Raises ValueError if the requests would reach into the validation sequences or leave nothing to estimate
    curvature on, or if there are fewer than two validation sequences.
    """

    case: Case
    number: int
    size: int
    every: int = 1
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        most = len(self.case.splits.forget) + len(self.case.estimation) - 1
        if self.number < 1 or self.size < 1 or self.number * self.size > most:
            raise ValueError(
                f"cannot make {self.number} requests of {self.size} sequences: there must be at least one of "
                f"each, and together no more than {most}"
            )

        if len(self.case.validation) < 2:
            raise ValueError(
                "one validation sequence cannot be parted into one to choose by and one to measure: take 16 "
                "retain sequences or more"
            )

    @property
    def choice(self) -> Tensor:
        """The first half of the validation sequences: settings are chosen by the loss on these."""
        return self.case.validation[: len(self.case.validation) // 2]

    @property
    def probed(self) -> Tensor:
        """The other half, ``PROBED`` of them at the most: the damage to what stays is measured on these."""
        return self.case.validation[len(self.choice) :][:PROBED]

    @property
    def sets(self) -> tuple[Tensor, ...]:
        """The sets to forget, each [size, tokens], in the order of the requests."""
        return self.case.splits.train[: self.number * self.size].split(self.size)

    @property
    def kept(self) -> Tensor:
        """Sequences that no request names, validation not among them: for curvature and for retain terms."""
        return self.case.splits.train[self.number * self.size : -len(self.case.validation)]

    def run(self, served: int) -> Run:
        """The training run behind the retrained model of the moment after ``served`` requests."""
        return replace(self.case.runs()["original"], sequences=self.case.splits.train[served * self.size :])

    @functools.cached_property
    def retrained(self) -> PreTrainedModel:
        """The model that is trained without any of the sets, from the same initial weights as the original."""
        return load_trained(self.run(self.number))

    @functools.cached_property
    def targets(self) -> list[float]:
        """The loss of each set in the retrained model, in nats."""
        return [mean_loss(self.retrained, forget) for forget in self.sets]

    def follow(self, method: str, model: PreTrainedModel, step: Step) -> list[Match]:
        """Serve all requests with ``step`` on ``model``, in place, and keep what is found.

        Noted of every request: ``before_excess``, the loss of its set minus the target before it was served, and
        ``strength`` and ``reached`` of the match. After every ``every`` requests the model is measured.
        """
        matches = []
        for request, (forget, target) in enumerate(zip(self.sets, self.targets, strict=True), start=1):
            before = mean_loss(model, forget) - target
            match = step(model, forget, target, request)
            served = {"before_excess": before, "strength": match.strength, "reached": float(match.reached)}
            self._keep(method, request, served)
            if request % self.every == 0:
                self.measure(method, model, request)
            matches.append(match)
        return matches

    def measure(self, method: str, model: PreTrainedModel, request: int) -> dict[str, float]:
        """Measure ``model`` after request number ``request`` (0: before the first); keep the rows, return the values.

        ``validation_loss`` is that of ``probed``, which no step and no choice reads, ``kl_holdout`` the divergence
        from the retrained model on ``PROBED`` holdout sequences, ``membership_auc`` that of all sets forgotten so
        far against holdout. Over the sets of *earlier* requests, ``earlier_excess`` is the mean of loss minus
        target and ``earlier_lowest`` the smallest. Once the case's own forget sequences are forgotten,
        and no more, ``kl_moment`` is the divergence from its retrained model, the one of that moment.
        """
        forgotten = [read(model, forget) for forget in self.sets[:request]]
        holdout = read(model, self.case.splits.holdout)
        probed = self.case.splits.holdout[:PROBED]
        values = {
            "holdout_loss": holdout.loss,
            "validation_loss": read(model, self.probed).loss,
            "kl_holdout": mean_kl(self.retrained, model, probed),
        }
        excesses = [reading.loss - target for reading, target in zip(forgotten, self.targets, strict=False)]
        if request >= 1:
            values["membership_auc"] = membership(Reading.joined(forgotten), holdout)["membership_auc"]
            values["forget_excess"] = excesses[-1]
        if request >= 2:
            values["earlier_excess"] = sum(excesses[:-1]) / (request - 1)
            values["earlier_lowest"] = min(excesses[:-1])
        if request * self.size == len(self.case.splits.forget):
            values["kl_moment"] = mean_kl(self.case.retrained(), model, probed)
        self._keep(method, request, values)
        return values

    def _keep(self, method: str, request: int, values: dict[str, float]) -> None:
        self.rows += [row | {"request": request} for row in self.case.rows(method, values)]


def ascent_step(model: PreTrainedModel, forget: Tensor, target: float, request: int) -> Match:
    """One step along the gradient of the forget loss, as long as the target wants it."""
    return Line(model, first_order.ascent_direction(model, forget), forget).to(target)


def difference_step(kept: Tensor, learning_rate: float, most: int, seed: int) -> Step:
    """Gradient difference with Adam, ``most`` steps a request at the most, stopped at the target."""

    def step(model: PreTrainedModel, forget: Tensor, target: float, request: int) -> Match:
        loss, optimizer = first_order.gradient_difference_loss, Adam(model.parameters(), lr=learning_rate)
        steps = first_order.descend(model, loss, forget, kept, optimizer, seed=1000 * seed + request)
        return Walk(model, steps, forget, max_steps=most).to(target)

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
    noise C^(-1/4) n is added, scaled so that C expects that many nats of damage from it. It is drawn anew for each
    request, from ``seed``.
    """
    current: list[Curvature] = []

    def step(model: PreTrainedModel, forget: Tensor, target: float, request: int) -> Match:
        if refresh or not current:
            current[:] = [build(model)]
        [curvature] = current
        start, delta = snapshot(model), first_order.ascent_direction(model, forget)
        if kept is not None:
            delta = difference(delta, first_order.ascent_direction(model, kept))
        direction = removal_direction(curvature, delta, damping)
        if noise:
            drawn = forgetting_noise(curvature, start, damping, seed=1000 * seed + request)
            length = noise_length(curvature, drawn, noise)
            start = {name: value + length * drawn[name] for name, value in start.items()}
        return Line(model, direction, forget, start).to(target)

    return step


def noise_step(curvature: Curvature, damping: float, seed: int) -> Step:
    """Noise C^(-1/4) n alone, as long as the target wants it; drawn anew at each request."""

    def step(model: PreTrainedModel, forget: Tensor, target: float, request: int) -> Match:
        noise = forgetting_noise(curvature, parameters(model), damping, seed=1000 * seed + request)
        return Line(model, noise, forget).to(target)

    return step


def joint_step(original: PreTrainedModel, curvature: Curvature, damping: float) -> Step:
    """Fisher Removal of all sets so far, each time from the ``original`` weights, which must have been kept.

    All sets together are brought to the mean of their targets. They must be equally large, and come in order.
    """
    start, forgotten, targets = snapshot(original), [], []
    total = {name: torch.zeros_like(value) for name, value in start.items()}

    def step(model: PreTrainedModel, forget: Tensor, target: float, request: int) -> Match:
        forgotten.append(forget)
        targets.append(target)
        for name, gradient in first_order.ascent_direction(original, forget).items():
            total[name] += gradient
        direction = removal_direction(curvature, total, damping)
        return Line(model, direction, torch.cat(forgotten), start).to(sum(targets) / len(targets))

    return step


def noise_length(curvature: Curvature, drawn: Vector, damage: float) -> float:
    """The s at which s times the noise ``drawn`` costs ``damage`` nats to second order: s² nᵀCn / 2 = damage.

    In many dimensions nᵀCn of one draw is close to its mean. Raises ValueError if the curvature is zero along n.
    """
    squared = dot(drawn, curvature.matvec(drawn)).item()
    if not squared > 0:
        raise ValueError("the curvature is zero along the noise: no length of it does any damage")
    return math.sqrt(2 * damage / squared)
