"""The onion: score every sequence that was trained on, remove a layer, and score again those that stay."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.experiment.case import Case
from unlearnlib.experiment.contenders import Contender, contenders_on
from unlearnlib.experiment.curvatures import curvature_builders
from unlearnlib.experiment.request_sets import RequestCase
from unlearnlib.experiment.shadows import Shadows
from unlearnlib.losses import batched, sequence_losses
from unlearnlib.measures.attacks import calibrated
from unlearnlib.methods.matching import Match
from unlearnlib.models.training import load_trained, train_missing
from unlearnlib.texts.sequences import Splits
from unlearnlib.weights import set_weights

REPEAT_SEED = 100
"""Added to a case's seed for each further repeat: other initial weights and another order of the batches."""

TARGETED = "targeted"
"""The layer of what is remembered best; all others are drawn at random."""


@dataclass(frozen=True)
class Onion:
    """The candidates of a case, what each is remembered by, and the layers that may be taken from them.

    The case's forget sequences are the candidates [n, tokens]; its retain sequences are never removed, and its
    holdout sequences are strangers to the models under attack. ``shadows`` models saw a random half of both each.
    A layer has ``size`` candidates. Every model is trained ``repeats`` times, from other initial weights and in
    another order, because one training is a noisy measurement.

    Raises ValueError if a layer would be empty or leave fewer than three candidates, or if there are no repeats.
    """

    case: Case
    shadows: int
    size: int
    draws: int
    repeats: int

    def __post_init__(self) -> None:
        n = len(self.case.splits.forget)
        if not 0 < self.size <= n - 3:
            raise ValueError(f"a layer of {self.size} of {n} candidates: take at least 1 and leave at least 3")
        if self.repeats < 2 or self.draws < 1:
            raise ValueError(
                f"{self.repeats} repeats and {self.draws} random layers: take 2 repeats or more, so that two "
                "retrainings can be compared, and at least one random layer"
            )

    @functools.cached_property
    def shadow_losses(self) -> Tensor:
        """The loss of every candidate, then every stranger, in each shadow model, in nats, [models, 2n]."""
        return Shadows(self.case, self.shadows).scores(functools.partial(batched, sequence_losses))

    @functools.cached_property
    def outside(self) -> Tensor:
        """The losses of each candidate, then each stranger, in the models that did not see it, [models/2, 2n]."""
        inside = Shadows(self.case, self.shadows).inside
        return self.shadow_losses.T[~inside.T].view(inside.shape[1], -1).T

    @functools.cached_property
    def memorisation(self) -> Tensor:
        """How much lower the loss of a candidate is in the models that saw it than in the others, in nats, [n].

        The memorisation of Feldman and Zhang (2020), of a loss in place of an accuracy.
        """
        shadows = Shadows(self.case, self.shadows)
        seen = self.shadow_losses.T[shadows.inside.T].view(len(shadows.pool), -1).mean(dim=1)
        return (self.outside.mean(dim=0) - seen)[: len(self.case.splits.forget)]

    @functools.cached_property
    def layers(self) -> dict[str, Tensor]:
        """By name, which candidates a layer takes, ascending, [size]: the best remembered, and some at random."""
        n, found = len(self.memorisation), {TARGETED: self.memorisation.argsort(descending=True)[: self.size]}
        generator = torch.Generator().manual_seed(self.case.seed)
        for i in range(1, self.draws + 1):
            found[f"random:{i}"] = torch.randperm(n, generator=generator)[: self.size]
        return {name: taken.sort().values for name, taken in found.items()}

    @functools.cached_property
    def staying(self) -> Tensor:
        """The candidates that no layer takes, on which all layers are compared, [s]."""
        stays = torch.ones(len(self.memorisation), dtype=torch.bool)
        stays[torch.cat(list(self.layers.values()))] = False
        return stays.nonzero().flatten()

    def request(self, layer: str, repeat: int = 0) -> RequestCase:
        """The request to forget a layer, put to the original model of one repeat."""
        splits, taken = self.case.splits, self.layers[layer]
        stays = torch.ones(len(splits.forget), dtype=torch.bool)
        stays[taken] = False
        names = [f"candidate {i}" for i in range(len(stays))]
        parts = Splits(
            splits.forget[taken],
            torch.cat([splits.forget[stays], splits.retain]),
            splits.holdout,
            {
                "forget": [names[i] for i in taken],
                "retain": [name for name, stay in zip(names, stays, strict=True) if stay],
                "holdout": [],
            },
        )
        nothing = torch.empty(0, splits.train.shape[1], dtype=torch.int64)
        return RequestCase(
            self.case.profile,
            self.case.seed + REPEAT_SEED * repeat,
            self.case.tokenizer,
            parts,
            layer,
            splits.train,
            nothing,
        )

    def losses(self, model: PreTrainedModel) -> Tensor:
        """The loss of every candidate, then every stranger, in nats, [2n]."""
        return batched(sequence_losses, model, torch.cat([self.case.splits.forget, self.case.splits.holdout]))

    def trained(self, which: str, layer: str = TARGETED) -> Tensor:
        """:meth:`losses` of the ``original`` or the ``retrained`` model in every repeat, [repeats, 2n]."""
        runs = [self.request(layer, repeat).runs()[which] for repeat in range(self.repeats)]
        train_missing(runs)
        return torch.stack([self.losses(load_trained(run)) for run in runs])

    def scores(self, losses: Tensor) -> Tensor:
        """The calibrated score of each candidate, then each stranger, from its ``losses``; both [..., 2n].

        By how much the loss is below its mean over the shadow models that never saw the sequence. These stay as
        they are when a layer is removed.
        """
        rows = losses.view(-1, losses.shape[-1])
        return torch.stack([calibrated(-row, -self.outside) for row in rows]).view_as(losses)

    def found(self, losses: Tensor, false_alarms: float) -> Tensor:
        """Which candidates the attack finds at so large a share of ``false_alarms`` among the strangers, [..., n].

        Every model has a threshold of its own, for an attacker who has strangers at hand.
        """
        scores, n = self.scores(losses), len(self.memorisation)
        threshold = scores[..., n:].quantile(1 - false_alarms, dim=-1, keepdim=True)
        return scores[..., :n] > threshold


def serve(
    onion: Onion,
    layer: str,
    repeat: int,
    chosen: Mapping[str, Mapping[str, float]],
    retrained: Tensor,
    max_steps: int,
    **sizes: int,
) -> dict[str, tuple[Tensor, Match]]:
    """By method, the losses [2n] of a model made to forget a layer, at matched forgetting, and its match.

    Each method of ``chosen`` has its setting there. ``retrained`` [2n] are the losses of the retrained model of
    that repeat: their mean over the layer is the target. ``sizes`` are those of
    :func:`unlearnlib.experiment.curvatures.curvature_builders`.
    """
    case, found = onion.request(layer, repeat), {}
    target = retrained[onion.layers[layer]].double().mean().item()
    for method, setting in chosen.items():
        path = request_contenders(case, [method], max_steps, **sizes)[method].path(**setting)
        match = path.to(target)
        found[method] = onion.losses(path.model), match
    return found


def request_contenders(
    case: Case, methods: Iterable[str], max_steps: int, dampings: Sequence[float] | None = None, **sizes: int
) -> dict[str, Contender]:
    """Those of all contenders on ``case`` that are named, with the curvatures that they need and no others.

    The search for a λ begins with ``dampings``, the same for all curvatures, where they are given.
    """
    builds = curvature_builders(case.estimation, case.seed, **sizes)
    everyone = contenders_on(case, {name: build for name, build in builds.items() if name in methods}, max_steps)
    own = {"damping": tuple(dampings)} if dampings else None
    return {
        method: replace(everyone[method], knobs=own) if own and method in builds else everyone[method]
        for method in methods
    }


def fidelity(rise: Tensor, by_retraining: Tensor) -> float:
    """Spearman's rank correlation over sequences, [n] each, of two changes of the score.

    A shift that is the same for all sequences leaves it as it is. Raises ValueError if a change is only that.
    """
    if rise.unique().numel() < 2 or by_retraining.unique().numel() < 2:
        raise ValueError("the change is the same for all sequences: there is nothing to correlate")
    return float(stats.spearmanr(rise.numpy(), by_retraining.numpy()).statistic)


def fidelity_by_damping(
    onion: Onion,
    method: str,
    dampings: Sequence[float],
    original: Tensor,
    retrained: Tensor,
    repeats: int,
    **sizes: int,
) -> list[dict[str, Any]]:
    """The fidelity of a method over a curvature, by λ, on the targeted layer: rows with a column ``damping``.

    ``original`` and ``retrained`` [repeats, 2n] are losses as in :func:`results`; the values are means over the
    first so many ``repeats``.
    """
    stays, taken = onion.staying, onion.layers[TARGETED]
    goal, values = (original - retrained)[:, stays], {damping: [] for damping in dampings}
    for repeat in range(repeats):
        request = onion.request(TARGETED, repeat)
        contender = request_contenders(request, [method], 1, **sizes)[method]
        for damping in dampings:
            path = contender.path(damping=damping)
            path.to(retrained[repeat, taken].double().mean().item())
            rise = (original[repeat] - onion.losses(path.model))[stays]
            values[damping].append(fidelity(rise, without_one(goal, repeat)))
            set_weights(path.model, path.start)
    return [
        row | {"damping": damping}
        for damping, found in values.items()
        for row in onion.case.rows(method, {"fidelity": sum(found) / len(found)})
    ]


def without_one(values: Tensor, left_out: int) -> Tensor:
    """The mean of ``values`` [repeats, n] over all repeats but one, [n]."""
    return torch.cat([values[:left_out], values[left_out + 1 :]]).mean(dim=0)


def results(
    onion: Onion,
    original: Tensor,
    retrained: Mapping[str, Tensor],
    served: Mapping[tuple[str, int], Mapping[str, tuple[Tensor, Match]]],
    false_alarms: float,
) -> list[dict[str, Any]]:
    """What an onion has shown, as rows of a results table with the further column ``layer``.

    ``original`` [repeats, 2n] and by layer ``retrained`` [repeats, 2n] are losses from :meth:`Onion.trained`,
    ``served`` by layer and repeat what :func:`serve` found. Every value is a mean over the repeats, and of
    ``random`` over all random layers. Of the candidates that no layer takes: ``found_staying``, the share that the
    attack finds at a share ``false_alarms`` of false alarms; ``newly_found``, the share that it finds now and did
    not find in the original of the repeat (for ``original:again`` in another original: what chance makes of it);
    ``rise``, by how much the score has risen, in nats; ``fidelity``, the rank correlation of that rise with the
    mean rise by retraining without the same layer, in the *other* repeats; ``fidelity_crossed``, the same with
    retraining without the targeted layer where this one is random, and the other way round. Besides,
    ``forget_loss``, ``holdout_loss`` and ``reached``, the share of repeats with the target reached.
    """
    stays, n = onion.staying, len(onion.memorisation)
    found_at_first = onion.found(original, false_alarms)[:, stays]
    rises = {layer: (original - losses)[:, stays] for layer, losses in retrained.items()}
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}

    def note(method: str, layer: str, repeat: int, losses: Tensor, **more: float) -> None:
        found, rise = onion.found(losses, false_alarms)[stays], (original[repeat] - losses)[stays]
        crossed = [other for other in rises if (other == TARGETED) != (layer == TARGETED)]
        values = {
            "found_staying": found.double().mean().item(),
            "newly_found": (found & ~found_at_first[repeat]).double().mean().item(),
            "rise": rise.double().mean().item(),
            "fidelity": fidelity(rise, without_one(rises[layer], repeat)),
            "fidelity_crossed": sum(fidelity(rise, without_one(rises[other], repeat)) for other in crossed)
            / len(crossed),
            "forget_loss": losses[onion.layers[layer]].double().mean().item(),
            "holdout_loss": losses[n:].double().mean().item(),
        }
        rows.setdefault((method, layer.partition(":")[0]), []).append(values | more)

    for repeat in range(onion.repeats):
        again = (repeat + 1) % onion.repeats
        rows.setdefault(("original", "none"), []).append(
            {
                "found_staying": found_at_first[repeat].double().mean().item(),
                "holdout_loss": original[repeat, n:].double().mean().item(),
            }
        )
        newly = found_at_first[again] & ~found_at_first[repeat]
        rows.setdefault(("original:again", "none"), []).append({"newly_found": newly.double().mean().item()})
        for layer, losses in retrained.items():
            note("retrained", layer, repeat, losses[repeat])
    for (layer, repeat), by_method in served.items():
        for method, (losses, match) in by_method.items():
            note(method, layer, repeat, losses, reached=float(match.reached))
    return [
        row | {"layer": layer}
        for (method, layer), values in rows.items()
        for row in onion.case.rows(method, pd.DataFrame(values).mean().to_dict())
    ]
