"""What an attacker with reference models sees of K-FAC's step, and what changes it."""

import copy
import functools
from collections.abc import Callable, Mapping

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.block_gauss_newton import BlockGaussNewton
from unlearnlib.curvature.kronecker import Kronecker, ekfac
from unlearnlib.curvature.per_sequence_gradients import sequence_gradients
from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.case import Case
from unlearnlib.experiment.comparison import Settings
from unlearnlib.experiment.contenders import STEPS, contenders_on
from unlearnlib.experiment.report import Report
from unlearnlib.losses import batched, sequence_losses, token_losses
from unlearnlib.measures.attacks import calibrated
from unlearnlib.measures.evaluation import membership_auc
from unlearnlib.methods.fisher_updates import Build, RemovalInSteps, removal_direction
from unlearnlib.methods.matching import Line, Path
from unlearnlib.weights import Vector, difference, flatten, mean_gradient, unflatten

POWERS = (1, 4)
"""The gradient of a token's loss is weighted by so high a power of how unlikely the token is."""

AT_DISTANCE = ("kfac", "newton_descent")
"""Methods that are measured a second time, where forget and holdout losses differ as the retrained model's do."""


class GapReport(Report):
    """A report that also has the attack by calibrated losses, beside that by calibrated Min-K%."""

    @functools.cached_property
    def reference_tokens(self) -> Tensor:
        """The reference models' mean loss of every predicted token of forget in nats, [n, tokens - 1]."""
        found = [batched(token_losses, model, self.case.splits.forget) for model in self.case.references()]
        return torch.stack(found).mean(dim=0)

    @functools.cached_property
    def reference_losses(self) -> tuple[Tensor, ...]:
        """What the reference models' losses of sequences are, on forget and on holdout, each [models, n]."""
        splits, models = self.case.splits, list(self.case.references())
        return tuple(
            torch.stack([batched(sequence_losses, model, rows) for model in models])
            for rows in (splits.forget, splits.holdout)
        )

    def measure(
        self, method: str, model: PreTrainedModel, brief: bool = False, **extra: float
    ) -> dict[str, float]:
        """As :meth:`Report.measure`, and ``membership_auc_calibrated_loss``."""
        splits = self.case.splits
        members, others = (
            calibrated(-batched(sequence_losses, model, rows), -known)
            for rows, known in zip((splits.forget, splits.holdout), self.reference_losses, strict=True)
        )
        extra["membership_auc_calibrated_loss"] = membership_auc(members, others)
        return super().measure(method, model, brief, **extra)


def token_profile(losses: Mapping[str, Tensor], by: Tensor, parts: int = 10) -> pd.DataFrame:
    """Mean token losses in nats in each of ``parts`` equal parts of all tokens, in the order of ``by``.

    ``by`` [n, tokens] is a loss of every token, and so are those of each of ``losses``, by name. A row a part,
    the likeliest tokens first; a column a name.
    """
    edges = torch.quantile(by.flatten().double(), torch.linspace(0, 1, parts + 1, dtype=torch.float64)[1:-1])
    part = torch.bucketize(by.flatten().double(), edges)
    return pd.DataFrame(
        {
            name: [values.flatten().double()[part == i].mean().item() for i in range(parts)]
            for name, values in losses.items()
        }
    )


def targets_direction(
    curvature: Curvature, gradients: Tensor, rises: Tensor, like: Vector, damping: float
) -> Vector:
    """The shortest step in C + λI that raises each text's loss by its own of ``rises`` [n] nats, to first order.

    Σ wᵢ (C + λI)⁻¹gᵢ with (J (C + λI)⁻¹ Jᵀ) w = rises, where the rows gᵢ of J are ``gradients`` [n, d].
    """
    rows = [flatten(curvature.solve(unflatten(gradient, like), damping)) for gradient in gradients]
    preconditioned = torch.stack(rows)
    weights = torch.linalg.solve((gradients @ preconditioned.T).double(), rises.to(gradients).double())
    return unflatten(weights.to(preconditioned) @ preconditioned, like)


def weighted_gradient(model: PreTrainedModel, forget: Tensor, power: float) -> Vector:
    """The gradient of the forget loss with every token's part weighted by (1 - p)^``power``, p its probability."""

    def loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
        nats = token_losses(model, batch)
        return ((1 - (-nats.detach()).exp()) ** power * nats).mean(dim=1)

    return mean_gradient(model, forget, loss)


def cures(
    report: Report,
    factors: Kronecker,
    delta: Vector,
    damping: float,
    build: Build,
    m_blocks: int,
) -> dict[str, Callable[[], Path]]:
    """By name, what might bring K-FAC's step closer to retraining: each makes a path from the original model.

    ``factors`` are K-FAC of the texts that stay and ``delta`` the forget gradient, both at the original weights;
    λ is ``damping`` throughout. ``build`` is what makes K-FAC anew, for cures that take several steps; the exact
    curvature of each matrix of weights is that of ``m_blocks`` sequences, by as many conjugate gradients
    (:data:`STEPS`). One cure is given what nobody has: the retrained model's own loss on every text.
    """
    case = report.case
    forget, retain = case.splits.forget, case.estimation

    def along(direction: Callable[[PreTrainedModel], Vector]) -> Callable[[], Path]:
        def path() -> Path:
            model = case.original()
            return Line(model, direction(model), forget)

        return path

    def targets(model: PreTrainedModel) -> Vector:
        rises = report.retrained_losses - batched(sequence_losses, model, forget)
        return targets_direction(factors, sequence_gradients(model, forget), rises, delta, damping)

    def tokens(power: int) -> Callable[[PreTrainedModel], Vector]:
        return lambda model: removal_direction(factors, weighted_gradient(model, forget, power), damping)

    def dropped(model: PreTrainedModel) -> Vector:
        gradient = mean_gradient(model, retain, sequence_losses)
        return removal_direction(factors, difference(delta, gradient), damping)

    def several(hold: Tensor | None = None) -> Callable[[], Path]:
        return lambda: RemovalInSteps(
            case.original(), forget, build, damping, STEPS, refresh=True, renew=True, hold=hold
        )

    def blocks(model: PreTrainedModel) -> Vector:
        return BlockGaussNewton(model, retain[:m_blocks], None, STEPS, factors).solve(delta, damping)

    return {
        "kfac": along(lambda model: removal_direction(factors, delta, damping)),
        "kfac:targets": along(targets),
        **{f"kfac:tokens{power}": along(tokens(power)) for power in POWERS},
        "kfac:difference": along(dropped),
        "kfac:steps": several(),
        "kfac:held": several(retain),
        "ekfac": along(lambda model: removal_direction(ekfac(model, retain, seed=case.seed), delta, damping)),
        "newton_cg:blocks": along(blocks),
    }


def compare(
    case: Case, chosen: Settings, build: Build, max_steps: int
) -> tuple[GapReport, dict[str, PreTrainedModel]]:
    """Every method of ``chosen`` at matched forgetting on a case, beside two retrained models and the original.

    ``chosen`` has the setting of each, ``build`` makes K-FAC, and what goes in steps of an optimizer takes
    ``max_steps`` at the most. What is :data:`AT_DISTANCE` is also brought to where it is as far from the strangers
    as the retrained model. Returns the report, and by name the models at matched forgetting.
    """
    report = GapReport(case, case.retrained())
    models = {"retrained": report.retrained, "retrained:again": case.retrained_again()}
    for method, model in models.items():
        report.reference(method, model)
    models["original"] = case.original()
    report.measure("original", models["original"])
    contenders = contenders_on(case, {"kfac": build}, max_steps)
    for method, setting in chosen.items():
        path = functools.cache(functools.partial(contenders[method].path, **setting))  # made once, and counted
        report.match(method, path)
        models[method] = copy.deepcopy(path().model)
        if method in AT_DISTANCE:
            match_distance(report, method, contenders[method].path(**setting))
    return report, models


def match_distance(report: Report, method: str, path: Path) -> None:
    """Bring a method to the retrained model's *difference* of forget and holdout loss, and measure it there.

    The holdout loss is that of ``method`` as it has been measured at matched forgetting; it should change little
    from there. What is noted is ``method`` with the suffix ``:distance``.
    """
    found = {(row["method"], row["metric"]): row["value"] for row in report.rows}
    off = found[method, "holdout_loss"] - found["retrained", "holdout_loss"]
    match = path.to(report.target + off)
    told = {"strength": match.strength, "reached": float(match.reached)}
    report.measure(f"{method}:distance", path.model, **told)
