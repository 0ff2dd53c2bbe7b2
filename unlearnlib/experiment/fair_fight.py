"""One fight, all methods: served on the same cases at their chosen settings, with what each has read and spent."""

import functools
from collections.abc import Iterable, Mapping

import pandas as pd
from torch import Tensor

from unlearnlib.experiment.comparison import Settings
from unlearnlib.experiment.contenders import contenders_on
from unlearnlib.experiment.report import Report
from unlearnlib.losses import batched, sequence_losses
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
