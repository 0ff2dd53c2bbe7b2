"""A comparison of many methods on one case: settings chosen for all by one rule, and all followed as chosen."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace

from unlearnlib.experiment.case import Case
from unlearnlib.experiment.contenders import MAX_STEPS, contenders_on
from unlearnlib.experiment.report import Report
from unlearnlib.methods.first_order import ascent_direction, retain_loss
from unlearnlib.methods.fisher_updates import Build, forgetting_noise, removal_direction
from unlearnlib.methods.matching import Line
from unlearnlib.methods.tuning import MOST, Knobs
from unlearnlib.methods.walks import adam_walk
from unlearnlib.weights import snapshot

Settings = Mapping[str, Mapping[str, float]]
"""By method, a value for each of its knobs."""

TUNING_STEPS, TUNING_RATE = 10, 1e-3
"""Fine-tuning, a reference that is not matched: its steps of Adam and their learning rate."""


def choose_settings(
    report: Report,
    methods: Iterable[str],
    builds: Mapping[str, Build],
    most: int = MOST,
    max_steps: int = MAX_STEPS,
    knobs: Mapping[str, Knobs] | None = None,
) -> dict[str, dict[str, float]]:
    """By method, the setting that :meth:`Report.choose` finds for it, in at most so many trials each.

    The search begins in the grids that a method comes with, or in those of ``knobs``, which then has all methods'.
    """
    chosen = {}
    for method in methods:  # contenders anew each time, so that a curvature is kept no longer than it is used
        contender = contenders_on(report.case, builds, max_steps)[method]
        if knobs is not None:
            contender = replace(contender, knobs=knobs[method])
        chosen[method] = report.choose(method, contender, most)
    return chosen


def measure_references(report: Report) -> None:
    """Measure the models for which nothing is matched.

    The retrained model, the original, a second retrained model, and the original fine-tuned on the retain set.
    """
    case, tuned = report.case, report.case.original()
    tuning = adam_walk(tuned, retain_loss, case.splits.forget, case.estimation, TUNING_RATE, case.seed)
    for _ in range(TUNING_STEPS):
        next(tuning.steps)
    for method, model in {
        "retrained": report.retrained,
        "original": case.original(),
        "retrained:again": case.retrained_again(),
        "finetuned": tuned,
    }.items():
        report.measure(method, model)
        if method.startswith("retrained"):  # the probe says nothing of a model that has not forgotten
            report.probe(method, model)


def follow_methods(
    report: Report, chosen: Settings, builds: Mapping[str, Build], max_steps: int = MAX_STEPS
) -> None:
    """Follow every method with its setting in ``chosen``, and with K-FAC's λ Fisher Forgetting.

    What goes in steps of an optimizer takes ``max_steps`` at the most. The passes that a curvature takes are
    counted with each method that needs it.
    """
    for method, setting in chosen.items():
        contender = contenders_on(report.case, builds, max_steps)[method]
        report.follow(method, functools.partial(contender.path, **setting))
        if method == "kfac":
            path = functools.partial(forgetting, report.case, builds[method], report.target, **setting)
            report.follow("fisher_forgetting", path)


def forgetting(case: Case, build: Build, target: float, damping: float) -> Line:
    """The path of Fisher Forgetting: from half of the noise that would reach ``target`` alone, along the step."""
    model, forget = case.original(), case.splits.forget
    start, curvature, delta = snapshot(model), build(model), ascent_direction(model, forget)
    noise = Line(model, forgetting_noise(curvature, start, damping, case.seed), forget, start)
    noise.go(noise.to(target).strength / 2)
    return Line(model, removal_direction(curvature, delta, damping), forget)
