"""The set-up that all chapters share: one case a seed, its models from the cache, and its table of measures."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib import cost, extraction, matching, measures, relearning
from unlearnlib.data import load_corpus
from unlearnlib.matching import Match
from unlearnlib.models import load_tokenizer
from unlearnlib.profiles import Profile
from unlearnlib.rounding import rounded
from unlearnlib.sequences import Splits, make_splits, train_tokenizer
from unlearnlib.training import Run, load_trained, train_missing
from unlearnlib.weights import Vector

SECOND_SEED = 1000
"""Added to a case's seed for the second retrained model, which differs by initial weights and batch order."""


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


def prepare(profile: Profile) -> list[Case]:
    """Split the profile's corpus for each seed; train the original and retrained models that are not cached yet.

    The second retrained model, which few chapters need, is trained when it is asked for.
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
    runs = [case.runs() for case in cases]
    train_missing([found[name] for found in runs for name in ("original", "retrained")])
    return cases


SHARES = (0.5, 0.75, 1.0, 1.25)
"""Where on its way from the original's forget loss to the retrained model's a method stops for the frontier."""


@dataclass
class Report:
    """Measures models of one case against its retrained model, and keeps all that the chapter's tables need.

    ``rows`` are the rows of the results table and ``frontier`` the points of the frontier; by method, ``curves``
    are the relearning curves, ``matches`` the ends of the searches for matched forgetting and ``seconds`` the time
    these took by :func:`unlearnlib.cost.clock`. Where ``rounding`` is set the models are also measured with their
    weights rounded to 8 and 4 bits, where ``extraction`` is set by what greedy continuation brings out of the
    forget sequences after every so many tokens.
    """

    case: Case
    retrained: PreTrainedModel
    rounding: bool = False
    extraction: int | None = None
    shares: tuple[float, ...] = SHARES
    rows: list[dict[str, Any]] = field(default_factory=list)
    frontier: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    matches: dict[str, Match] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @functools.cached_property
    def retrained_curve(self) -> list[float]:
        """The retrained model's own relearning curve, against which all others are judged."""
        return self._relearn(self.retrained)

    @functools.cached_property
    def retrained_losses(self) -> Tensor:
        """The retrained model's loss on each forget sequence in nats, shape [n]."""
        return measures.batched(measures.sequence_losses, self.retrained, self.case.splits.forget)

    @functools.cached_property
    def original_loss(self) -> float:
        """The original model's forget loss in nats, from which every method starts."""
        return measures.mean_loss(self.case.original(), self.case.splits.forget)

    @functools.cached_property
    def target(self) -> float:
        """The retrained model's forget loss in nats, which matched forgetting has to reach."""
        return self.retrained_losses.double().mean().item()

    def measure(self, method: str, model: PreTrainedModel, **extra: float) -> dict[str, float]:
        """Measure ``model`` and note it as ``method``; ``extra`` adds metrics the caller has measured.

        Returns metric by name: losses and KL in nats, areas under the ROC curve. The retain loss is taken over
        as many retain sequences as there are holdout sequences, which is precise enough and much quicker.
        """
        splits = self.case.splits
        forget, forget_hits, forget_kl = measures.compare(model, self.retrained, splits.forget)
        holdout, _, holdout_kl = measures.compare(model, self.retrained, splits.holdout)
        retain = splits.retain[: len(splits.holdout)]
        values = {
            "forget_loss": forget.double().mean().item(),
            "retain_loss": measures.mean_loss(model, retain),
            "holdout_loss": holdout.double().mean().item(),
            "kl_forget": forget_kl.double().mean().item(),
            "kl_holdout": holdout_kl.double().mean().item(),
            "membership_auc": measures.membership_auc(-forget.mean(dim=1), -holdout.mean(dim=1)),
            "membership_auc_min_k": measures.membership_auc(
                measures.min_k_scores(forget), measures.min_k_scores(holdout)
            ),
            "loss_correlation": measures.loss_correlation(forget.mean(dim=1), self.retrained_losses),
            "memorisation_accuracy": forget_hits.double().mean().item(),
            **(self._with_rounding(model) if self.rounding else {}),
            **extra,
        }
        if self.extraction:
            found = extraction.extraction_likelihood(model, splits.forget, stride=self.extraction)
            values["extraction_el10"] = found
        self.rows += list(self.case.rows(method, values))
        return values

    def _with_rounding(self, model: PreTrainedModel) -> dict[str, float]:
        """Losses and AUC of the model with its weights rounded."""
        splits, values = self.case.splits, {}
        for bits in (8, 4):
            coarse = rounded(model, bits)
            forget, holdout = (
                measures.batched(measures.sequence_losses, coarse, sequences)
                for sequences in (splits.forget, splits.holdout)
            )
            values[f"forget_loss_{bits}bit"] = forget.double().mean().item()
            values[f"holdout_loss_{bits}bit"] = holdout.double().mean().item()
            values[f"membership_auc_{bits}bit"] = measures.membership_auc(-forget, -holdout)
        return values

    def probe(self, method: str, model: PreTrainedModel) -> None:
        """Run the relearning probe on a copy of ``model``; keep its curve and note ``relearned_nats``.

        The fall is measured against that of the retrained model's curve.
        """
        curve = self.retrained_curve if model is self.retrained else self._relearn(model)
        self.curves[method] = curve
        fall = relearning.fall(curve) - relearning.fall(self.retrained_curve)
        self.rows += list(self.case.rows(method, {"relearned_nats": fall}))

    def _relearn(self, model: PreTrainedModel) -> list[float]:
        profile = self.case.profile
        return relearning.relearning_curve(
            model, self.case.splits.forget, profile.relearning_steps, profile.relearning_rate
        )

    def reference(self, method: str, model: PreTrainedModel) -> None:
        """Measure and probe a model that nothing has to be matched for."""
        self.measure(method, model)
        self.probe(method, model)

    def follow(self, method: str, model: PreTrainedModel, reach: Callable[[float], Match]) -> Match:
        """Take a method along the frontier; at matched forgetting measure and probe what it has made.

        ``reach(loss)`` brings ``model`` to that forget loss in nats, and is called for each of ``shares`` in
        turn, which ascend and hold 1; its ``strength`` is counted from where the method began. A method that
        cannot get to a point is measured where it ended, with ``reached`` 0, and goes no further. Returns the
        match at the target, or where it ended short of it.
        """
        clock = cost.clock(model.device)
        started = clock()
        for share in tqdm(self.shares, f"{method}, seed {self.case.seed}", leave=False, mininterval=1.0):
            match = reach(self.original_loss + share * (self.target - self.original_loss))
            if share == 1.0 or (not match.reached and share < 1.0):
                self.seconds[method] = clock() - started
                self.matches[method] = match
                self.measure(method, model, strength=match.strength, reached=float(match.reached))
                self.probe(method, model)
            holdout = measures.mean_loss(model, self.case.splits.holdout)
            point = {"seed": self.case.seed, "method": method, "share": share}
            self.frontier.append(point | {"forget": match.loss, "holdout": holdout})
            if not match.reached:
                break
        return self.matches[method]

    def follow_steps(
        self, method: str, model: PreTrainedModel, steps: Iterable[object], max_steps: int = 1000
    ) -> Match:
        """:meth:`follow` for a method that updates ``model`` in place at each item drawn from ``steps``.

        Strengths count the steps from the first one on, and so does ``max_steps`` (:class:`matching.Walk`).
        """
        forget = self.case.splits.forget
        walk = matching.Walk(model, steps, lambda: measures.mean_loss(model, forget), max_steps)
        return self.follow(method, model, walk.to)

    def follow_direction(self, method: str, model: PreTrainedModel, start: Vector, direction: Vector) -> Match:
        """:meth:`follow` for a method that takes one step from ``start`` along ``direction``."""
        forget = self.case.splits.forget
        return self.follow(
            method, model, lambda loss: matching.match_direction(model, start, direction, forget, loss)
        )


def results_table(reports: Iterable[Report]) -> pd.DataFrame:
    """All rows of some reports, as :func:`unlearnlib.results.write_results` wants them."""
    return pd.DataFrame([row for report in reports for row in report.rows])


def frontier_table(reports: Iterable[Report]) -> pd.DataFrame:
    """All points of some reports' frontiers as tidy results: excesses over the retrained model, in nats.

    The metrics are ``forget_excess`` and ``holdout_excess``; the original model is the point of share 0.
    """
    rows = []
    for report in reports:
        values = {(row["method"], row["metric"]): row["value"] for row in report.rows}
        origin = {"seed": report.case.seed, "method": "original", "share": 0.0}
        origin |= {name: values["original", f"{name}_loss"] for name in ("forget", "holdout")}
        for point in (origin, *report.frontier):
            for name in ("forget", "holdout"):
                excess = point[name] - values["retrained", f"{name}_loss"]
                row = next(report.case.rows(point["method"], {f"{name}_excess": excess}))
                rows.append(row | {"share": point["share"]})
    return pd.DataFrame(rows)


def model_name(profile: Profile) -> str:
    """A short name of the profile's model for tables, such as ``opt-64x4`` (width by layers)."""
    if isinstance(profile.model, str):
        return profile.model.partition("@")[0]
    return "{model_type}-{hidden_size}x{num_hidden_layers}".format(**profile.model)
