"""The recorder of an experiment: brings models to matched forgetting, measures them, and keeps the tables."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from unlearnlib import cost
from unlearnlib.experiment.case import Case
from unlearnlib.losses import batched, mean_loss, sequence_losses
from unlearnlib.measures import extraction, relearning
from unlearnlib.measures.evaluation import compare, loss_correlation, membership_auc, min_k_scores
from unlearnlib.measures.rounding import rounded
from unlearnlib.methods import matching
from unlearnlib.methods.matching import Match
from unlearnlib.weights import Vector

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
        return batched(sequence_losses, self.retrained, self.case.splits.forget)

    @functools.cached_property
    def original_loss(self) -> float:
        """The original model's forget loss in nats, from which every method starts."""
        return mean_loss(self.case.original(), self.case.splits.forget)

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
        forget, forget_hits, forget_kl = compare(model, self.retrained, splits.forget)
        holdout, _, holdout_kl = compare(model, self.retrained, splits.holdout)
        retain = splits.retain[: len(splits.holdout)]
        values = {
            "forget_loss": forget.double().mean().item(),
            "retain_loss": mean_loss(model, retain),
            "holdout_loss": holdout.double().mean().item(),
            "kl_forget": forget_kl.double().mean().item(),
            "kl_holdout": holdout_kl.double().mean().item(),
            "membership_auc": membership_auc(-forget.mean(dim=1), -holdout.mean(dim=1)),
            "membership_auc_min_k": membership_auc(min_k_scores(forget), min_k_scores(holdout)),
            "loss_correlation": loss_correlation(forget.mean(dim=1), self.retrained_losses),
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
                batched(sequence_losses, coarse, sequences) for sequences in (splits.forget, splits.holdout)
            )
            values[f"forget_loss_{bits}bit"] = forget.double().mean().item()
            values[f"holdout_loss_{bits}bit"] = holdout.double().mean().item()
            values[f"membership_auc_{bits}bit"] = membership_auc(-forget, -holdout)
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
            holdout = mean_loss(model, self.case.splits.holdout)
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
        walk = matching.Walk(model, steps, lambda: mean_loss(model, forget), max_steps)
        return self.follow(method, model, walk.to)

    def follow_direction(self, method: str, model: PreTrainedModel, start: Vector, direction: Vector) -> Match:
        """:meth:`follow` for a method that takes one step from ``start`` along ``direction``."""
        forget = self.case.splits.forget
        return self.follow(
            method, model, lambda loss: matching.match_direction(model, start, direction, forget, loss)
        )


def results_table(reports: Iterable[Report]) -> pd.DataFrame:
    """All rows of some reports, as :func:`unlearnlib.verdicts.results.write_results` wants them."""
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
