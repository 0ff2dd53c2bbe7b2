"""The paper's own methods and opponents on its three axes: efficacy, fidelity and efficiency (Gu et al. 2024)."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
from transformers import PreTrainedModel

from unlearnlib.cost import Meter
from unlearnlib.curvature.protocol import Curvature
from unlearnlib.experiment.case import make_cases
from unlearnlib.experiment.comparison import Settings, forgetting
from unlearnlib.experiment.contenders import DAMPINGS, MAX_STEPS, Contender, first_order, removal
from unlearnlib.experiment.private_training import RANKED, PlantedCase, choose_training, epoch_seconds
from unlearnlib.experiment.profiles import Profile
from unlearnlib.experiment.report import Report
from unlearnlib.measures.exposure import expected_exposure
from unlearnlib.methods.dp_sgd import load_private
from unlearnlib.methods.fisher_updates import Build, forgetting_noise
from unlearnlib.methods.matching import Line, Path
from unlearnlib.methods.privacy import Privacy
from unlearnlib.methods.tuning import MOST, Choice, Knobs
from unlearnlib.verdicts.rules import below, judge
from unlearnlib.weights import snapshot

OURS = ("fisher_recursion", "fisher_forgetting", "noise")
"""The paper's methods: Fisher Removal, Fisher Forgetting, and the latter read as noise alone."""

OPPONENTS = ("gradient_ascent:sgd", "finetuned:matched")
"""Its opponents that are brought to matched forgetting."""

REFERENCES = ("original", "retrained", "retrained:again")
"""Models that are no method's: the last two are the standard, and how far it is from itself."""

AXES = {
    "exposure_gap_bits": "efficacy",
    "attack_gap": "efficacy",
    "price_nats": "fidelity",
    "kl_holdout": "fidelity",
    "work_ratio": "efficiency",
}
"""By metric its axis; of each the smaller is the better."""

NEVER_SEEN = expected_exposure(RANKED)
"""The mean exposure in bits of a secret that a model has never seen."""


@dataclass
class AxesReport(Report):
    """A report of a :class:`PlantedCase` in which every model is also asked for the secrets of the forget set."""

    def measure(
        self, method: str, model: PreTrainedModel, brief: bool = False, **extra: float
    ) -> dict[str, float]:
        """As :meth:`Report.measure`, and the mean exposure in bits."""
        case: PlantedCase = self.case
        return super().measure(method, model, brief, exposure_bits=case.exposure(model), **extra)


def axes_reports(profile: Profile, copies: int) -> list[AxesReport]:
    """A report a seed, with its :data:`REFERENCES` measured; each secret is in ``copies`` sequences of its set."""
    reports = []
    for case in make_cases(profile, functools.partial(PlantedCase.plant, copies=copies)):
        report, training = AxesReport(case, case.retrained()), case.runs()["retrained"]
        passes = float(training.training.epochs * len(training.sequences))
        report.measure("original", case.original())
        report.measure("retrained", report.retrained, plain_passes=passes)
        report.measure("retrained:again", case.retrained_again())
        reports.append(report)
    return reports


def paper_contenders(
    case: PlantedCase, build: Build, target: float, max_steps: int = MAX_STEPS
) -> dict[str, Contender]:
    """By method, what serves a request: :data:`OURS`, over the curvature of ``build``, and :data:`OPPONENTS`.

    Fisher Forgetting's noise is half of what would reach ``target``, in nats, alone. The curvature is that at the
    original's weights, and is built once. What goes in steps of an optimizer takes ``max_steps`` at the most.
    """

    @functools.cache
    def once() -> Curvature:
        return build(case.original())

    def at_original(model: PreTrainedModel) -> Curvature:
        return once()

    def noise(damping: float) -> Path:
        model = case.original()
        direction = forgetting_noise(once(), snapshot(model), damping, case.seed)
        return Line(model, direction, case.splits.forget)

    dampings = {"damping": DAMPINGS["fisher_recursion"]}
    both, others = functools.partial(forgetting, case, at_original, target), first_order(case, max_steps)
    return {
        "fisher_recursion": removal(case, "fisher_recursion", at_original),
        "fisher_forgetting": Contender("forget, retain", dampings, both),
        "noise": Contender("retain", dampings, noise),
        "gradient_ascent:sgd": others["gradient_ascent:sgd"],
        "finetuned:matched": others["finetuned"],
    }


def serve_request(report: AxesReport, chosen: Settings, build: Build, max_steps: int = MAX_STEPS) -> None:
    """Serve the request by every method of ``chosen`` from nothing, curvature included, and measure each.

    What is called ``finetuned`` there is fine-tuning that is not matched: it takes all ``max_steps``.
    """
    for method, setting in chosen.items():
        if method == "finetuned":
            tuned = first_order(report.case, max_steps)[method].path(**setting)
            with Meter(tuned.model.device) as meter:
                for _ in range(max_steps):
                    next(tuned.steps)
            report.costs[method] = meter.cost
            report.measure(method, tuned.model, brief=True, plain_passes=meter.cost.plain_passes)
        else:
            report.match(method, functools.partial(_path, report, method, setting, build, max_steps), brief=True)


def _path(report: AxesReport, method: str, setting: Mapping[str, float], build: Build, max_steps: int) -> Path:
    return paper_contenders(report.case, build, report.target, max_steps)[method].path(**setting)


def choose_privately(report: AxesReport, epsilon: float, delta: float, knobs: Knobs, most: int = MOST) -> Choice:
    """:func:`choose_training` of private training, as ``dp_sgd:ε``; notes how it was found."""
    choice = choose_training(report.case, Privacy(epsilon, delta), knobs, most)
    report.add(f"dp_sgd:{epsilon:g}", choice.noted)
    return choice


def train_privately(report: AxesReport, epsilon: float, delta: float, setting: Mapping[str, float]) -> None:
    """Measure private training in the original's place, as ``dp_sgd:ε``; a batch counts with its expected size."""
    run = report.case.private_run(Privacy(epsilon, delta), **setting)
    passes = float(run.steps * run.training.batch_size)
    report.measure(f"dp_sgd:{epsilon:g}", load_private(run), plain_passes=passes)


def training_seconds(case: PlantedCase) -> dict[str, float]:
    """Seconds of training the retrained model, and of private training for as long: from an epoch of each."""
    plain, private = epoch_seconds(case)  # both over forget and retain sequences
    run, retraining = case.runs()["original"], case.runs()["retrained"]
    share = len(retraining.sequences) / len(run.sequences)
    return {"retrained": plain * run.training.epochs * share, "dp_sgd": private * run.training.epochs}


def arithmetic_passes(method: str, m: int, block: int, tokens: int) -> float:
    """What a method computes beside its passes, in plain passes over one sequence: of 6 ``tokens`` d operations.

    The inverse of the Fisher's blocks takes 4 m b operations a weight; another power of it, by the blocks'
    eigendecompositions, 2 m b to form them and 9 b² (Golub & Van Loan 2013).
    """
    inverse, power = 4 * m * block, 2 * m * block + 9 * block**2
    of_method = {"fisher_recursion": inverse, "fisher_forgetting": inverse + power, "noise": power}
    return of_method.get(method, 0) / (6 * tokens)


def on_axes(table: pd.DataFrame) -> pd.DataFrame:
    """What a ``table`` of results says on the three axes, as further rows: the metrics of :data:`AXES`.

    All are told from the retrained model of the same corpus and seed. ``exposure_gap_bits`` and ``attack_gap``
    are how far, to either side, the mean exposure and the AUC of the calibrated attack are from its own;
    ``price_nats`` is holdout loss above its own; ``work_ratio`` plain passes and ``arithmetic_passes`` over the
    passes of its training. ``kl_holdout`` is in the table already.
    """
    keys = ["corpus", "model", "seed", "method"]
    wide = table.pivot_table(index=keys, columns="metric", values="value", sort=False)
    own = wide.xs("retrained", level="method").reindex(wide.index.droplevel("method")).set_axis(wide.index)
    found = pd.DataFrame(
        {
            "exposure_gap_bits": (wide["exposure_bits"] - own["exposure_bits"]).abs(),
            "attack_gap": (wide["membership_auc_calibrated"] - own["membership_auc_calibrated"]).abs(),
            "price_nats": wide["holdout_loss"] - own["holdout_loss"],
            "work_ratio": (wide["plain_passes"] + wide["arithmetic_passes"].fillna(0)) / own["plain_passes"],
        }
    )
    return found.rename_axis(columns="metric").stack().dropna().rename("value").reset_index()


def duels(table: pd.DataFrame, ours: Iterable[str] = OURS) -> pd.DataFrame:
    """Each of ``ours`` against each opponent in ``table``, the results of one corpus, on each metric of AXES.

    The effect is the paired difference, ours minus the opponent's: below zero ours is better, and whether that
    holds is judged as everywhere, by Student's interval of three seeds or more. A row a test; ``metric`` and
    ``axis`` are further columns.
    """
    ours, rows = list(ours), []
    others = [method for method in table["method"].unique() if method not in {*REFERENCES, *OURS}]
    for metric, axis in AXES.items():
        values = table[table["metric"] == metric].pivot(index="seed", columns="method", values="value")
        for method in ours:
            for other in others:
                labels = {"method": method, "against": other, "metric": metric, "axis": axis}
                rows.append(judge(values[method] - values[other], below(), exhibit="three_axes", **labels))
    return pd.DataFrame(rows)
