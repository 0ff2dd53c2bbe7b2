"""Memories that nobody planted: what a model has learnt of its texts by heart, why, and what is left of it."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib.experiment.case_studies import PostCase
from unlearnlib.experiment.comparison import Settings
from unlearnlib.experiment.contenders import MAX_STEPS, contenders_on
from unlearnlib.experiment.report import Report
from unlearnlib.measures.evaluation import Reading, read
from unlearnlib.methods.fisher_updates import Build
from unlearnlib.texts.bigrams import Bigrams
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.masking import common_words, mask_rare
from unlearnlib.texts.posts import load_posts
from unlearnlib.texts.sequences import encode, encode_after

CAUSES = ("repeated elsewhere", "templated", "guessable", "over-learned")
"""Why a memory may be there, in the order in which they are tried."""

PLANTED = "planted"
"""What takes the place of a cause for secrets that were planted."""

RUN = 28
"""Two licences that share so many words in a row are two versions of one, of which the first takes part."""


@dataclass(frozen=True)
class Documents:
    """The texts of a corpus by id, and who wrote each as far as is known. Real people: never shown unmasked."""

    texts: dict[str, str] = field(repr=False)
    authors: dict[str, str] = field(repr=False)

    @functools.cached_property
    def common(self) -> frozenset[str]:
        """The words that may be shown: see :func:`unlearnlib.texts.masking.common_words`."""
        return common_words(self.texts.values(), self.authors.values())

    def masked(self, text: str) -> str:
        """A piece of a text as it may be shown, on one line."""
        return " ".join(mask_rare(text, self.common).split())

    def words(self, masked: str) -> list[str]:
        """The words of a masked text that the mask has left."""
        return [word for word in re.findall(r"\w+", masked) if word.casefold() in self.common]


def load_documents(corpus: str) -> Documents:
    """The texts of real people called ``posts``, ``licences`` or by another corpus's name.

    The author of a post is its sender; that of a licence the family it belongs to, such as all of Creative
    Commons; elsewhere every text has its own. Raises as :func:`unlearnlib.texts.corpora.load_corpus`.
    """
    rows = load_posts() if corpus == "posts" else load_corpus(corpus).to_list()
    texts = {row["id"]: row["text"] for row in rows}
    if corpus == "posts":
        return Documents(texts, {name: text.split("\n")[1] for name, text in texts.items()})
    if corpus == "licences":
        texts = _distinct(texts)
        return Documents(texts, {name: name.split("-")[0] for name in texts})
    return Documents(texts, {name: name for name in texts})


def _distinct(texts: Mapping[str, str], words: int = 160) -> dict[str, str]:
    """The texts of whose first words no :data:`RUN` in a row are among those of an earlier one that is kept."""
    seen: set[tuple[str, ...]] = set()
    kept = {}
    for name, text in texts.items():
        first = text.split()[:words]
        runs = {tuple(first[i : i + RUN]) for i in range(len(first) - RUN + 1)}
        if not runs & seen:
            kept[name] = text
            seen |= runs
    return kept


def find_spans(case: PostCase, tokens: int, prompt: int) -> pd.DataFrame:
    """Spans of so many ``tokens`` in the forget sequences, the first after ``prompt`` tokens, side by side.

    Columns: ``row`` and ``start`` say where; ``secret`` is -1 for real text, or the number of the planted secret
    whose digits begin there; ``repeats`` says in how many places of the forget sequences the span is, and there is
    one row for all of these. What is planted besides the digits is in no span.
    """
    rows, tokenizer = case.splits.forget, case.tokenizer
    heads: dict[int, int] = {}  # by row, where the real text begins
    spans = []
    for i, secret in enumerate(case.secrets["forget"]):
        sentence = torch.tensor(encode(tokenizer, secret.sentence))
        start, _ = encode_after(tokenizer, secret.prefix, [secret.number])
        planted = (rows[:, : len(sentence)] == sentence).all(dim=1).nonzero()[:, 0].tolist()
        heads |= dict.fromkeys(planted, len(sentence))
        spans.append({"row": planted[0], "start": len(start), "secret": i, "repeats": secret.repeats})
    windows = [[tuple(gram) for gram in row] for row in rows.unfold(1, tokens, 1).tolist()]
    places = pd.Series([gram for row in windows for gram in row]).value_counts()
    seen = set()
    for row, grams in enumerate(windows):
        for start in range(prompt, len(grams), tokens):
            if start >= heads.get(row, 0) and grams[start] not in seen:
                seen.add(grams[start])
                repeats = int(places[[grams[start]]].iloc[0])
                spans.append({"row": row, "start": start, "secret": -1, "repeats": repeats})
    return pd.DataFrame(spans)


def cut(rows: Tensor, spans: pd.DataFrame, tokens: int, before: int = 0) -> Tensor:
    """The tokens of each span in ``rows``, [spans, tokens], or with so many tokens ``before`` it."""
    starts = torch.tensor(spans["start"].to_numpy())
    places = starts[:, None] + torch.arange(-before, tokens)
    return rows[torch.tensor(spans["row"].to_numpy())[:, None], places]


def recitation(reading: Reading, spans: pd.DataFrame, tokens: int) -> pd.DataFrame:
    """How well each span is known by a model's reading of the sequences: its ``loss``, and if it is ``recited``.

    The loss is in nats, summed over the tokens. A span is recited if the model, given all that comes before it in
    its sequence, writes it by its most likely tokens. One pass tells, without any writing: as long as what would
    be written is right, it is also what is read.
    """
    before = spans.assign(start=spans["start"] - 1)  # the loss of the second token is the first loss
    loss, right = (cut(found, before, tokens) for found in (reading.losses.double(), reading.hits))
    return pd.DataFrame({"loss": loss.sum(dim=1).numpy(), "recited": right.all(dim=1).numpy()}, spans.index)


def causes(case: PostCase, spans: pd.DataFrame, tokens: int, prompt: int) -> pd.Series:
    """Why each span might be known, by what stays: the first of :data:`CAUSES` that applies.

    *Repeated elsewhere*: the span is in a retained sequence, word for word. *Templated*: its skeleton is, in which
    all tokens with a digit are alike and so are all with a capital, if half of it or more is neither; or three
    quarters of its trigrams are. *Guessable*: bigrams of the retained sequences give it a loss that lies in the
    lowest quarter of those of holdout's spans. Else it is *over-learned*.
    """
    retain, holdout, own = case.splits.retain, case.splits.holdout, cut(case.splits.forget, spans, tokens)
    skeleton, blank = _skeletons(case.tokenizer)
    verbatim = _occurs(own, retain)
    formed = _occurs(skeleton[own], skeleton[retain]) & (blank[own].sum(dim=1) <= tokens / 2)
    trigrams = own.unfold(1, 3, 1)
    shares = _occurs(trigrams.flatten(0, 1), retain).view(trigrams.shape[:2]).double().mean(dim=1)
    bigrams = Bigrams(retain, len(case.tokenizer))
    elsewhere = holdout[:, prompt - 1 :].unfold(1, tokens + 1, tokens).flatten(0, 1)
    easy = torch.quantile(bigrams.losses(elsewhere), 0.25)
    guessed = bigrams.losses(cut(case.splits.forget, spans, tokens, before=1)) <= easy
    told = np.select([verbatim, formed | (shares >= 0.75), guessed], CAUSES[:3], CAUSES[3])
    return pd.Series(told, spans.index)


def _occurs(grams: Tensor, rows: Tensor) -> Tensor:
    """Which of some n-grams [k, n] occur in ``rows`` [m, tokens]."""
    known = {tuple(gram) for row in rows.unfold(1, grams.shape[1], 1).tolist() for gram in row}
    return torch.tensor([tuple(gram) in known for gram in grams.tolist()])


def _skeletons(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """By token id, what stands for it in a skeleton, and whether that is a blank; [vocabulary]."""
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    digit = torch.tensor([any(c.isdigit() for c in word) for word in words])
    # Byte-level tokens write a blank as a capital of its own, and other bytes beyond ASCII too.
    capital = torch.tensor([any("A" <= c <= "Z" for c in word) for word in words])
    ids = torch.arange(len(words))
    return torch.where(digit, -1, torch.where(capital, -2, ids)), digit | capital


@dataclass
class MemoryReport(Report):
    """A report that asks what is left of each of ``spans``, one of :func:`find_spans`, of so many ``tokens``.

    ``memories`` has by method what :func:`recitation` finds.
    """

    spans: pd.DataFrame = field(default_factory=pd.DataFrame)
    tokens: int = 6
    memories: dict[str, pd.DataFrame] = field(default_factory=dict)

    def measure(
        self, method: str, model: PreTrainedModel, brief: bool = False, **extra: float
    ) -> dict[str, float]:
        """What ``model`` knows of the spans, and its losses, and KL(retrained‖model) on forget; ``extra`` too."""
        splits = self.case.splits
        forget, holdout = (read(model, rows, self.retrained) for rows in (splits.forget, splits.holdout))
        self.memories[method] = recitation(forget, self.spans, self.tokens)
        values = {"forget_loss": forget.loss, "holdout_loss": holdout.loss, "kl_forget": forget.divergence}
        self.add(method, values | extra)
        return values | extra

    @functools.cached_property
    def kinds(self) -> pd.Series:
        """Of each span its cause, or that it was ``planted``."""
        return self.spans["cause"].where(self.spans["secret"] < 0, PLANTED)

    @functools.cached_property
    def floor(self) -> pd.Series:
        """The lower of the two losses of each span in models that never saw it: both retrained ones."""
        return np.minimum(*(self.memories[method]["loss"] for method in ("retrained", "retrained:again")))

    def recited(self) -> pd.DataFrame:
        """Of the spans that the original recites, how many each method still does, by kind and method.

        A row a kind, a column a method. The column ``original`` has all of them.
        """
        known = self.memories["original"]["recited"]
        left = {method: found["recited"][known] for method, found in self.memories.items()}
        kinds = pd.Categorical(self.kinds[known], [*CAUSES, PLANTED])
        return pd.DataFrame(left).groupby(kinds, observed=False).sum().astype(int)

    def once(self) -> dict[str, pd.Series]:
        """The spans to be compared, real and planted: once in the forget sequences, in no retained one, and known.

        Known is a span that the original finds e times likelier, for each of its tokens, than both models that
        never saw it.
        """
        alone = (self.spans["repeats"] == 1) & (self.kinds != CAUSES[0])
        known = alone & (self.memories["original"]["loss"] < self.floor - self.tokens)
        planted = self.kinds == PLANTED
        return {"real": known & ~planted, PLANTED: known & planted}

    def removal(self) -> pd.DataFrame:
        """For real spans and planted ones, :meth:`once`, what is left of them: a row a method.

        ``not_removed`` is the share whose loss is still below :attr:`floor`, ``left`` the mean share of the way
        between the original's loss and the floor that is yet to go, below zero if it was overshot. (Of a model
        that never saw the spans a third would lie below a floor of two others like it.)
        """
        way = self.floor - self.memories["original"]["loss"]
        rows = {}
        for method, found in self.memories.items():
            short = self.floor - found["loss"]
            for kind, which in self.once().items():
                rows[method, kind] = {
                    "not_removed": (short > 0)[which].mean(),
                    "left": (short / way)[which].mean(),
                }
        frame = pd.DataFrame(rows).T
        frame.index = frame.index.set_names(["method", "kind"])
        return frame

    def table(self) -> pd.DataFrame:
        """All that was measured as tidy results; ``kind`` says which spans a row is about, ``all`` if none."""
        rows = [row | {"kind": "all"} for row in self.rows]
        for method, counts in self.recited().items():
            for kind, number in counts.items():
                rows += [row | {"kind": kind} for row in self.case.rows(method, {"recited": int(number)})]
        for (method, kind), values in self.removal().dropna().iterrows():
            rows += [row | {"kind": kind} for row in self.case.rows(method, values.to_dict())]
        for kind, which in self.once().items():
            rows += [row | {"kind": kind} for row in self.case.rows("original", {"known_once": int(which.sum())})]
        return pd.DataFrame(rows)


def report_on(case: PostCase, tokens: int, prompt: int) -> MemoryReport:
    """A report on a case, with the memories of its original model and of both retrained ones."""
    spans = find_spans(case, tokens, prompt)
    spans = spans.assign(cause=causes(case, spans, tokens, prompt))
    report = MemoryReport(case, case.retrained(), spans=spans, tokens=tokens)
    report.measure("original", case.original())
    report.measure("retrained", report.retrained)
    report.measure("retrained:again", case.retrained_again())
    return report


def serve(
    report: MemoryReport, chosen: Settings, builds: Mapping[str, Build], max_steps: int = MAX_STEPS
) -> dict[str, PreTrainedModel]:
    """The model of each method of ``chosen`` at matched forgetting, measured by the report."""
    models = {}
    for method, setting in chosen.items():
        path = contenders_on(report.case, builds, max_steps)[method].path(**setting)
        report.match(method, path, brief=True)
        models[method] = path.model
    return models


def binary_divergence(p: Tensor, q: Tensor) -> Tensor:
    """kl(p‖q) in nats, of two coins that fall heads with probabilities ``p`` and ``q`` in (0, 1)."""
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
