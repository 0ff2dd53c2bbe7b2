"""Unlearn your own model: fulfil an erasure request, from the files to a model folder with its report.

What the report says of the unlearned model is measured on the weights as they were written, loaded back from the
folder. The folder takes its name last of all: it is there whole or not at all, and it replaces nothing.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearnlib import cache
from unlearnlib.cost import Cost, Meter
from unlearnlib.measures.evaluation import mean_kl
from unlearnlib.models import loading
from unlearnlib.own.checks import check_request, load
from unlearnlib.own.methods import Outcome, unlearn
from unlearnlib.own.rehearsal import rehearse
from unlearnlib.own.report import PROBED, as_markdown, measure
from unlearnlib.own.request import STRENGTHS, Request
from unlearnlib.own.texts import Material
from unlearnlib.own.warnings import warnings_of


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
    with cache.new_folder(Path(request.output)) as folder:
        material, needed = check_request(request, device)
        rehearse(request, material, device)
        sources = {"reference": request.reference, "before": request.model}
        measured = {
            name: _inspect(source, material, request, device) for name, source in sources.items() if source
        }
        target = request.target_loss
        if request.strength == "match" and target is None:
            target = measured["reference"]["forget_loss"]
        outcome, cost, dtype = _write_unlearned(folder, material, request, target, device)
        measured["after"] = _inspect(folder, material, request, device)
        report = {
            "request": request.public(material.hashes) | {"sequences": material.counts()},
            "result": {
                "target_loss": target,
                "reached": outcome.match.reached,
                "strength": outcome.match.strength,
                "unit": STRENGTHS[request.method],
                "damping": outcome.damping,
                "validation_loss_by_damping": outcome.sweep,
                "loss_before_rounding": outcome.match.loss,
                "dtype": dtype,
                "kl_validation": _divergence(request.model, folder, material.validation[:PROBED], device),
            },
            "measures": {name: measured[name] for name in ("before", "after", "reference") if name in measured},
            "cost": {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "estimated_bytes": needed},
            "notes": material.notes,
        }
        report["warnings"] = [*material.warnings, *warnings_of(report)]
        (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
    return report


def _write_unlearned(
    folder: Path, material: Material, request: Request, target: float | None, device: torch.device
) -> tuple[Outcome, Cost, str]:
    """Unlearn a copy of the model and write it in its source's number format, whose name is returned last."""
    model = load(request.model, dtype="auto", device=device)
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
    return measure(load(source, device=device), material, request.learning_rate)


def _divergence(first: str | Path, second: str | Path, sequences: Tensor, device: torch.device) -> float:
    return mean_kl(*(load(source, device=device) for source in (first, second)), sequences)
