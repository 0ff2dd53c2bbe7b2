"""Requests that come one after the other: their sets and targets, and what the model is after each of them."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.experiment.case import REFERENCE_SEED, SECOND_SEED, Case
from unlearnlib.experiment.report import calibrated_membership
from unlearnlib.experiment.request_steps import Opening, Step, served
from unlearnlib.losses import counted_passes, mean_loss
from unlearnlib.measures import relearning
from unlearnlib.measures.evaluation import Reading, mean_kl, membership, min_k_scores, read
from unlearnlib.methods.matching import TOLERANCE, Match
from unlearnlib.methods.tuning import MOST, Choice, Knobs, choose
from unlearnlib.models.training import Run, load_trained
from unlearnlib.weights import Vector, snapshot

PROBED = 64
"""How many sequences at the most the validation loss and the divergence are measured on."""


@dataclass
class RequestSeries:
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
        ``step(**setting)``. Keeps the choice in ``choices``, notes ``settings_tried``,
        ``knobs_at_edge`` and the ``choosing_passes`` it took, and returns the setting.
        """
        model = self.case.original()

        def path(**setting: float) -> Opening:
            return Opening(model, step(**setting), self.sets[:requests], self.targets)

        choice = choose(knobs, path, self.choice, self.targets[requests - 1], most)
        self.choices[method] = choice
        self._keep(method, 0, choice.noted | {"choosing_passes": choice.plain_passes})
        return choice.setting

    def follow(self, method: str, model: PreTrainedModel, step: Step, trail: bool = False) -> list[Match]:
        """Serve all requests with ``step`` on ``model``, in place, and keep what is found.

        Noted of every request: ``before_excess``, the loss of its set minus the target before it was served,
        the ``strength`` of the match, whether it has ``served`` the request (:func:`served`), and the
        ``plain_passes`` that it took. After every ``every`` requests the model is measured. With ``trail`` the
        weights are kept in ``trails``.
        """
        matches, places = [], [snapshot(model)]
        for request, (forget, target) in enumerate(zip(self.sets, self.targets, strict=True), start=1):
            before = mean_loss(model, forget) - target
            with counted_passes() as passes:
                match = step(model, forget, request).to(target)
            noted = {"before_excess": before, "strength": match.strength, "served": float(served(match, target))}
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
            values |= calibrated_membership(Reading.joined(forgotten), holdout, self.reference_scores)
            values |= self._relearned(model)
        self._keep(method, request, values)
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
