"""One set of settings for all: chosen on one case, and carried to other corpora and to requests of any size."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from unlearnlib.cost import Meter
from unlearnlib.curvature.kronecker import kfac
from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.case import Case
from unlearnlib.experiment.report import Report
from unlearnlib.experiment.request_sets import RequestCase
from unlearnlib.losses import mean_loss
from unlearnlib.measures.evaluation import read
from unlearnlib.methods.first_order import ascent_direction, ascent_loss, npo_loss, retain_loss, with_retain
from unlearnlib.methods.fisher_updates import Build, forgetting_noise, removal_direction
from unlearnlib.methods.matching import Line, Walk
from unlearnlib.methods.walks import adam_walk
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.questions import Question, document_questions, fits, task_accuracy
from unlearnlib.weights import snapshot

MAX_STEPS = 200
"""After so many steps of Adam a method that has not reached the target is given up."""

TUNING_STEPS, TUNING_RATE = 10, 1e-3
"""Fine-tuning, a reference that is not matched: its steps of Adam and their learning rate."""

ASKED = 100
"""How many documents of a set are asked their questions at the most."""


def questions_of(case: Case) -> dict[str, list[Question]]:
    """The questions of a case's documents, by metric: ``task_accuracy_forget``, and ``task_accuracy`` on holdout.

    Of the first :data:`ASKED` documents of each set. A question with an option that fills a whole sequence is left
    out. Empty where the corpus has no answers.
    """
    corpus = load_corpus(case.profile.corpus)
    if "answer" not in corpus.column_names:
        return {}
    return {
        metric: [
            question
            for question in document_questions(corpus, case.splits.documents[split][:ASKED], case.seed)
            if fits(case.tokenizer, question, case.profile.length)
        ]
        for metric, split in {"task_accuracy_forget": "forget", "task_accuracy": "holdout"}.items()
    }


class QuestionReport(Report):
    """A report that also asks every model it measures the case's questions, and notes the shares of right answers.

    Where the corpus has no questions it is a report as any other.
    """

    @functools.cached_property
    def questions(self) -> dict[str, list[Question]]:
        """See :func:`questions_of`."""
        return questions_of(self.case)

    def measure(
        self, method: str, model: PreTrainedModel, brief: bool = False, **extra: float
    ) -> dict[str, float]:
        """As :meth:`Report.measure`, and the questions."""
        tokenizer, length = self.case.tokenizer, self.case.profile.length
        answers = {
            metric: task_accuracy(model, tokenizer, asked, length) for metric, asked in self.questions.items()
        }
        return super().measure(method, model, brief, **extra, **answers)


def adam_path(case: Case, method: str, setting: Any) -> Walk:
    """The steps of ``gradient_difference`` at a learning rate, or of ``npo`` at a pair of learning rate and β."""
    if method == "npo":
        rate, beta = setting
        loss = npo_loss(case.original(), beta)
    else:
        rate, loss = setting, with_retain(ascent_loss, 1.0)
    forget, retain = case.splits.forget, case.estimation
    return adam_walk(case.original(), loss, forget, retain, rate, case.seed, MAX_STEPS)


def sweep_settings(
    report: Report, grids: Mapping[str, Iterable[Any]], builds: Mapping[str, Build]
) -> dict[str, pd.DataFrame]:
    """By method, :meth:`Report.sweep` over its grid: of λ where ``builds`` has its curvature, else for Adam."""
    case, tables = report.case, {}
    model, forget = case.original(), case.splits.forget
    delta = ascent_direction(model, forget)

    def removal(C: Curvature, damping: float) -> Line:
        return Line(model, removal_direction(C, delta, damping), forget)

    for method, grid in grids.items():
        if method in builds:
            path = functools.partial(removal, builds[method](model))
        else:
            path = functools.partial(adam_path, case, method)
        tables[method] = report.sweep(grid, path)
    return tables


def references(report: Report) -> None:
    """Measure the models for which nothing is matched.

    The retrained model, the original, a second retrained model, and the original fine-tuned on the retain set.
    """
    case, tuned = report.case, report.case.original()
    tuning = adam_walk(tuned, retain_loss, case.splits.forget, case.estimation, TUNING_RATE, case.seed)
    for _ in range(TUNING_STEPS):
        next(tuning.steps)
    for method, model in {
        "retrained": report.retrained,
        "original": case.original(),
        "retrained:again": case.retrained_again(),
        "finetuned": tuned,
    }.items():
        report.measure(method, model)
        if method.startswith("retrained"):  # the probe says nothing of a model that has not forgotten
            report.probe(method, model)


def first_order(report: Report, chosen: Mapping[str, Any]) -> None:
    """Follow gradient ascent in one step, and gradient difference and NPO with the settings ``chosen``."""
    case, model = report.case, report.case.original()
    delta = ascent_direction(model, case.splits.forget)
    report.follow("gradient_ascent", Line(model, delta, case.splits.forget))
    for method in ("gradient_difference", "npo"):
        report.follow(method, adam_path(case, method, chosen[method]))


def second_order(report: Report, chosen: Mapping[str, float], builds: Mapping[str, Build]) -> dict[str, float]:
    """Follow Fisher Removal over every curvature, with the λ ``chosen``, and Fisher Forgetting over K-FAC.

    Returns the seconds that it took to build each curvature and to solve for its step.
    """
    case, forget, seconds = report.case, report.case.splits.forget, {}
    for method, build in builds.items():
        model = case.original()
        start, delta = snapshot(model), ascent_direction(model, forget)
        with Meter(model.device) as meter:
            C = build(model)
            removal = removal_direction(C, delta, chosen[method])
        seconds[method] = meter.cost.seconds
        report.follow(method, Line(model, removal, forget))
        if method == "kfac":  # half of the noise that would reach the target alone, and the step for the rest
            noise = Line(model, forgetting_noise(C, start, chosen[method], case.seed), forget, start)
            noise.go(noise.to(report.target).strength / 2)
            report.follow("fisher_forgetting", Line(model, removal, forget))
    return seconds


def serve(request: RequestCase, damping: float, learning_rate: float) -> list[dict[str, Any]]:
    """Serve a request by ascent, gradient difference and Fisher Removal over K-FAC, at matched forgetting.

    Returns rows of a results table: of these, of the original and of the retrained model, in nats, with ``size``
    and ``kind`` of the request. ``related_loss`` is measured where there are related sequences.
    """
    forget, holdout, rows = request.splits.forget, request.splits.holdout, []
    retrained, model = request.retrained(), request.original()
    target = mean_loss(retrained, forget)

    def note(method: str, model: PreTrainedModel, **values: float) -> None:
        seen = read(model, holdout, retrained)
        values |= {"holdout_loss": seen.loss, "kl_holdout": seen.divergence}
        values["forget_loss"] = read(model, forget).loss
        if len(request.related):
            values["related_loss"] = read(model, request.related).loss
        rows.extend(row | {"size": request.size, "kind": request.kind} for row in request.rows(method, values))

    note("original", model)
    note("retrained", retrained)
    start, delta = snapshot(model), ascent_direction(model, forget)
    removal = removal_direction(kfac(model, request.estimation, seed=request.seed), delta, damping)
    paths = {
        "gradient_ascent": Line(model, delta, forget, start),
        "kfac": Line(model, removal, forget, start),
        "gradient_difference": adam_path(request, "gradient_difference", learning_rate),
    }
    for method, path in paths.items():
        match = path.to(target)
        note(method, path.model, strength=match.strength, reached=float(match.reached))
    return rows
