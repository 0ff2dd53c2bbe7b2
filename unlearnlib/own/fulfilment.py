"""Unlearn your own model: fulfil an erasure request, from the files to a model folder with its report.

What the report says of the unlearned model is measured on the weights as they were written, loaded back from the
folder. The folder takes its name last of all: it is there whole or not at all, and it replaces nothing.

Of several processes (:mod:`unlearnlib.distributed`) all check and compute, and the first one writes.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib import cache, distributed
from unlearnlib.cost import Cost, Meter
from unlearnlib.measures.evaluation import mean_kl
from unlearnlib.measures.power import attack_power, detectable_auc
from unlearnlib.methods.targets import Target
from unlearnlib.models import loading
from unlearnlib.own.checks import check_request, entries
from unlearnlib.own.methods import Outcome, unlearn
from unlearnlib.own.rehearsal import rehearse
from unlearnlib.own.report import PROBED, as_markdown, measure, pair
from unlearnlib.own.request import STRENGTHS, Request
from unlearnlib.own.targets import FEWEST, difficulties, estimate_targets
from unlearnlib.own.texts import Material
from unlearnlib.own.warnings import warnings_of

logger = logging.getLogger(__name__)


def fulfil(request: Request, device: torch.device | str | None = None) -> dict[str, Any]:
    """Do all that a request asks, and write the unlearned model and its report to the request's output.

    Returns the report, as ``report.json`` has it. The folders of the model and the reference are only read. The
    output is held from the beginning, so that a second run for it is refused at once, and all that can be checked
    is checked before the models are measured.

    Raises what :func:`unlearnlib.cache.new_folder`, :func:`unlearnlib.own.checks.check_request` and
    :func:`unlearnlib.own.rehearsal.rehearse` raise, and FloatingPointError where the model, or what becomes of it,
    has no finite loss.
    """
    device = torch.device(device or loading.default_device())
    output, first = Path(request.output), distributed.rank() == 0
    with contextlib.ExitStack() as held:
        with distributed.together():
            folder = held.enter_context(cache.new_folder(output)) if first else cache.unfinished(output)
            with distributed.alone():
                logger.info("reading and checking")
                material, needed = check_request(request, device)
                rehearse(request, material, device)
        sources = {"reference": request.reference, "before": request.model}
        measured = {
            name: _inspect(source, material, request, device) for name, source in sources.items() if source
        }
        difficulty = difficulties(material, entries(material.tokenizer))
        estimates = _estimates(measured["before"], difficulty, material)
        target, source = _target(request, measured, estimates)
        outcome, cost, dtype = _write_unlearned(folder, material, request, target and target.loss, device)
        measured["after"] = _inspect(folder, material, request, device)
        if material.holdout is not None:
            for name in ("before", "after"):
                pair(measured[name], difficulty, measured.get("reference"))
        choice = outcome.choice
        report = {
            "request": request.public(material.hashes) | {"sequences": material.counts()},
            "result": {
                "target_loss": target and target.loss,
                "target_error": target and target.error,
                "target_from": source,
                "estimated_target": estimates and dataclasses.asdict(estimates["all"]),
                "reached": outcome.match.reached,
                "strength": outcome.match.strength,
                "unit": STRENGTHS[request.method],
                "setting": outcome.setting,
                "settings_tried": choice and _plain(choice.table),
                "at_edge": list(choice.at_edge) if choice else [],
                "slope": outcome.slope,
                "loss_before_rounding": outcome.match.loss,
                "dtype": dtype,
                "kl_validation": _divergence(request.model, folder, material.validation[:PROBED], device),
                "power": _power(material),
            },
            "sets": _sets(material, request, measured, estimates, source),
            "measures": {name: measured[name] for name in ("before", "after", "reference") if name in measured},
            "cost": {
                "processes": distributed.size(),
                "seconds": cost.seconds,
                "plain_passes": cost.plain_passes,
                "peak_bytes": cost.peak_bytes,
                "estimated_bytes": needed,
            },
            "notes": material.notes,
        }
        report["warnings"] = [*material.warnings, *warnings_of(report)]
        if first:
            (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
            (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
    return report


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON values; what is not finite is None."""
    return [
        {name: None if value in (math.inf, -math.inf) or value != value else value for name, value in row.items()}
        for row in table.to_dict("records")
    ]


def _estimates(
    before: dict[str, Any], difficulty: dict[str, Tensor], material: Material
) -> dict[str, Target] | None:
    """The targets that the holdout texts suggest, of all texts and by set; None without enough of them."""
    if material.holdout is None or len(material.holdout) < FEWEST:
        return None
    return estimate_targets(torch.tensor(before["holdout_losses"]), difficulty, material.sets)


def _target(
    request: Request, measured: dict[str, Any], estimates: dict[str, Target] | None
) -> tuple[Target | None, str | None]:
    """What is aimed at, with its standard error where it is an estimate, and where it comes from."""
    if request.strength == "estimate":
        return estimates["all"], "estimate"
    if request.strength != "match":
        return None, None
    if request.target_loss is not None:
        return Target(request.target_loss), "given"
    return Target(measured["reference"]["forget_loss"]), "reference"


def _sets(
    material: Material,
    request: Request,
    measured: dict[str, Any],
    estimates: dict[str, Target] | None,
    source: str | None,
) -> list[dict[str, Any]]:
    """What became of the texts of each forget file: mean losses in nats, and the target of that set alone.

    It is the reference's loss or the estimate, with its error, by where the target of all texts comes from.
    """
    ends, found = list(itertools.accumulate(material.sets.values())), []
    for (split, number), end in zip(material.sets.items(), ends, strict=True):
        means = {
            name: sum(values["forget_losses"][end - number : end]) / number for name, values in measured.items()
        }
        target = Target(means["reference"]) if source == "reference" else None
        if source == "estimate":
            target = estimates[split]
        found.append(
            {
                "name": Path(request.files[split]).name,
                "sequences": number,
                "before": means["before"],
                "after": means["after"],
                "target": target and target.loss,
                "target_error": target and target.error,
            }
        )
    return found


def _power(material: Material) -> dict[str, float | None] | None:
    """What attacks on so many sequences can notice."""
    if material.holdout is None:
        return None
    numbers = (len(material.forget), len(material.holdout))
    return {"detectable_auc": detectable_auc(*numbers), "power_at_0.7": attack_power(0.7, *numbers)}


def _write_unlearned(
    folder: Path, material: Material, request: Request, target: float | None, device: torch.device
) -> tuple[Outcome, Cost, str]:
    """Unlearn a copy of the model and write it in its source's number format, whose name is returned last."""
    logger.info("unlearning with %s", request.method)
    model = _loaded(request.model, device, dtype="auto")
    dtype = model.dtype
    model.float()
    with Meter(device) as meter:
        outcome = unlearn(model, material, request, target)
    model.to(dtype)
    name = str(dtype).removeprefix("torch.")
    if not (math.isfinite(outcome.match.loss) and all(p.isfinite().all() for p in model.parameters())):
        raise FloatingPointError(
            f"the unlearned model has no finite loss, or weights too large for {name}: take a smaller strength"
        )
    logger.info("writing the unlearned model")
    with distributed.together():  # nobody reads it before it is written
        if distributed.rank() == 0:
            _drop_foreign_code(model, material.tokenizer)
            model.save_pretrained(folder)
            material.tokenizer.save_pretrained(folder)
    return outcome, meter.cost, name


def _drop_foreign_code(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Remove references to program code in the source's folder: it was not used, and is not written."""
    for settings in (vars(model.config), vars(model.generation_config or model.config), tokenizer.init_kwargs):
        settings.pop("auto_map", None)


def _inspect(source: str | Path, material: Material, request: Request, device: torch.device) -> dict[str, Any]:
    """Load a model, measure it and let go of it: of all models one at a time is in memory."""
    logger.info("measuring %s", "the unlearned model" if isinstance(source, Path) else source)
    return measure(_loaded(source, device), material, request.learning_rate)


def _loaded(source: str | Path, device: torch.device, **settings: Any) -> PreTrainedModel:
    """A model that all processes have, or none."""
    with distributed.together():
        return loading.load_model(source, device=device, **settings)


def _divergence(first: str | Path, second: str | Path, sequences: Tensor, device: torch.device) -> float:
    return mean_kl(*(_loaded(source, device) for source in (first, second)), sequences)
