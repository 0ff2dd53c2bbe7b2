"""One fight, all methods: served on the same cases at their chosen settings, with what each has read and spent."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from unlearnlib.experiment.comparison import Settings
from unlearnlib.experiment.contenders import contenders_on
from unlearnlib.experiment.report import Report
from unlearnlib.losses import batched, mean_loss, sequence_losses
from unlearnlib.measures.extraction import continuations
from unlearnlib.methods.fisher_updates import Build
from unlearnlib.methods.matching import Path


def serve(report: Report, chosen: Settings, builds: Mapping[str, Build], max_steps: int) -> dict[str, Tensor]:
    """Serve the case's request by every method of ``chosen`` from nothing, and measure and probe what it has made.

    The passes of each count all that it does, curvature included. Notes ``validation_loss`` as well. Returns by
    method the loss of every validation sequence in nats, [n].
    """
    losses = {}

    def fresh(method: str, setting: Mapping[str, float], made: list[Path]) -> Path:
        made.append(contenders_on(report.case, builds, max_steps)[method].path(**setting))
        return made[-1]

    for method, setting in chosen.items():
        made: list[Path] = []
        report.match(method, functools.partial(fresh, method, setting, made))
        losses[method] = batched(sequence_losses, made[0].model, report.case.validation)
        report.add(method, {"validation_loss": losses[method].double().mean().item()})
    return losses


def along(
    report: Report,
    chosen: Settings,
    builds: Mapping[str, Build],
    shares: Sequence[float],
    prompts: Tensor,
    tokens: int,
    max_steps: int,
) -> pd.DataFrame:
    """What each method of ``chosen`` makes of the original on its way, and beyond its target; and ``retrained``.

    ``shares`` ascend, as parts of the way from the original's forget loss, 0, to the retrained model's, 1. A row
    is a method and a share (1 for the retrained model): the losses on ``forget``, ``retain`` and ``holdout`` in
    nats, whether the place was ``reached`` (a walk stops after ``max_steps``), and as ``written`` a list of the
    texts, each of so many ``tokens``, with which the model greedily goes on from each of ``prompts``
    [n, prompt tokens].
    """
    case = report.case

    def found(method: str, share: float, reached: bool, model: PreTrainedModel) -> dict[str, Any]:
        losses = {name: mean_loss(model, getattr(case.splits, name)) for name in ("forget", "retain", "holdout")}
        written = case.tokenizer.batch_decode(continuations(model, prompts, tokens))
        return {"method": method, "share": share, "reached": reached, "written": written} | losses

    rows = [found("retrained", 1.0, True, report.retrained)]
    for method, setting in chosen.items():
        path = contenders_on(case, builds, max_steps)[method].path(**setting)
        for share in shares:
            goal = report.original_loss + share * (report.target - report.original_loss)
            reached = share == 0 or path.to(goal).reached
            rows.append(found(method, share, reached, path.model))
    return pd.DataFrame(rows)


def searches_table(report: Report) -> pd.DataFrame:
    """Every setting that was tried for the report's ``choices``, as tidy results.

    The metric is ``validation_excess``, the validation loss above the retrained model's in nats; ``setting`` is
    such as ``damping=1e-05``, ``order`` counts the trials of a method from 0, ``reached`` is 0 or 1.
    """
    rows = []
    for method, choice in report.choices.items():
        for order, trial in enumerate(choice.table.to_dict("records")):
            [row] = report.case.rows(
                method, {"validation_excess": trial["validation_loss"] - report.retrained_validation}
            )
            setting = " ".join(f"{name}={trial[name]:.3g}" for name in choice.setting)
            rows.append(row | {"setting": setting, "order": order, "reached": int(trial["reached"])})
    return pd.DataFrame(rows)


def undominated(points: Mapping[str, Iterable[float]]) -> list[str]:
    """The methods that no other beats: none is as good or better in all of a method's numbers and better in one.

    The smaller the numbers, the better.
    """
    rows = {method: tuple(values) for method, values in points.items()}
    return [
        method
        for method, own in rows.items()
        if not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in rows.values()
        )
    ]
