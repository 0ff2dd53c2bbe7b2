"""The report of an experiment: it brings models to matched forgetting, measures them, and keeps the tables."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from unlearnlib.cost import Cost, Meter
from unlearnlib.experiment.case import Case, model_name
from unlearnlib.experiment.contenders import Contender
from unlearnlib.losses import batched, mean_loss, sequence_losses
from unlearnlib.measures import relearning
from unlearnlib.measures.attacks import calibrated, true_positive_rate
from unlearnlib.measures.evaluation import (
    Reading,
    loss_correlation,
    membership,
    membership_auc,
    min_k_scores,
    read,
)
from unlearnlib.measures.extraction import extraction_likelihood
from unlearnlib.measures.rounding import rounded
from unlearnlib.methods import matching
from unlearnlib.methods.matching import Match, Path
from unlearnlib.methods.tuning import MOST, Choice, choose

SHARES = (0.5, 0.75, 1.0, 1.25)
"""Where on its way from the original's forget loss to the retrained model's a method stops for the frontier."""

ENOUGH = 100
"""How many sequences that are no members it takes to speak of 1 % false alarms."""


@dataclass
class Report:
    """Measures models of one case against its retrained model, and keeps all that the chapter's tables need.

    ``rows`` are the rows of the results table and ``frontier`` the points of the frontier; by method, ``curves``
    are the relearning curves and ``controls`` those of the control, ``matches`` the ends of the searches for
    matched forgetting and ``costs`` what these took, and ``choices`` the settings that were chosen. Where
    ``rounding`` is set the models are also measured with their weights rounded to 8 and 4 bits. Where
    ``extraction`` is set they are measured by what greedy continuation brings out of the forget sequences after
    every so many tokens. Raises ValueError for shares that do not ascend or do not hold 1.
    """

    case: Case
    retrained: PreTrainedModel
    rounding: bool = False
    extraction: int | None = None
    shares: tuple[float, ...] = SHARES
    rows: list[dict[str, Any]] = field(default_factory=list)
    frontier: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    controls: dict[str, list[float]] = field(default_factory=dict)
    matches: dict[str, Match] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if 1.0 not in self.shares or list(self.shares) != sorted(self.shares):
            raise ValueError(f"the shares must ascend and hold 1.0, the target, unlike {self.shares}")

    @functools.cached_property
    def retrained_curves(self) -> tuple[list[float], list[float]]:
        """The retrained model's own relearning curve and its control, against which all others are judged."""
        return self._relearn(self.retrained)

    @functools.cached_property
    def reference_scores(self) -> tuple[Tensor, Tensor] | None:
        """Min-K% scores of the case's reference models on forget and on holdout, each [models, n]."""
        splits = self.case.splits
        scores = [
            [min_k_scores(read(model, rows).losses) for rows in (splits.forget, splits.holdout)]
            for model in self.case.references()
        ]
        return tuple(map(torch.stack, zip(*scores, strict=True))) if scores else None

    @functools.cached_property
    def retrained_losses(self) -> Tensor:
        """The retrained model's loss on each forget sequence in nats, shape [n]."""
        return batched(sequence_losses, self.retrained, self.case.splits.forget)

    @functools.cached_property
    def retrained_validation(self) -> float:
        """The retrained model's loss on the validation sequences in nats."""
        return mean_loss(self.retrained, self.case.validation)

    @functools.cached_property
    def original_loss(self) -> float:
        """The original model's forget loss in nats, from which every method starts."""
        return mean_loss(self.case.original(), self.case.splits.forget)

    @functools.cached_property
    def target(self) -> float:
        """The retrained model's forget loss in nats, which matched forgetting has to reach."""
        return self.retrained_losses.double().mean().item()

    def add(self, method: str, values: dict[str, float], **settings: Any) -> None:
        """Note measured ``values``, by metric, as rows of ``method``; ``settings`` are further columns."""
        self.rows += [row | settings for row in self.case.rows(method, values)]

    def measure(
        self, method: str, model: PreTrainedModel, brief: bool = False, **extra: float
    ) -> dict[str, float]:
        """Measure ``model`` and note it as ``method``; ``extra`` adds metrics the caller has measured.

        Returns metric by name. Losses and KL are in nats. The retain loss is taken over as many retain sequences
        as there are holdout sequences, which is precise enough and much quicker. ``brief`` leaves the rounded
        weights out.
        """
        splits = self.case.splits
        forget, holdout = (read(model, rows, self.retrained) for rows in (splits.forget, splits.holdout))
        values = {
            "forget_loss": forget.loss,
            "retain_loss": mean_loss(model, splits.retain[: len(splits.holdout)]),
            "holdout_loss": holdout.loss,
            "kl_forget": forget.divergence,
            "kl_holdout": holdout.divergence,
            **membership(forget, holdout),
            **calibrated_membership(forget, holdout, self.reference_scores),
            "loss_correlation": loss_correlation(forget.losses.mean(dim=1), self.retrained_losses),
            "memorisation_accuracy": forget.accuracy,
            **(self._with_rounding(model) if self.rounding and not brief else {}),
            **extra,
        }
        if self.extraction:
            values["extraction_el10"] = extraction_likelihood(model, splits.forget, stride=self.extraction)
        self.add(method, values)
        return values

    def _with_rounding(self, model: PreTrainedModel) -> dict[str, float]:
        """Losses and AUC of the model with its weights rounded."""
        splits, values = self.case.splits, {}
        for bits in (8, 4):
            coarse = rounded(model, bits)
            forget, holdout = (batched(sequence_losses, coarse, rows) for rows in (splits.forget, splits.holdout))
            values[f"forget_loss_{bits}bit"] = forget.double().mean().item()
            values[f"holdout_loss_{bits}bit"] = holdout.double().mean().item()
            values[f"membership_auc_{bits}bit"] = membership_auc(-forget, -holdout)
        return values

    def probe(self, method: str, model: PreTrainedModel) -> None:
        """Run the relearning probe on copies of ``model``; keep its curves and note what was relearned, in nats.

        ``relearned_nats`` is the fall above that of the retrained model, ``relearned_net_nats`` the same of the
        fall net of the control's.
        """
        own = self.retrained_curves
        curves = own if model is self.retrained else self._relearn(model)
        self.curves[method], self.controls[method] = curves
        values = {
            "relearned_nats": relearning.fall(curves[0]) - relearning.fall(own[0]),
            "relearned_net_nats": relearning.net_fall(curves) - relearning.net_fall(own),
        }
        self.add(method, values)

    def _relearn(self, model: PreTrainedModel) -> tuple[list[float], list[float]]:
        profile, splits = self.case.profile, self.case.splits
        return relearning.probe(
            model, splits.forget, splits.holdout, profile.relearning_steps, profile.relearning_rate
        )

    def reference(self, method: str, model: PreTrainedModel) -> None:
        """Measure and probe a model that nothing has to be matched for."""
        self.measure(method, model)
        self.probe(method, model)

    def sweep(self, settings: Iterable[Any], path: Callable[[Any], Path]) -> pd.DataFrame:
        """:func:`unlearnlib.methods.matching.sweep` at this case's target, on its validation sequences.

        Its column ``excess`` is the validation loss above the retrained model's.
        """
        table = matching.sweep(settings, path, self.case.validation, self.target)
        return table.assign(excess=table["validation_loss"] - self.retrained_validation)

    def choose(self, method: str, contender: Contender, most: int = MOST) -> dict[str, float]:
        """:func:`unlearnlib.methods.tuning.choose` at this case's target, on its validation sequences.

        Keeps the choice in ``choices``, notes ``settings_tried``, ``knobs_at_edge`` and the ``choosing_passes``
        it took, and returns the setting.
        """
        choice = choose(contender.knobs, contender.path, self.case.validation, self.target, most)
        self.choices[method] = choice
        self.add(method, choice.noted | {"choosing_passes": choice.plain_passes})
        return choice.setting

    def tried(self, method: str) -> pd.DataFrame:
        """What :meth:`choose` tried for a method, a row a setting, with ``excess`` as in :meth:`sweep`."""
        table = self.choices[method].table
        return table.assign(excess=table["validation_loss"] - self.retrained_validation)

    def match(
        self, method: str, path: Path | Callable[[], Path], brief: bool = False, before: float = 0.0
    ) -> Match:
        """Take a method to matched forgetting and measure its model there; unless ``brief``, probe it as well.

        What it costs to make the path, such as to estimate a curvature, counts where ``path`` is what makes it;
        plain passes that were made for it ``before`` are added.
        """
        with Meter(self.retrained.device) as meter:
            path = path() if callable(path) else path
            match = path.to(self.target)
        self._note(method, path, match, meter.cost + Cost(0.0, 0, before), brief)
        return match

    def follow(self, method: str, path: Path | Callable[[], Path], before: float = 0.0) -> Match:
        """Take a method along the frontier; at matched forgetting measure and probe what it has made.

        The path is followed to each of ``shares`` in turn, which ascend and hold 1. A method that cannot get to a
        point is measured where it ended, with ``reached`` 0, and goes no further. Returns the match at the
        target, or where it ended short of it: of a method in steps its strength is their total number. As in
        :meth:`match`, ``path`` may be what makes it, and some passes may have been made ``before``.
        """
        origin, way = self.original_loss, self.target - self.original_loss
        with Meter(self.retrained.device) as meter:
            path = path() if callable(path) else path
        spent = meter.cost + Cost(0.0, 0, before)
        for share in tqdm(self.shares, f"{method}, seed {self.case.seed}", leave=False, mininterval=1.0):
            with Meter(path.model.device) as meter:
                match = path.to(origin + share * way)
            spent += meter.cost
            if share == 1.0 or (not match.reached and share < 1.0):
                self._note(method, path, match, spent)
            holdout = mean_loss(path.model, self.case.splits.holdout)
            point = {"seed": self.case.seed, "method": method, "share": share}
            self.frontier.append(point | {"forget": match.loss, "holdout": holdout})
            if not match.reached:
                break
        return self.matches[method]

    def _note(self, method: str, path: Path, match: Match, spent: Cost, brief: bool = False) -> None:
        self.matches[method], self.costs[method] = match, spent
        told = {"strength": match.strength, "reached": float(match.reached), "plain_passes": spent.plain_passes}
        self.measure(method, path.model, brief, **told)
        if not brief:
            self.probe(method, path.model)


def calibrated_membership(
    forget: Reading, holdout: Reading, reference_scores: tuple[Tensor, Tensor] | None
) -> dict[str, float]:
    """Calibrated Min-K%: its AUC, and if holdout is large enough what it finds at 1 % false alarms.

    ``reference_scores`` are those of reference models on forget and on holdout, each [models, n]; nothing is
    measured without them.
    """
    if reference_scores is None:
        return {}
    members, others = (
        calibrated(min_k_scores(one.losses), scores)
        for one, scores in zip((forget, holdout), reference_scores, strict=True)
    )
    values = {"membership_auc_calibrated": membership_auc(members, others)}
    if len(others) >= ENOUGH:
        values["membership_tpr"] = true_positive_rate(members, others)
    return values


def results_table(reports: Iterable[Report]) -> pd.DataFrame:
    """All rows of some reports, as :func:`unlearnlib.verdicts.results.write_results` wants them."""
    return pd.DataFrame([row for report in reports for row in report.rows])


def sweeps_table(case: Case, sweeps: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Tables of :meth:`Report.sweep` on one case, each with columns ``method`` and ``sweep``, as tidy results.

    The metric is ``validation_excess``, the loss on validation above the retrained model's in nats; ``setting`` is
    of what ``sweep`` names, and ``reached`` is 0 or 1.
    """
    table = pd.concat(sweeps)[["method", "sweep", "setting", "excess", "reached"]]
    return table.rename(columns={"excess": "value"}).assign(
        corpus=case.profile.corpus,
        model=model_name(case.profile),
        seed=case.seed,
        metric="validation_excess",
        reached=table["reached"].astype(int),
    )


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
