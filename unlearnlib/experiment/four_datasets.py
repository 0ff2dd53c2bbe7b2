"""One set of settings for all: chosen on one case, and carried to other corpora and to requests of any size."""

import functools
from typing import Any

from transformers import PreTrainedModel

from unlearnlib.curvature.kronecker import kfac
from unlearnlib.experiment.case import Case
from unlearnlib.experiment.comparison import Settings
from unlearnlib.experiment.contenders import contenders_on
from unlearnlib.experiment.report import Report
from unlearnlib.experiment.request_sets import RequestCase
from unlearnlib.losses import counted_passes, mean_loss
from unlearnlib.measures.evaluation import read
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.questions import Question, document_questions, fits, task_accuracy

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


def serve(request: RequestCase, chosen: Settings) -> list[dict[str, Any]]:
    """Serve a request by every method of ``chosen``, with its setting, at matched forgetting.

    Of the curvatures there is K-FAC's. Returns rows of a results table: of the original, of the retrained model
    and of each method, with ``size`` and ``kind`` of the request; losses and divergences are in nats.
    ``related_loss`` is measured where there are related sequences.
    """
    forget, holdout, rows = request.splits.forget, request.splits.holdout, []
    retrained = request.retrained()
    target = mean_loss(retrained, forget)

    def note(method: str, model: PreTrainedModel, **values: float) -> None:
        seen = read(model, holdout, retrained)
        values |= {"holdout_loss": seen.loss, "kl_holdout": seen.divergence}
        values["forget_loss"] = read(model, forget).loss
        if len(request.related):
            values["related_loss"] = read(model, request.related).loss
        rows.extend(row | {"size": request.size, "kind": request.kind} for row in request.rows(method, values))

    note("original", request.original())
    note("retrained", retrained)
    builds = {"kfac": functools.partial(kfac, sequences=request.estimation, seed=request.seed)}
    for method, setting in chosen.items():
        with counted_passes() as passes:
            path = contenders_on(request, builds)[method].path(**setting)
            match = path.to(target)
        reached = {"strength": match.strength, "reached": float(match.reached), "plain_passes": passes.plain}
        note(method, path.model, **reached)
    return rows
