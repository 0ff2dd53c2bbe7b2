"""Requests of several sizes to one original model: forget sets drawn at random, and from a single topic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unlearnlib.experiment.case import Case, make_tokenizer
from unlearnlib.experiment.profiles import Profile, on_small_opt
from unlearnlib.models.training import Run, train_missing
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.sequences import Splits, deal


@dataclass(frozen=True)
class RequestCase(Case):
    """A case whose forget set is one of several groups in the training set of one and the same original model.

    ``kind`` is ``random`` or ``clustered``. ``trained_on`` is all that the original saw, in an order that does not
    depend on the request, [n, tokens]; ``related`` are sequences that nobody trained on, from other documents of
    the topic that clustered requests are made of.
    """

    kind: str
    trained_on: Tensor
    related: Tensor

    @property
    def size(self) -> int:
        """How many sequences are to be forgotten."""
        return len(self.splits.forget)

    def runs(self) -> dict[str, Run]:
        """The training runs behind the three models; the original's is the same for all requests."""
        found = super().runs()
        return found | {"original": replace(found["original"], sequences=self.trained_on)}


def make_requests(
    profile: Profile,
    tokenizer: PreTrainedTokenizerBase,
    corpus: datasets.Dataset,
    sizes: Sequence[int],
    on_topic: Sequence[bool] | None,
    seed: int,
) -> list[RequestCase]:
    """Deal the documents, shuffled with ``seed``, to a random group of every size, and a clustered one.

    Clustered groups take only documents for which ``on_topic`` holds, as many flags as documents, and so do the
    ``related`` sequences, a quarter as many as the profile's ``holdout``; without flags there are neither. All
    groups together with ``profile.retain`` further sequences are the training set: for a single request, whatever
    is not in its group is to be kept. A document is in one group only.

    Raises ValueError if a size is not positive or comes twice, or if the documents run out.
    """
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"the sizes of requests must be positive and differ, unlike {list(sizes)}")
    order = np.random.default_rng(seed).permutation(len(corpus)).tolist()
    dealt: set[int] = set()

    def deal_names(pool: Iterator[int], number: int, what: str) -> tuple[Tensor, list[str]]:
        rows, taken = deal(pool, corpus, tokenizer, number, profile.length, what)
        dealt.update(taken)
        return rows, corpus[taken]["id"]

    groups: dict[tuple[str, int], tuple[Tensor, list[str]]] = {}
    related = torch.empty(0, profile.length, dtype=torch.int64)
    if on_topic is not None:
        pool = (i for i in order if on_topic[i])
        related, _ = deal_names(pool, max(1, profile.holdout // 4), "related sequences")
        for size in sizes:
            groups["clustered", size] = deal_names(pool, size, f"clustered request of {size}")
    pool = iter([i for i in order if i not in dealt])
    holdout = deal_names(pool, profile.holdout, "holdout set")
    for size in sizes:
        groups["random", size] = deal_names(pool, size, f"random request of {size}")
    # At the end what no request names: validation sequences are taken from there.
    groups["rest", 0] = deal_names(pool, profile.retain, "rest of the training set")

    trained_on = torch.cat([sequences for sequences, _ in groups.values()])
    requests = []
    for (kind, size), (forget, names) in groups.items():
        if kind == "rest":
            continue
        kept = [group for key, group in groups.items() if key != (kind, size)]
        splits = Splits(
            forget,
            torch.cat([sequences for sequences, _ in kept]),
            holdout[0],
            {
                "forget": names,
                "retain": [name for _, names in kept for name in names],
                "holdout": holdout[1],
            },
        )
        requests.append(RequestCase(profile, seed, tokenizer, splits, kind, trained_on, related))
    return requests


def requests_of_sizes(settings: Profile, sizes: Sequence[int], topic: str, seeds: int = 2) -> list[RequestCase]:
    """Requests to the smallest OPT (``on_small_opt``), on the corpus of ``settings``, for its first ``seeds``.

    Clustered requests are of documents on ``topic``; a corpus without topics has none. All models that the
    requests need are trained, as far as they are not cached yet. Raises ValueError as :func:`make_requests`.
    """
    corpus, small = load_corpus(settings.corpus), on_small_opt(settings)
    tokenizer = make_tokenizer(small, corpus)
    on_topic = [name == topic for name in corpus["topic"]] if "topic" in corpus.column_names else None
    requests = [
        request
        for seed in settings.seeds[:seeds]
        for request in make_requests(small, tokenizer, corpus, sizes, on_topic, seed)
    ]
    train_missing([request.runs()[name] for request in requests for name in ("original", "retrained")])
    return requests
