"""Where every method moves the weights at matched forgetting, and where retraining in two orders puts them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.case import Case
from unlearnlib.experiment.comparison import Settings
from unlearnlib.experiment.contenders import MAX_STEPS, contenders_on
from unlearnlib.experiment.report import Report
from unlearnlib.losses import mean_loss
from unlearnlib.measures import movement, rounding
from unlearnlib.methods.first_order import ascent_direction
from unlearnlib.methods.fisher_updates import Build
from unlearnlib.models.training import Run, load_start, load_trained
from unlearnlib.weights import Vector, cosine, difference, dot, flatten, norm, set_weights, snapshot

ORDER_SEED = 7000
"""Added to a case's seed to draw the other order of the sequences."""

BITS = (8, 4)
"""To how many bits weights are rounded."""


def other_orders(case: Case) -> dict[str, Run]:
    """The original and the retrained model once more, from the same initial weights but in another order.

    The sequences are the same; since they are handed to training in an order of their own, so are its batches.
    """
    runs = {}
    for number, name in enumerate(("original", "retrained")):
        run = case.runs()[name]
        generator = torch.Generator().manual_seed(2 * (case.seed + ORDER_SEED) + number)
        order = torch.randperm(len(run.sequences), generator=generator)
        runs[f"{name}:order"] = replace(run, sequences=run.sequences[order])
    return runs


def displacements(
    report: Report, chosen: Settings, builds: Mapping[str, Build], max_steps: int = MAX_STEPS
) -> dict[str, Vector]:
    """Where each method of ``chosen`` ends at matched forgetting, and each reference, less the original's weights.

    The references are ``retrained`` and :func:`other_orders`. Measures all of these models and the original.
    """
    case = report.case
    original = case.original()
    start = snapshot(original)
    report.measure("original", original)
    found = {}
    orders = {name: load_trained(run) for name, run in other_orders(case).items()}
    for name, model in {"retrained": report.retrained, **orders}.items():
        report.measure(name, model)
        found[name] = difference(snapshot(model), start)
    for method, setting in chosen.items():
        path = contenders_on(case, builds, max_steps)[method].path(**setting)
        report.match(method, path, brief=True)
        found[method] = difference(snapshot(path.model), start)
    return found


def measure_movements(report: Report, found: Mapping[str, Vector], top: int) -> None:
    """Note how far each of :func:`displacements` reaches, how evenly, and whether to the retrained model.

    The overlap is that of the ``top`` singular subspaces, a mean over the matrices of the linear layers; the
    method ``chance`` has what two subspaces drawn at random would have on average. ``cosine_training`` is that
    with the way which training the original took from its initial weights.
    """
    model, run = report.case.original(), report.case.runs()["original"]
    start = snapshot(model)
    trained = difference(start, snapshot(load_start(run.source, run, seed=run.seed, device=model.device)))
    retrained, again = found["retrained"], found["retrained:order"]
    of_retrained = layer_matrices(model, retrained)
    shapes = torch.tensor([matrix.shape for matrix in of_retrained.values()], dtype=torch.float64)
    chance = (top / shapes).mean(dim=0).tolist()
    report.add("chance", {"overlap_left": chance[0], "overlap_right": chance[1]})
    for method, delta in found.items():
        entries = flatten(delta)
        values = {
            "movement": norm(delta),
            "relative_movement": norm(delta) / norm(start),
            "excess_kurtosis": movement.excess_kurtosis(entries),
            "kurtosis_within": movement.excess_kurtosis(flatten(movement.alike(delta))),
            "largest_share": movement.largest_share(entries),
            "cosine_training": cosine(delta, trained),
        }
        if method != "retrained":
            pairs = [
                movement.subspace_overlap(matrix, of_retrained[name], top)
                for name, matrix in layer_matrices(model, delta).items()
            ]
            left, right = torch.tensor(pairs, dtype=torch.float64).mean(dim=0).tolist()
            values |= {
                "distance_to_retrained": norm(difference(delta, retrained)),
                "cosine_retrained": cosine(delta, retrained),
                "overlap_left": left,
                "overlap_right": right,
            }
        if method not in ("retrained", "retrained:order"):
            values["way_left"] = movement.way_left(delta, retrained, delta, again)
        report.add(method, values)


def measure_norms(report: Report, found: Mapping[str, Vector], curvature: Curvature) -> None:
    """Note the length of each of :func:`displacements` in the norm of a curvature, and what it should forget.

    ``curvature_norm`` is √(δᵀCδ); ``linear_forgetting`` is Δᵀδ in nats, with Δ the gradient of the forget loss at
    the original. ``way_left_curvature`` is ``way_left`` with distances in the norm of the curvature.
    """
    gradient = ascent_direction(report.case.original(), report.case.splits.forget)
    images = {method: curvature.matvec(delta) for method, delta in found.items()}
    retrained, again = found["retrained"], images["retrained:order"]
    for method, delta in found.items():
        values = {
            "curvature_norm": math.sqrt(dot(delta, images[method]).item()),
            "linear_forgetting": dot(gradient, delta).item(),
        }
        if method not in ("retrained", "retrained:order"):
            values["way_left_curvature"] = movement.way_left(delta, retrained, images[method], again)
        report.add(method, values)


def measure_rounding(report: Report, found: Mapping[str, Vector], bits: Iterable[int] = BITS) -> None:
    """Note what rounding to so many ``bits`` does to the original and to each of :func:`displacements`.

    That is the forget and the holdout loss, and but for the original what is left of the movement.
    """
    splits = report.case.splits
    original, model = report.case.original(), report.case.original()
    start = snapshot(original)
    for method, delta in {"original": None, **found}.items():
        set_weights(model, start, delta)
        for number in bits:
            coarse, values = rounding.rounded(model, number), {}
            for name, rows in (("forget", splits.forget), ("holdout", splits.holdout)):
                values[f"{name}_loss_{number}bit"] = mean_loss(coarse, rows)
            if delta is not None:
                left = rounding.survival(original, model, number)
                values |= {f"{name}_{number}bit": getattr(left, name) for name in ("changed", "expected", "kept")}
            report.add(method, values)


def places_table(report: Report, found: Mapping[str, Vector]) -> pd.DataFrame:
    """How far the weights have moved relative to their size, by layer and kind, as tidy results.

    ``layer`` counts from 0 and is empty for what is outside the layers.
    """
    start = snapshot(report.case.original())
    rows = []
    for method, delta in found.items():
        for (layer, kind), value in movement.relative_movement(delta, start).items():
            [row] = report.case.rows(method, {"relative_movement": value})
            rows.append(row | {"layer": "" if layer is None else str(layer), "kind": kind})
    return pd.DataFrame(rows)


def layer_matrices(model: PreTrainedModel, v: Vector) -> dict[str, Tensor]:
    """The linear layers' part of a vector, by name, [outputs, inputs]; the model takes it as weights."""
    set_weights(model, v)
    return {name: matrix.clone() for name, matrix in rounding.matrices(model).items()}
