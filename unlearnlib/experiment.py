"""The set-up that all chapters share: one case a seed, its models from the cache, and its table of measures."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib import measures, relearning
from unlearnlib.data import load_corpus
from unlearnlib.models import load_tokenizer
from unlearnlib.profiles import Profile
from unlearnlib.sequences import Splits, make_splits, train_tokenizer
from unlearnlib.training import Run, load_trained, train_missing

SECOND_SEED = 1000
"""Added to a case's seed for the second retrained model, which differs by initial weights and batch order."""


@dataclass(frozen=True)
class Case:
    """One repetition: the splits of one seed, and the models that belong to them.

    Every call of ``original``, ``retrained`` and ``retrained_again`` loads a fresh copy, to be changed at will.
    """

    profile: Profile
    seed: int
    tokenizer: PreTrainedTokenizerBase
    splits: Splits

    def runs(self) -> dict[str, Run]:
        """The training runs behind the three models."""
        profile, splits = self.profile, self.splits
        original = Run(profile.model, splits.train, profile.training, self.seed)
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


def prepare(profile: Profile) -> list[Case]:
    """Split the profile's corpus for each seed and train whatever models are not in the cache yet.

    The tokenizer is trained once, on the whole corpus, so that all models of a corpus speak one vocabulary.
    """
    corpus = load_corpus(profile.corpus)
    if profile.vocabulary is None:
        tokenizer = load_tokenizer(profile.model)
    else:
        tokenizer = train_tokenizer(corpus["text"], profile.vocabulary)
    cases = []
    for seed in profile.seeds:
        splits = make_splits(
            corpus,
            tokenizer,
            length=profile.length,
            forget=profile.forget,
            retain=profile.retain,
            holdout=profile.holdout,
            seed=seed,
        )
        cases.append(Case(profile, seed, tokenizer, splits))
    train_missing([run for case in cases for run in case.runs().values()])
    return cases


@dataclass
class Report:
    """Measures models of one case against its retrained model, and keeps the rows of the results table."""

    case: Case
    retrained: PreTrainedModel
    rows: list[dict[str, Any]] = field(default_factory=list)

    @functools.cached_property
    def retrained_curve(self) -> list[float]:
        """The retrained model's own relearning curve, against which all others are judged."""
        return relearning.relearning_curve(self.retrained, self.case.splits.forget)

    def measure(self, method: str, model: PreTrainedModel, **extra: float) -> dict[str, float]:
        """Measure ``model`` and note it as ``method``; ``extra`` adds metrics the caller has measured.

        Returns metric by name: losses and KL in nats, areas under the ROC curve. The retain loss is taken over
        as many retain sequences as there are holdout sequences, which is precise enough and much quicker.
        """
        splits = self.case.splits
        forget, retain, holdout = (
            measures.batched(measures.token_losses, model, sequences)
            for sequences in (splits.forget, splits.retain[: len(splits.holdout)], splits.holdout)
        )
        values = {
            "forget_loss": forget.double().mean().item(),
            "retain_loss": retain.double().mean().item(),
            "holdout_loss": holdout.double().mean().item(),
            "kl_forget": measures.mean_kl(self.retrained, model, splits.forget),
            "kl_holdout": measures.mean_kl(self.retrained, model, splits.holdout),
            "membership_auc": measures.membership_auc(-forget.mean(dim=1), -holdout.mean(dim=1)),
            "membership_auc_min_k": measures.membership_auc(
                measures.min_k_scores(forget), measures.min_k_scores(holdout)
            ),
            "memorisation_accuracy": measures.token_accuracy(model, splits.forget),
            **extra,
        }
        self.rows += list(self._tidy(method, values))
        return values

    def probe(self, method: str, model: PreTrainedModel) -> list[float]:
        """Run the relearning probe on a copy of ``model`` and note ``relearned_nats``; returns the curve.

        The fall is measured against that of the retrained model's curve.
        """
        if model is self.retrained:
            curve = self.retrained_curve
        else:
            curve = relearning.relearning_curve(model, self.case.splits.forget)
        fall = relearning.fall(curve) - relearning.fall(self.retrained_curve)
        self.rows += list(self._tidy(method, {"relearned_nats": fall}))
        return curve

    def _tidy(self, method: str, values: dict[str, float]) -> Iterator[dict[str, Any]]:
        profile = self.case.profile
        for metric, value in values.items():
            yield {
                "corpus": profile.corpus,
                "model": model_name(profile),
                "method": method,
                "seed": self.case.seed,
                "metric": metric,
                "value": value,
            }


def model_name(profile: Profile) -> str:
    """A short name of the profile's model for tables, such as ``opt-64x4`` (width by layers)."""
    if isinstance(profile.model, str):
        return profile.model.partition("@")[0]
    return "{model_type}-{hidden_size}x{num_hidden_layers}".format(**profile.model)
