"""How far off the forget loss is that one aims at without a retrained model, way by way, and what that costs."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearnlib.curvature.kronecker import Kronecker, kfac
from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.case import Case
from unlearnlib.experiment.contenders import DAMPINGS
from unlearnlib.losses import batched, mean_loss, sequence_losses
from unlearnlib.measures.evaluation import membership_auc
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.methods.fisher_updates import removal_direction
from unlearnlib.methods.matching import Line
from unlearnlib.methods.targets import (
    Target,
    calibrated_damping,
    fitted_target,
    gap_target,
    holdout_target,
    left_out_loss,
)
from unlearnlib.methods.tuning import choose
from unlearnlib.models.training import Training, load_trained
from unlearnlib.texts.bigrams import Bigrams
from unlearnlib.weights import Vector, difference, dot, set_weights, snapshot

BLOCKS = 4
"""So many sets of kept sequences, each as large as the forget set, are left out in thought, at the most."""
WIDENED = 6
"""So many λ are tried beyond a grid, at the most."""


@dataclass(frozen=True)
class Strengths:
    """The ways to set a target on one case.

    ``proxy`` is the model of the small retraining, and ``training`` how it is trained. ``dampings`` ascend; with
    them second order predicts.
    """

    case: Case
    proxy: str | dict[str, Any]
    training: Training
    dampings: tuple[float, ...]

    @functools.cached_property
    def losses(self) -> dict[str, Tensor]:
        """The original model's loss on every forget, retain and holdout sequence, in nats."""
        model, splits = self.case.original(), self.case.splits
        rows = {name: getattr(splits, name) for name in ("forget", "retain", "holdout")}
        return {name: batched(sequence_losses, model, values) for name, values in rows.items()}

    @functools.cached_property
    def retrained(self) -> dict[str, Tensor]:
        """The retrained model's losses on forget and holdout sequences, in nats; no way may look at them."""
        model, splits = self.case.retrained(), self.case.splits
        return {name: batched(sequence_losses, model, getattr(splits, name)) for name in ("forget", "holdout")}

    @property
    def truth(self) -> float:
        """The retrained model's forget loss in nats."""
        return self.retrained["forget"].double().mean().item()

    def targets(self) -> dict[str, Target]:
        """By way, the estimate."""
        forget, retain, holdout = (self.losses[name] for name in ("forget", "retain", "holdout"))
        splits = self.case.splits
        bigrams = Bigrams(splits.retain, self.case.tokenizer.vocab_size)
        proxy = self._proxy_losses(splits.retain)
        return {
            "holdout": holdout_target(holdout, len(forget)),
            "gap": gap_target(forget, retain, holdout),
            "bigrams": fitted_target(holdout, bigrams.losses(splits.forget), bigrams.losses(splits.holdout)),
            "proxy": fitted_target(holdout, proxy["forget"], proxy["holdout"]),
            "proxy:twice": self._proxy_twice(proxy),
            "left_out": self.left_out(),
        }

    def _proxy_losses(self, sequences: Tensor) -> dict[str, Tensor]:
        """The losses on forget and holdout of a proxy trained on ``sequences``."""
        run = self.case.runs()["retrained"]
        run = dataclasses.replace(run, source=self.proxy, training=self.training, sequences=sequences)
        model = load_trained(run)
        rows = {name: getattr(self.case.splits, name) for name in ("forget", "holdout")}
        return {name: batched(sequence_losses, model, values) for name, values in rows.items()}

    @functools.cached_property
    def proxy_means(self) -> dict[str, float]:
        """The mean losses on forget and holdout of a proxy that was trained with the former, in nats."""
        knowing = self._proxy_losses(self.case.splits.train)
        return {name: values.double().mean().item() for name, values in knowing.items()}

    def _proxy_twice(self, without: dict[str, Tensor]) -> Target:
        """The rise of the proxy's forget loss, as a share of that to its holdout loss, carried over."""
        start, end = (self.proxy_means[name] for name in ("forget", "holdout"))
        share = (without["forget"].double().mean().item() - start) / (end - start)
        forget, holdout = (self.losses[name].double().mean().item() for name in ("forget", "holdout"))
        return Target(forget + share * (holdout - forget))

    @functools.cached_property
    def curvature(self) -> Kronecker:
        """K-FAC of the estimation sequences at the original's weights."""
        return kfac(self.case.original(), self.case.estimation, seed=self.case.seed)

    @functools.cached_property
    def gradients(self) -> tuple[Vector, Vector, list[Vector]]:
        """At the original's weights: Δ, g, and the gradients of the blocks of kept sequences."""
        model, number = self.case.original(), len(self.case.splits.forget)
        blocks = [block for block in self.case.estimation.split(number) if len(block) == number][:BLOCKS]
        whole = (ascent_direction(model, rows) for rows in (self.case.splits.forget, self.case.splits.retain))
        return *whole, [ascent_direction(model, block) for block in blocks]

    def rise(self, delta: Vector, damping: float) -> float:
        """What leaving out a set with gradient ``delta`` adds to its loss, by second order, in nats."""
        _, g, _ = self.gradients
        gain = dot(delta, removal_direction(self.curvature, difference(delta, g), damping)).item()
        return left_out_loss(0.0, gain, self.case.splits.forget.shape[0] / len(self.case.splits.train))

    def left_out(self) -> Target:
        """Second order's own prediction, with the λ that is right for kept sequences.

        Where that lies outside of the ``dampings``, more are tried, each ten times as far out.
        """
        delta, _, blocks = self.gradients

        def predicted(*dampings: float) -> Tensor:
            rises = [[self.rise(block, x) for x in dampings] for block in blocks]
            return torch.tensor(rises, dtype=torch.float64).mean(dim=0)

        means = {name: values.double().mean().item() for name, values in self.losses.items()}
        gap, grid, rises = means["holdout"] - means["retain"], self.dampings, predicted(*self.dampings)
        for _ in range(WIDENED):
            if gap > rises.max():
                grid = (grid[0] / 10, *grid)
                rises = torch.cat([predicted(grid[0]), rises])
            elif gap < rises.min():
                grid = (*grid, 10 * grid[-1])
                rises = torch.cat([rises, predicted(grid[-1])])
        damping = calibrated_damping(torch.tensor(grid, dtype=torch.float64), rises, gap)
        error = torch.tensor([self.rise(block, damping) for block in blocks]).std().item()
        return Target(means["forget"] + self.rise(delta, damping), error)

    def natural(self) -> list[dict[str, Any]]:
        """By λ, the forget loss above the retrained model's if the strength is not searched but n₋/n₊ or n₋/n.

        ``step`` is measured after the step along Δ, ``step:difference`` after that along Δ − g, and ``predicted``
        is what second order says of the latter.
        """
        (delta, g, _), model = self.gradients, self.case.original()
        start, forget, rows = snapshot(model), self.case.splits.forget, []
        n, own = len(self.case.splits.train), self.losses["forget"].double().mean().item()
        for damping in self.dampings:
            for name, v, others in (
                ("step", delta, n - len(forget)),
                ("step:difference", difference(delta, g), n),
            ):
                direction = removal_direction(self.curvature, v, damping)
                set_weights(model, start, direction, len(forget) / others)
                rows += self._rows(name, damping, error=mean_loss(model, forget) - self.truth)
            rows += self._rows("predicted", damping, error=own + self.rise(delta, damping) - self.truth)
        return rows

    def _rows(self, method: str, damping: float, **values: float) -> list[dict[str, Any]]:
        return [row | {"damping": damping} for row in self.case.rows(method, values)]

    def rows(self) -> list[dict[str, Any]]:
        """Everything that the chapter's table needs, as rows of results.

        Of each way the ``estimate``, its ``stated_error`` and its ``error`` against the truth; of these, and of
        the truth itself as ``retrained``, what K-FAC's step to that target leaves: ``holdout_excess`` and
        ``auc_excess``, of the membership attack by loss, over the retrained model. λ is chosen at the target of
        the bigrams.
        """
        targets = self.targets()
        line = self._line(self.curvature, targets["bigrams"].loss)
        found = []
        for way, target in ({"retrained": Target(self.truth, 0.0)} | targets).items():
            match = line.to(target.loss)
            values = {"estimate": target.loss, "error": target.loss - self.truth, **self._left(line)}
            values["reached"] = float(match.reached)
            if target.error is not None:
                values["stated_error"] = target.error
            found += self.case.rows(way, values)
        return found

    def _line(self, curvature: Curvature, target: float) -> Line:
        delta, model = self.gradients[0], self.case.original()
        start = snapshot(model)

        def path(damping: float) -> Line:
            return Line(model, removal_direction(curvature, delta, damping), self.case.splits.forget, start)

        chosen = choose({"damping": DAMPINGS["kfac"]}, path, self.case.validation, target)
        return path(**chosen.setting)

    def _left(self, line: Line) -> dict[str, float]:
        """What the model of the line differs by from the retrained one."""
        holdout = batched(sequence_losses, line.model, self.case.splits.holdout)
        forget = batched(sequence_losses, line.model, self.case.splits.forget)
        auc = membership_auc(-forget, -holdout)
        return {
            "holdout_excess": (holdout.double().mean() - self.retrained["holdout"].double().mean()).item(),
            "auc_excess": auc - membership_auc(-self.retrained["forget"], -self.retrained["holdout"]),
        }
