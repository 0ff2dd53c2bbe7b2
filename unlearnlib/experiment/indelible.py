"""Memories that nobody planted: what a model has learnt of its texts by heart, why, and what is left of it."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib.experiment.case_studies import PostCase, planted_cases
from unlearnlib.experiment.comparison import Settings
from unlearnlib.experiment.contenders import MAX_STEPS, contenders_on
from unlearnlib.experiment.profiles import Profile
from unlearnlib.experiment.report import Report
from unlearnlib.losses import batched, log_probabilities, mean_loss
from unlearnlib.methods.fisher_updates import Build
from unlearnlib.methods.matching import Match
from unlearnlib.texts.bigrams import Bigrams
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.masking import common_words, mask_rare
from unlearnlib.texts.posts import load_posts
from unlearnlib.texts.sequences import encode, encode_after

CAUSES = ("repeated elsewhere", "templated", "guessable", "over-learned")
"""Why a memory may be there, in the order in which they are tried."""

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
        return Documents(_distinct(texts), {name: name.split("-")[0] for name in _distinct(texts)})
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


def real_cases(
    profile: Profile, documents: Documents, numbers: Mapping[str, int], repeats: Sequence[int]
) -> list[PostCase]:
    """:func:`unlearnlib.experiment.case_studies.planted_cases` of the documents' texts."""
    return planted_cases(profile, documents.texts, numbers, repeats)


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


def recitation(model: PreTrainedModel, rows: Tensor, spans: pd.DataFrame, tokens: int) -> pd.DataFrame:
    """How well a model knows each span: its ``loss`` in nats, summed, and whether it is ``recited``.

    Given all that comes before it in its sequence, the span is what the model's most likely tokens say. One pass
    tells, without any writing: as long as what is said is right, it is also what is read.
    """

    def both(model: PreTrainedModel, batch: Tensor) -> Tensor:
        likely, right = log_probabilities(model, batch), batch[:, 1:].to(model.device)
        losses = -likely.gather(2, right[:, :, None])[:, :, 0].double()
        return torch.stack([losses, (likely.argmax(dim=2) == right).double()], dim=1)

    found = batched(both, model, rows)
    loss, right = (cut(found[:, i], spans.assign(start=spans["start"] - 1), tokens) for i in (0, 1))
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
        """What ``model`` knows of the spans, and its losses on forget and holdout; ``extra`` is noted too."""
        splits = self.case.splits
        self.memories[method] = recitation(model, splits.forget, self.spans, self.tokens)
        values = {"forget_loss": mean_loss(model, splits.forget), "holdout_loss": mean_loss(model, splits.holdout)}
        self.add(method, values | extra)
        return values | extra
