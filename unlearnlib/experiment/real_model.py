"""A real language model asked to forget: every method on one case, with room for one curvature at a time.

Losses and gradients are taken in half precision where the device has it
(:func:`unlearnlib.models.loading.half_precision`); curvatures are built and solved with in 32 bits on all devices.
"""

import functools
import gc
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.cost import Cost, measure, plain_pass
from unlearnlib.curvature.fisher_dual_streaming import StreamingFisher
from unlearnlib.curvature.kronecker import Kronecker, diagonal_fisher, from_factors, kfac, layer_factors
from unlearnlib.curvature.protocol import Curvature, take
from unlearnlib.experiment.case import Case
from unlearnlib.experiment.contenders import Contender
from unlearnlib.experiment.report import Report
from unlearnlib.losses import counted_passes, mean_loss
from unlearnlib.methods.first_order import ascent_direction, ascent_loss, with_retain
from unlearnlib.methods.fisher_updates import Build, RemovalInSteps, removal_direction
from unlearnlib.methods.matching import Line, Path
from unlearnlib.methods.tuning import Knobs
from unlearnlib.methods.walks import adam_walk
from unlearnlib.models.loading import half_precision
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.sequences import encode, pack
from unlearnlib.weights import Vector, cosine, set_weights, snapshot

T = TypeVar("T")

BATCH_SIZE = 8
"""How many sequences of each set a step of gradient difference reads."""

ON_KFAC = ("kfac", "kfac:damped", "kfac:held", "kfac:refreshed")


def in_32_bits(build: Build) -> Build:
    """The same, with all its passes in the format of the weights."""

    def precise(model: PreTrainedModel) -> Curvature:
        with torch.autocast(model.device.type, enabled=False):
            return build(model)

    return precise


def builders(case: Case, m_factors: int, m_dual: int) -> dict[str, Build]:
    """By method, what builds its curvature of the first so many estimation sequences: the forms for large models.

    The dual form of ``m_dual`` sequences is the streaming one; K-FAC, and the diagonal with an expected head, are
    from ``m_factors``, and their labels drawn with seed 0. Raises ValueError, before anything is built, as
    :func:`unlearnlib.curvature.protocol.take` for ``m_factors``.
    """
    known = take(case.estimation, m_factors)
    return {
        "fisher_dual": in_32_bits(lambda model: StreamingFisher(model, case.estimation[:m_dual])),
        "fisher_diagonal:expected": in_32_bits(lambda model: diagonal_fisher(model, known)),
        "kfac": in_32_bits(lambda model: kfac(model, known)),
    }


def compare_formats(
    model: PreTrainedModel, forget: Tensor, retain: Tensor, dampings: Iterable[float] = (1e-4, 1e-6)
) -> tuple[pd.Series, float]:
    """What rounding to bfloat16 in the passes changes in a gradient, in K-FAC's step and in a loss.

    Returns cosines with the same in 32 bits, of the gradient of the loss on ``forget`` [n, tokens] and, by λ, of
    K-FAC's step with factors of ``retain`` [m, tokens]; and the difference of the loss in nats.
    """
    vectors, factors, losses = {}, {}, {}
    for rounding in (False, True):
        with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False, enabled=rounding):
            vectors[rounding] = ascent_direction(model, forget)
            losses[rounding] = mean_loss(model, forget)
            passes = layer_factors(model, retain)
        full = {name: (left.float(), right.float()) for name, (left, right) in passes.items()}
        factors[rounding] = from_factors(model, full)
    cosines = {"gradient of the forget loss": cosine(vectors[False], vectors[True])}
    for damping in dampings:
        steps = (removal_direction(factors[rounding], vectors[False], damping) for rounding in (True, False))
        cosines[f"K-FAC's step, rounded in the passes for its factors, λ = {damping:.0e}"] = cosine(*steps)
    return pd.Series(cosines, name="cosine with the same in 32 bits"), abs(losses[True] - losses[False])


class Unlearner:
    """Takes the original model of a case to matched forgetting by one method after another.

    ``model`` is the original, ``start`` its weights, and ``forget_gradient`` is Δ there. ``chosen`` has a setting
    by method, as :meth:`choose` finds it or an earlier case has. Gradient difference is given up after
    ``max_steps`` steps. Only K-FAC's curvature at the start is kept, of
    the others their step: two curvatures of a large model may not fit into memory. ``spent`` are the plain passes
    that Δ and the curvatures took, by name. ``kept`` are weights to come back to, by method.
    """

    def __init__(
        self,
        report: Report,
        builds: dict[str, Build],
        max_steps: int,
        chosen: dict[str, dict[str, float]] | None = None,
    ) -> None:
        self.report, self.case, self.builds, self.max_steps = report, report.case, builds, max_steps
        self.chosen = {} if chosen is None else chosen
        self.model = self.case.original()
        self.start = snapshot(self.model)
        self.precision = functools.partial(half_precision, self.model.device)
        self.directions: dict[str, Vector] = {}
        self.kept: dict[str, Vector] = {}
        self.spent: dict[str, float] = {}

    @functools.cached_property
    def forget_gradient(self) -> Vector:
        """Δ, the gradient of the forget loss at the original weights."""
        set_weights(self.model, self.start)
        with self.precision(), counted_passes() as passes:
            gradient = ascent_direction(self.model, self.case.splits.forget)
        self.spent["gradient_ascent"] = passes.plain
        return gradient

    @functools.cached_property
    def factors(self) -> Kronecker:
        """K-FAC's curvature at the original weights."""
        return self._built("kfac")

    def line(self, direction: Vector) -> Line:
        """The path along a direction from the original weights."""
        return Line(self.model, direction, self.case.splits.forget, self.start)

    def choose(self, method: str, knobs: Knobs, most: int) -> pd.DataFrame:
        """:meth:`Report.choose` a method's setting, which ``chosen`` has afterwards; returns what was tried.

        The column ``excess`` is the validation loss above the retrained model's, in nats.
        """
        if method == "gradient_difference":
            path = self._difference
        else:
            C, delta = self._curvature(method), self.forget_gradient

            def path(damping: float) -> Path:
                return self.line(removal_direction(C, delta, damping))

        with self.precision():
            self.chosen[method] = self.report.choose(method, Contender("forget, retain", knobs, path), most)
            tried = self.report.tried(method)
        if method != "gradient_difference":
            self.directions[method] = removal_direction(C, delta, self.chosen[method]["damping"])
        return tried

    def _difference(self, learning_rate: float, retain_weight: float) -> Path:
        """The path of gradient difference in steps of Adam."""
        set_weights(self.model, self.start)
        loss, case = with_retain(ascent_loss, retain_weight), self.case
        return adam_walk(
            self.model,
            loss,
            case.splits.forget,
            case.estimation,
            learning_rate,
            case.seed,
            self.max_steps,
            BATCH_SIZE,
        )

    def _built(self, method: str) -> Curvature:
        set_weights(self.model, self.start)
        with counted_passes() as passes:
            curvature = self.builds[method](self.model)
        self.spent[method] = passes.plain
        return curvature

    def _curvature(self, method: str) -> Curvature:
        return self.factors if method in ON_KFAC else self._built(method)

    def direction(self, method: str) -> Vector:
        """The step of Fisher Removal at λ as chosen, or that of gradient ascent."""
        if method == "gradient_ascent":
            return self.forget_gradient
        if method not in self.directions:
            C = self._curvature(method)
            self.directions[method] = removal_direction(C, self.forget_gradient, self.chosen[method]["damping"])
        return self.directions[method]

    def path(self, method: str, steps: int) -> Path:
        """The way of a method from the original weights; ``steps`` are those of K-FAC where it takes several."""
        set_weights(self.model, self.start)
        model, forget = self.model, self.case.splits.forget
        if method == "gradient_difference":
            return self._difference(**self.chosen[method])
        if method == "kfac:refreshed":
            at_start = iter([self.factors])  # the first step is where the factors have been built already

            def build(model: PreTrainedModel) -> Curvature:
                return next(at_start, None) or self.builds["kfac"](model)

            return RemovalInSteps(model, forget, build, self.chosen["kfac"]["damping"], steps, refresh=True)
        if method == "kfac:held":
            return RemovalInSteps(
                model,
                forget,
                lambda _: self.factors,
                self.chosen["kfac"]["damping"],
                steps,
                refresh=False,
                hold=self.case.estimation,
            )
        return self.line(self.direction(method))

    def made_before(self, method: str) -> float:
        """The plain passes that have been made for a method already: those of Δ and of its curvature."""
        if method == "gradient_difference":
            return 0.0
        needed = {"gradient_ascent", "kfac" if method in ON_KFAC else method}
        return sum(passes for name, passes in self.spent.items() if name in needed)

    def run(self, methods: Iterable[str], steps: int, keep: Sequence[str] = ()) -> None:
        """Follow each method to matched forgetting and measure what it makes; keep the weights of some."""
        with self.precision():
            self.report.measure("original", self.model)
            self.report.reference("retrained", self.report.retrained)
            for method in methods:
                before = self.made_before(method)
                self.report.follow(method, functools.partial(self.path, method, steps), before)
                if method in keep:
                    self.kept[method] = snapshot(self.model)
                gc.collect()  # what was captured in passes goes in circles, and is large
        set_weights(self.model, self.start)

    def of_each(self, function: Callable[[PreTrainedModel], T]) -> dict[str, T]:
        """What a function says of the original, the retrained model and those kept, by method."""
        values = {}
        for method in ("original", "retrained", *self.kept):
            set_weights(self.model, self.kept.get(method, self.start))
            with self.precision():
                values[method] = function(self.report.retrained if method == "retrained" else self.model)
        set_weights(self.model, self.start)
        return values

    def bill(self, number: int) -> dict[str, Cost]:
        """What a request costs on built factors, and what passes over ``number`` sequences cost, by name.

        The request is answered with the forget gradient and K-FAC's step, before any search for its strength.
        """
        batch, device = self.case.estimation[:number], self.model.device

        def answer() -> Vector:
            with self.precision():
                delta = ascent_direction(self.model, self.case.splits.forget)
            return removal_direction(self.factors, delta, self.chosen["kfac"]["damping"])

        request = measure(answer, device, runs=1)
        with self.precision():
            pass_for_factors = measure(lambda: layer_factors(self.model, batch), device, runs=1)
            plain = measure(lambda: plain_pass(self.model, batch), device, runs=1)
        return {"request": request, "factors": pass_for_factors, "plain": plain}


def elsewhere(case: Case, number: int) -> dict[str, Tensor]:
    """By corpus the model was not tuned on, its first ``number`` sequences [number, tokens], cut as the case's."""

    def sample(corpus: str) -> Tensor:
        tokens = [encode(case.tokenizer, text) for text in load_corpus(corpus)["text"][:400]]
        return pack(tokens, case.tokenizer.eos_token_id, case.profile.length)[:number]

    return {corpus: sample(corpus) for corpus in ("reuters", "socialiqa", "maths")}
