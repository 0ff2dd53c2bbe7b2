"""One repetition of an experiment: the splits of a seed, and the models that belong to them."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib.experiment.profiles import Profile
from unlearnlib.models.loading import load_tokenizer
from unlearnlib.models.training import Run, load_trained, train_missing
from unlearnlib.texts.corpora import load_corpus
from unlearnlib.texts.sequences import Splits, make_splits, train_tokenizer

SECOND_SEED = 1000
"""Added to a case's seed for the second retrained model, which differs by initial weights and batch order."""


REFERENCE_SEED = 2000
"""Added to a case's seed for its first reference model, and 1000 more for each further one."""


@dataclass(frozen=True)
class Case:
    """One repetition: the splits of one seed, and the models that belong to them.

    Every call of ``original``, ``retrained`` and ``retrained_again`` loads a fresh copy, to be changed at will.
    Raises ValueError for less than two retain sequences, which cannot be parted.
    """

    profile: Profile
    seed: int
    tokenizer: PreTrainedTokenizerBase
    splits: Splits

    def __post_init__(self) -> None:
        if len(self.splits.retain) < 2:
            raise ValueError(
                f"{len(self.splits.retain)} retain sequence is too few: settings are chosen on some and curvature "
                "is estimated on others, so at least 2 are needed"
            )

    @property
    def validation(self) -> Tensor:
        """The last eighth of the retain sequences, at least one: settings such as λ are chosen by their loss."""
        return self.splits.retain[-max(1, len(self.splits.retain) // 8) :]

    @property
    def estimation(self) -> Tensor:
        """The other retain sequences, all that methods read: for steps and for the estimation of curvature."""
        return self.splits.retain[: -len(self.validation)]

    def rows(self, method: str, values: dict[str, float]) -> Iterator[dict[str, Any]]:
        """The measured ``values``, by metric, of a model of this case as rows of a results table."""
        for metric, value in values.items():
            yield {
                "corpus": self.profile.corpus,
                "model": model_name(self.profile),
                "method": method,
                "seed": self.seed,
                "metric": metric,
                "value": value,
            }

    def runs(self) -> dict[str, Run]:
        """The training runs behind the three models."""
        profile, splits = self.profile, self.splits
        original = Run(profile.model, splits.train, profile.training, self.seed, profile.last_blocks)
        retrained = replace(original, sequences=splits.retain)
        return {
            "original": original,
            "retrained": retrained,
            "retrained_again": replace(retrained, seed=self.seed + SECOND_SEED),
        }

    def original(self, device: torch.device | str | None = None) -> PreTrainedModel:
        """Trained on forget and retain sequences: the model that is asked to forget."""
        return load_trained(self.runs()["original"], device)

    def retrained(self, device: torch.device | str | None = None) -> PreTrainedModel:
        """Trained on the retain sequences alone, from the same initial weights: the gold standard."""
        return load_trained(self.runs()["retrained"], device)

    def retrained_again(self, device: torch.device | str | None = None) -> PreTrainedModel:
        """The gold standard once more, from other initial weights and in another order: the noise floor."""
        return load_trained(self.runs()["retrained_again"], device)

    def references(self, device: torch.device | str | None = None) -> Iterator[PreTrainedModel]:
        """The profile's reference models, one at a time: what an attacker compares with who knows what was kept.

        Trained on the retain sequences from other initial weights, and so strangers to forget and holdout alike.
        No other model of the case is among them.
        """
        retrained = self.runs()["retrained"]
        for i in range(self.profile.references):
            yield load_trained(replace(retrained, seed=self.seed + REFERENCE_SEED + SECOND_SEED * i), device)


def make_cases(profile: Profile, change: Callable[[Case], Case] | None = None) -> list[Case]:
    """Split the profile's corpus for each seed; train the original and retrained models that are not cached yet.

    The second retrained model, which few chapters need, is trained when it is asked for. What is trained on are
    the sequences after ``change``, where it is given.
    """
    corpus = load_corpus(profile.corpus)
    tokenizer = make_tokenizer(profile, corpus)
    cases = []
    for seed in profile.seeds:
        case = Case(profile, seed, tokenizer, _splits(profile, corpus, tokenizer, seed))
        cases.append(change(case) if change else case)
    runs = [case.runs() for case in cases]
    train_missing([found[name] for found in runs for name in ("original", "retrained")])
    return cases


def shared_documents(profile: Profile) -> float:
    """Of the documents that one seed trains on, the share that another one trains on too: the mean over all pairs.

    Nothing is trained. Raises ValueError for a profile of one seed.
    """
    if len(profile.seeds) < 2:
        raise ValueError("one seed shares its documents with no other: give the profile two seeds or more")
    corpus = load_corpus(profile.corpus)
    tokenizer, trained_on = make_tokenizer(profile, corpus), []
    for seed in profile.seeds:
        documents = _splits(profile, corpus, tokenizer, seed).documents
        trained_on.append({*documents["forget"], *documents["retain"]})
    shares = [len(one & other) / len(one) for one, other in itertools.permutations(trained_on, 2)]
    return sum(shares) / len(shares)


def _splits(profile: Profile, corpus: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seed: int) -> Splits:
    sizes = {name: getattr(profile, name) for name in ("length", "forget", "retain", "holdout")}
    return make_splits(corpus, tokenizer, **sizes, seed=seed)


def make_tokenizer(profile: Profile, corpus: datasets.Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer of the profile's model, or one of its ``vocabulary`` trained on the texts of ``corpus``.

    It is trained on the whole corpus, so that all models of a corpus speak one vocabulary.
    """
    if profile.vocabulary is None:
        return load_tokenizer(profile.model)
    return train_tokenizer(corpus["text"], profile.vocabulary)


def model_name(profile: Profile) -> str:
    """A short name of the profile's model for tables, such as ``opt-64x4`` (width by layers), or a folder's."""
    if isinstance(profile.model, str):
        return Path(profile.model).name if Path(profile.model).is_dir() else profile.model.partition("@")[0]
    return "{model_type}-{hidden_size}x{num_hidden_layers}".format(**profile.model)
