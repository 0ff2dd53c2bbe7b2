"""Requests that come one after the other: the steps that serve them, and what the model is after each of them."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.case import REFERENCE_SEED, SECOND_SEED, Case
from unlearnlib.experiment.contenders import MAX_STEPS
from unlearnlib.experiment.report import ENOUGH
from unlearnlib.losses import counted_passes, mean_loss
from unlearnlib.measures import relearning
from unlearnlib.measures.attacks import calibrated, true_positive_rate
from unlearnlib.measures.evaluation import Reading, mean_kl, membership, membership_auc, min_k_scores, read
from unlearnlib.methods.first_order import ascent_direction, ascent_loss, with_retain
from unlearnlib.methods.fisher_updates import Build, forgetting_noise, removal_direction
from unlearnlib.methods.matching import TOLERANCE, Line, Match, Path
from unlearnlib.methods.tuning import MOST, Choice, Knobs, choose
from unlearnlib.methods.walks import adam_walk, sgd_walk
from unlearnlib.models.training import Run, load_trained
from unlearnlib.weights import Vector, add, difference, dot, parameters, set_weights, snapshot

Step = Callable[[PreTrainedModel, Tensor, int], Path]
"""How a method serves one request: from the model as it now is, the set to forget [n, tokens] and the request's
number, counted from 1, the path along which the model then goes, in place, until the set has its target. It does
not move for a set whose loss is there already, or above."""

PROBED = 64
"""How many sequences at the most the validation loss and the divergence are measured on."""


@dataclass
class Series:
    """Requests of equal size to the original model of one case: ``rows`` tell what was measured after each.

    The sets are cut from the training sequences in order: first the case's forget sequences, then its first retain
    sequences. A set's target is its loss in the model that is trained without *all* of them. The model is measured
    after every ``every`` requests. Of the validation sequences one half is for choosing settings, and the other,
    which nothing has read, for measuring what the choice has cost. By method, ``choices`` are the settings that
    were chosen, and ``trails`` the weights that a model had at first and after each request, of methods that were
    followed with ``trail``.

    Raises ValueError if the requests would reach into the validation sequences or leave nothing to estimate
    curvature on, or if there are fewer than two validation sequences.
    """

    case: Case
    number: int
    size: int
    every: int = 1
    rows: list[dict[str, Any]] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    trails: dict[str, list[Vector]] = field(default_factory=dict)

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

    def references(self) -> Iterator[PreTrainedModel]:
        """The profile's reference models, strangers to *all* the sets and to holdout; compare ``Case.references``.

        Those of the case have been trained on the sets that are cut from its retain sequences.
        """
        for i in range(self.case.profile.references):
            yield load_trained(
                replace(self.run(self.number), seed=self.case.seed + REFERENCE_SEED + SECOND_SEED * i)
            )

    @functools.cached_property
    def reference_scores(self) -> tuple[Tensor, Tensor] | None:
        """Min-K% scores of the reference models on all the sets and on holdout, each [models, n]."""
        rows = torch.cat(self.sets), self.case.splits.holdout
        scores = [[min_k_scores(read(model, one).losses) for one in rows] for model in self.references()]
        return tuple(map(torch.stack, zip(*scores, strict=True))) if scores else None

    @functools.cached_property
    def retrained_curves(self) -> tuple[list[float], list[float]]:
        """How the retrained model relearns the last set, and the control's curve."""
        return self._relearn(self.retrained)

    @functools.cached_property
    def floor(self) -> float:
        """The divergence in nats between two retrained models of different seed, on ``PROBED`` holdout sequences.

        They are those of the case, which have forgotten its own forget sequences.
        """
        return mean_kl(self.case.retrained(), self.case.retrained_again(), self.case.splits.holdout[:PROBED])

    def reference(self) -> None:
        """Measure the original model before the first request, and the retrained model beside all others."""
        self.measure("original", self.case.original(), 0)
        for request in range(self.every, self.number + 1, self.every):
            self.measure("retrained", self.retrained, request)

    def choose(
        self, method: str, knobs: Knobs, step: Callable[..., Step], requests: int, most: int = MOST
    ) -> dict[str, float]:
        """Choose a method's setting by :func:`unlearnlib.methods.tuning.choose`, on the sequences of ``choice``.

        What counts is the loss on these once the first ``requests`` sets have been served, in turn, by
        ``step(**setting)``. Keeps the choice in ``choices``, notes ``settings_tried`` and the
        ``choosing_passes`` it took, and returns the setting.
        """
        model = self.case.original()

        def path(**setting: float) -> Path:
            return Opening(model, step(**setting), self.sets[:requests], self.targets)

        choice = choose(knobs, path, self.choice, self.targets[requests - 1], most)
        self.choices[method] = choice
        self._keep(method, 0, {"settings_tried": choice.tried, "choosing_passes": choice.plain_passes})
        return choice.setting

    def follow(self, method: str, model: PreTrainedModel, step: Step, trail: bool = False) -> list[Match]:
        """Serve all requests with ``step`` on ``model``, in place, and keep what is found.

        Noted of every request: ``before_excess``, the loss of its set minus the target before it was served,
        ``strength`` and ``reached`` of the match, and the ``plain_passes`` that it took. After every ``every``
        requests the model is measured. With ``trail`` the weights are kept in ``trails``.
        """
        matches, places = [], [snapshot(model)]
        for request, (forget, target) in enumerate(zip(self.sets, self.targets, strict=True), start=1):
            before = mean_loss(model, forget) - target
            with counted_passes() as passes:
                match = step(model, forget, request).to(target)
            noted = {"before_excess": before, "strength": match.strength, "reached": float(match.reached)}
            self._keep(method, request, noted | {"plain_passes": passes.plain})
            if request % self.every == 0:
                self.measure(method, model, request)
            if trail:
                places.append(snapshot(model))
            matches.append(match)
        if trail:
            self.trails[method] = places
        return matches

    def measure(self, method: str, model: PreTrainedModel, request: int) -> dict[str, float]:
        """Measure ``model`` after request number ``request`` (0: before the first). Keep and return the values.

        ``validation_loss`` is that of ``probed``, which no step and no choice reads, ``kl_holdout`` the divergence
        from the retrained model on ``PROBED`` holdout sequences, ``membership_auc`` that of all sets forgotten so
        far against holdout. Over the sets of *earlier* requests, ``earlier_excess`` is the mean of loss minus
        target and ``earlier_lowest`` the smallest. Once the case's own forget sequences are forgotten,
        and no more, ``kl_moment`` is the divergence from its retrained model, the one of that moment.

        After the last request come the calibrated attack on all the sets, ``membership_auc_calibrated`` and where
        holdout is large enough ``membership_tpr``, and what the model relearns of the last set beyond the
        retrained model, in nats: ``relearned_nats``, and net of the control ``relearned_net_nats``.
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
        if request == self.number:
            values |= self._calibrated(Reading.joined(forgotten), holdout) | self._relearned(model)
        self._keep(method, request, values)
        return values

    def _calibrated(self, forgotten: Reading, holdout: Reading) -> dict[str, float]:
        if self.reference_scores is None:
            return {}
        members, others = (
            calibrated(min_k_scores(one.losses), scores)
            for one, scores in zip((forgotten, holdout), self.reference_scores, strict=True)
        )
        values = {"membership_auc_calibrated": membership_auc(members, others)}
        if len(others) >= ENOUGH:
            values["membership_tpr"] = true_positive_rate(members, others)
        return values

    def _relearned(self, model: PreTrainedModel) -> dict[str, float]:
        if self.size < 2:
            return {}  # nothing to teach of a set without all of it
        own = self.retrained_curves
        curves = own if model is self.retrained else self._relearn(model)
        return {
            "relearned_nats": relearning.fall(curves[0]) - relearning.fall(own[0]),
            "relearned_net_nats": relearning.net_fall(curves) - relearning.net_fall(own),
        }

    def _relearn(self, model: PreTrainedModel) -> tuple[list[float], list[float]]:
        profile = self.case.profile
        return relearning.probe(
            model, self.sets[-1], self.case.splits.holdout, profile.relearning_steps, profile.relearning_rate
        )

    def _keep(self, method: str, request: int, values: dict[str, float]) -> None:
        self.rows += [row | {"request": request} for row in self.case.rows(method, values)]


def broken_down(table: pd.DataFrame) -> pd.Series:
    """By method and seed, the first request whose set was forgotten before it was asked for.

    Its loss was above its target by more than the tolerance of matched forgetting. ``table`` has the ``rows`` of
    some series; a method that this never happened to is left out.
    """
    beforehand = table[(table["metric"] == "before_excess") & (table["value"] > TOLERANCE)]
    return beforehand.groupby(["method", "seed"])["request"].min()


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
            all(match.loss >= wanted - TOLERANCE for wanted, match in matches),
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
    noise C^(-1/4) n is added, scaled so that C expects that many nats of damage from it. It is drawn anew for each
    request, from ``seed``.
    """
    current: list[Curvature] = []

    def step(model: PreTrainedModel, forget: Tensor, request: int) -> Path:
        if refresh or not current:
            current[:] = [build(model)]
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
