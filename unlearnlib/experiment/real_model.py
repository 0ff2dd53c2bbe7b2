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
from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.case import Case
from unlearnlib.experiment.report import Report
from unlearnlib.losses import mean_loss
from unlearnlib.methods.first_order import ascent_direction, ascent_loss, retain_loss, with_retain
from unlearnlib.methods.fisher_updates import Build, RemovalInSteps, forgetting_noise, removal_direction
from unlearnlib.methods.matching import Line, Path, best_setting
from unlearnlib.methods.walks import adam_walk
from unlearnlib.models.loading import half_precision
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.sequences import encode, pack
from unlearnlib.weights import Vector, add, cosine, norm, set_weights, snapshot

T = TypeVar("T")

BATCH_SIZE = 16

FIRST_ORDER = {"finetuned": (retain_loss, 10), "gradient_difference": (with_retain(ascent_loss, 1.0), 60)}
"""What is descended in steps of Adam, and in how many at the most; fine-tuning ends wherever these lead."""

ON_KFAC = ("kfac", "kfac:damped", "fisher_forgetting")

NOISE_SHARE = 0.1
"""Length of the noise of Fisher Forgetting, in lengths of K-FAC's step."""


def in_32_bits(build: Build) -> Build:
    """The same, with all its passes in the format of the weights."""

    def precise(model: PreTrainedModel) -> Curvature:
        with torch.autocast(model.device.type, enabled=False):
            return build(model)

    return precise


def builders(case: Case, m_factors: int, m_dual: int) -> dict[str, Build]:
    """By method, what builds its curvature of the first so many estimation sequences: the forms for large models.

    The dual form of ``m_dual`` sequences is the streaming one; K-FAC, and the diagonal with an expected head, are
    from ``m_factors``, and their labels drawn with seed 0.
    """
    return {
        "fisher_dual": in_32_bits(lambda model: StreamingFisher(model, case.estimation[:m_dual])),
        "fisher_diagonal:expected": in_32_bits(lambda model: diagonal_fisher(model, case.estimation, m_factors)),
        "kfac": in_32_bits(lambda model: kfac(model, case.estimation, m_factors)),
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

    ``model`` is the original, ``start`` its weights, and ``forget_gradient`` is Δ there. ``chosen`` has λ by
    method, as :meth:`sweep` finds it or an earlier case has. Only K-FAC's curvature at the start is kept, of the
    others their step: two curvatures of a large model may not fit into memory. ``kept`` are weights to come back
    to, by method.
    """

    def __init__(self, report: Report, builds: dict[str, Build], chosen: dict[str, float] | None = None) -> None:
        self.report, self.case, self.builds = report, report.case, builds
        self.chosen = {} if chosen is None else chosen
        self.model = self.case.original()
        self.start = snapshot(self.model)
        self.precision = functools.partial(half_precision, self.model.device)
        self.directions: dict[str, Vector] = {}
        self.kept: dict[str, Vector] = {}

    @functools.cached_property
    def forget_gradient(self) -> Vector:
        """Δ, the gradient of the forget loss at the original weights."""
        set_weights(self.model, self.start)
        with self.precision():
            return ascent_direction(self.model, self.case.splits.forget)

    @functools.cached_property
    def factors(self) -> Kronecker:
        """K-FAC's curvature at the original weights."""
        set_weights(self.model, self.start)
        return self.builds["kfac"](self.model)

    def line(self, direction: Vector, start: Vector | None = None) -> Line:
        """The path along a direction, from the original weights unless others are given."""
        return Line(self.model, direction, self.case.splits.forget, self.start if start is None else start)

    def sweep(self, method: str, grid: Sequence[float]) -> pd.DataFrame:
        """:meth:`Report.sweep` of λ; ``chosen`` has the best afterwards."""
        C, delta = self._curvature(method), self.forget_gradient
        with self.precision():
            table = self.report.sweep(grid, lambda damping: self.line(removal_direction(C, delta, damping)))
        self.chosen[method] = best_setting(table)
        self.directions[method] = removal_direction(C, delta, self.chosen[method])
        return table

    def _curvature(self, method: str) -> Curvature:
        if method in ON_KFAC:
            return self.factors
        set_weights(self.model, self.start)
        return self.builds[method](self.model)

    def direction(self, method: str) -> Vector:
        """The step of Fisher Removal at λ as chosen, or that of gradient ascent."""
        if method == "gradient_ascent":
            return self.forget_gradient
        method = "kfac" if method == "fisher_forgetting" else method
        if method not in self.directions:
            C = self._curvature(method)
            self.directions[method] = removal_direction(C, self.forget_gradient, self.chosen[method])
        return self.directions[method]

    def path(self, method: str, steps: int, learning_rate: float) -> Path:
        """The way of a method from the original weights; ``steps`` are those of K-FAC where it takes several."""
        set_weights(self.model, self.start)
        case, model, forget = self.case, self.model, self.case.splits.forget
        if method in FIRST_ORDER:
            loss, most = FIRST_ORDER[method]
            return adam_walk(model, loss, forget, case.estimation, learning_rate, case.seed, most, BATCH_SIZE)
        if method == "kfac:refreshed":
            at_start = iter([self.factors])  # the first step is where the factors have been built already

            def build(model: PreTrainedModel) -> Curvature:
                return next(at_start, None) or self.builds["kfac"](model)

            return RemovalInSteps(model, forget, build, self.chosen["kfac"], steps, refresh=True)
        if method == "kfac:held":
            return RemovalInSteps(
                model, forget, lambda _: self.factors, self.chosen["kfac"], steps, False, hold=case.estimation
            )
        if method == "fisher_forgetting":
            return self.line(self.direction(method), self.noisy_start())
        return self.line(self.direction(method))

    def noisy_start(self) -> Vector:
        """The original weights with the noise of Fisher Forgetting, once K-FAC's step has been matched."""
        noise = forgetting_noise(self.factors, self.start, self.chosen["kfac"], self.case.seed)
        length = self.report.matches["kfac"].strength * norm(self.direction("kfac"))
        return add(self.start, noise, NOISE_SHARE * length / norm(noise))

    def run(self, methods: Iterable[str], steps: int, learning_rate: float, keep: Sequence[str] = ()) -> None:
        """Follow each method to matched forgetting and measure what it makes; keep the weights of some."""
        with self.precision():
            self.report.measure("original", self.model)
            self.report.reference("retrained", self.report.retrained)
            for method in methods:
                self.report.follow(method, self.path(method, steps, learning_rate))
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
            return removal_direction(self.factors, delta, self.chosen["kfac"])

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
