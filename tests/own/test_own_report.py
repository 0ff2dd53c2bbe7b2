import re

import pytest
import torch

from unlearnlib.measures.evaluation import auc_error, membership_auc
from unlearnlib.own import warnings


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 3), (5, 9), (20, 40)])
def test_chance_is_hardly_ever_called_an_attack(n, m):
    """Scores without any difference give an area that is warned of about once in twenty times at most."""
    draw, alarms = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        auc = membership_auc(torch.rand(n, generator=draw), torch.rand(m, generator=draw))
        error = auc_error(auc, n, m)
        report = report_of({"membership_auc": auc, "membership_auc_error": error}, sequences=(n, m))
        alarms += any("AUC" in w and "and not" in w for w in warnings.warnings_of(report))
    assert alarms <= 28


def evidence(**changes):
    values = {
        "forget_loss": 3.0,
        "validation_loss": 2.0,
        "holdout_loss": 4.0,
        "membership_auc": 0.5,
        "membership_auc_min_k": 0.5,
        "membership_auc_error": 0.01,
        "membership_auc_paired": 0.5,
        "membership_p_paired": 0.9,
        "relearned_fall": 0.0,
        "forget_losses": [3.0] * 40,
        "exposure_bits": [8.0],
    }
    return values | changes


def report_of(after, reference="same", before=None, sequences=(400, 4000), method="kfac", sets=(), **result):
    """A report without a fault, but for what is given."""
    before = evidence(forget_loss=2.0, membership_auc=0.9) | (before or {})
    measured = {"before": before, "after": evidence(exposure_bits=[1.0]) | after}
    if reference is not None:
        measured["reference"] = evidence(exposure_bits=[2.0])
    good = {"reached": True, "strength": 0.5, "target_loss": 3.0, "loss_before_rounding": 3.0, "dtype": "bfloat16"}
    good |= {"setting": {"damping": 0.1}, "at_edge": [], "slope": 0.01, "target_error": None}
    good |= {"target_from": "reference", "estimated_target": {"loss": 3.05, "error": 0.05}}
    good["power"] = {"detectable_auc": 0.55, "power_at_0.7": 1.0}
    asked = {"sequences": dict(zip(("forget", "holdout"), sequences, strict=True)), "method": method}
    return {"request": asked, "measures": measured, "result": good | result, "sets": sets}


def test_a_report_without_a_fault_has_no_warnings():
    assert warnings.warnings_of(report_of({})) == []


def one_set(**changes):
    """A set of several that is at its target."""
    return {"name": "a.txt", "after": 3.0, "target": 3.0, "target_error": None} | changes


SECRET_KEPT = report_of({"exposure_bits": [5.0]})
LEARNT_BY_NONE = report_of({})
LEARNT_BY_NONE["measures"]["reference"]["forget_loss"] = 2.01
FALLS_MORE = report_of({"relearned_fall": 0.5})
FALLS_MORE["measures"]["reference"]["relearned_fall"] = 0.2
SETTING = {"learning_rate": 1e-3, "alpha": 0.0123}
FAULTS = [
    (warnings.nothing_but_noise, report_of({}, strength=0.0, method="fisher_forgetting"), "noise: .* 3.00 nats"),
    (warnings.nothing_changed, report_of({}, strength=0.0), "nothing was changed: .* 2.00 nats, is at the target"),
    (warnings.target_not_reached, report_of({}, reached=False), "was not reached"),
    (  # every strength that was tried made the loss infinite
        warnings.target_not_reached,
        report_of({"forget_loss": 2.0}, strength=0.0, reached=False, loss_before_rounding=2.0),
        "3.00 nats was not reached: the method ended at 2.00",
    ),
    (
        warnings.target_not_reached,
        report_of({}, reached=False, strength=200.0, method="newton", setting=SETTING),
        "with theory's strength α = 0.0123 it may lead no further. Try another",
    ),
    (
        warnings.hasty_descent,
        report_of({}, strength=0.3, method="newton", setting={"learning_rate": 0.03, "alpha": 0.1}),
        "newton took 0.3 steps, .* a learning rate well below 0.03",
    ),
    (
        warnings.little_is_kept,
        report_of({}, strength=20.0, method="newton", setting={"learning_rate": 1e-3, "alpha": 5.0}),
        "more .α = 5.: newton takes the texts to keep for all",
    ),
    (warnings.moved_by_rounding, report_of({"forget_loss": 3.1}), "in bfloat16 moved .* from 3.00 to 3.10"),
    (warnings.setting_at_an_end, report_of({}, at_edge=["damping"]), "the best damping, 0.1, is at an end of"),
    (
        warnings.setting_at_an_end,
        report_of({}, setting={"learning_rate": 1e-4, "retain_weight": 16.0}, at_edge=["retain_weight"]),
        "the best retain weight, 16, is at an end",
    ),
    (
        warnings.target_estimated,
        report_of({}, target_from="estimate", target_error=0.3),
        "1.00 nats above where the model was, is an estimate with a standard error of 0.30",
    ),
    (
        warnings.target_unlike_estimate,
        report_of({}, estimated_target={"loss": 2.75, "error": 0.05}),
        "0.25 nats above what the holdout texts suggest, 2.75 give or take 0.05",
    ),
    (
        warnings.target_unlike_estimate,
        report_of({}, estimated_target={"loss": 3.4, "error": 0.1}, target_from="given"),
        "0.40 nats below what the holdout texts suggest",
    ),
    (
        warnings.set_apart,
        report_of({}, sets=(one_set(), one_set(name="b.txt", after=3.2))),
        "texts of b.txt ended 0.20 nats above their own",
    ),
    (
        warnings.set_apart,
        report_of({}, sets=(one_set(after=2.5, target_error=0.1), one_set(name="b.txt"))),
        "texts of a.txt ended 0.50 nats below their own",
    ),
    (warnings.not_at_a_minimum, report_of({}, slope=0.2), "0.20 nats are of first order.*kfac:difference"),
    (warnings.few_sequences, report_of({}, before={"forget_losses": [2.0] * 31}), "only 31 sequences"),
    (warnings.no_reference, report_of({}, reference=None), "no retrained reference"),
    (warnings.reference_knows_the_texts, LEARNT_BY_NONE, "was it trained on them"),
    (
        warnings.no_holdout,
        report_of({"holdout_loss": None, "membership_auc_paired": None}, power=None),
        "no holdout file",
    ),
    (
        warnings.membership_uncertain,
        report_of({}, power={"detectable_auc": 0.74}),
        "an AUC below 0.74 is noticed less often than four times in five",
    ),
    (warnings.membership_uncertain, report_of({}, power={"detectable_auc": None}), "could have been noticed"),
    (warnings.never_told_apart, report_of({}, before={"membership_auc_error": 0.3}), "even before, .* not told"),
    (
        warnings.attack_tells_the_texts,
        report_of({"membership_auc": 0.55}),
        "attack by loss still finds the texts: AUC 0.55 and not 0.50",
    ),
    (
        warnings.attack_tells_the_texts,
        report_of({"membership_auc": 0.55}, reference=None),
        "attack by loss still finds the texts: AUC 0.55 and not 0.50",
    ),
    (
        warnings.attack_tells_the_texts,
        report_of({"membership_auc_min_k": 0.4}),
        "too unlikely now.* attack by Min-K%: AUC 0.40 and not 0.50",
    ),
    (
        warnings.attack_tells_the_texts,
        report_of({"membership_auc_paired": 0.8, "membership_p_paired": 0.012}),
        "compares each text's loss with the reference's loss finds the texts: AUC 0.80, by chance 1.2%",
    ),
    (
        warnings.attack_tells_the_texts,
        report_of({"membership_auc_paired": 0.2, "membership_p_paired": 0.05}, reference=None),
        "with what its difficulty lets one expect finds the texts by too high losses: AUC 0.20",
    ),
    (warnings.damage, report_of({"validation_loss": 2.2}), "the loss on what should stay rose by 0.20 nats"),
    (warnings.probe_diverged, report_of({"relearned_fall": None}), "probe diverged"),
    (
        warnings.hidden,
        FALLS_MORE,
        "falls by 0.50 nats, 0.30 more than in the reference: part of the texts may be hidden",
    ),
    (
        warnings.hidden,
        report_of({"relearned_fall": 0.3}, reference=None),
        "falls by 0.30 nats, without a reference it cannot be said",
    ),
    (warnings.exposed, SECRET_KEPT, "secret 1 still stands out, with 5.0 bits"),
    (warnings.exposed, report_of({"exposure_bits": [None]}), "secret 1 could not be measured.* letters a to z"),
    (warnings.exposed, report_of({}, before={"exposure_bits": [1.0]}), "secret 1 did not stand out before"),
]


@pytest.mark.parametrize(("rule", "report", "message"), FAULTS)
def test_each_fault_has_its_warning_and_no_other_but_for_a_lacking_reference(rule, report, message):
    evidence = warnings.evidence_of(report)
    [warning] = rule(evidence)
    assert re.search(message, warning)
    assert set(warnings.warnings_of(report)) == {warning, *warnings.no_reference(evidence)}


NEARLY_FALLS = report_of({"relearned_fall": 0.25})
NEARLY_FALLS["measures"]["reference"]["relearned_fall"] = 0.2
STANDS_OUT_ANYWAY = report_of({"exposure_bits": [5.0]})
STANDS_OUT_ANYWAY["measures"]["reference"]["exposure_bits"] = [5.0]
NEARLY = [
    (warnings.nothing_but_noise, report_of({}, strength=1e-9, method="fisher_forgetting")),
    (warnings.nothing_but_noise, report_of({}, strength=0.0)),
    (warnings.nothing_changed, report_of({}, strength=1e-9)),
    (warnings.nothing_changed, report_of({}, strength=0.0, method="fisher_forgetting")),
    (warnings.nothing_changed, report_of({}, strength=0.0, loss_before_rounding=2.98)),
    (warnings.nothing_changed, report_of({}, target_loss=None)),
    (warnings.target_not_reached, report_of({}, strength=0.0, reached=False)),
    (warnings.moved_by_rounding, report_of({"forget_loss": 3.009})),
    (warnings.setting_at_an_end, report_of({}, setting={})),
    (warnings.hasty_descent, report_of({}, strength=5.0, method="newton", setting=SETTING)),
    (warnings.hasty_descent, report_of({}, strength=0.0, method="newton", setting=SETTING)),
    (warnings.hasty_descent, report_of({}, strength=0.3)),
    (warnings.little_is_kept, report_of({}, method="newton", setting=SETTING | {"alpha": 0.99})),
    (warnings.little_is_kept, report_of({})),
    (warnings.target_estimated, report_of({}, target_from="estimate", target_error=0.25)),
    (warnings.target_estimated, report_of({}, strength=0.0, target_error=9.0)),
    (warnings.target_estimated, report_of({}, target_loss=None, target_from=None)),
    (warnings.target_unlike_estimate, report_of({}, estimated_target={"loss": 2.81, "error": 0.05})),
    (warnings.target_unlike_estimate, report_of({}, estimated_target=None)),
    (warnings.target_unlike_estimate, report_of({}, target_loss=None, target_from=None)),
    (
        warnings.target_unlike_estimate,
        report_of({}, target_from="estimate", target_error=0.1, estimated_target={"loss": 2.0, "error": 0.1}),
    ),
    (warnings.set_apart, report_of({}, sets=(one_set(after=3.09), one_set(after=2.5, target=None)))),
    (warnings.set_apart, report_of({}, sets=(one_set(after=9.0),))),
    (warnings.set_apart, report_of({}, sets=(one_set(), one_set(after=3.25, target_error=0.1)))),
    (warnings.not_at_a_minimum, report_of({}, slope=0.09)),
    (warnings.not_at_a_minimum, report_of({}, slope=0.5, method="kfac:difference")),
    (warnings.not_at_a_minimum, report_of({}, slope=None, method="gradient_ascent")),
    (warnings.few_sequences, report_of({}, before={"forget_losses": [2.0] * 32})),
    (warnings.no_reference, report_of({})),
    (warnings.reference_knows_the_texts, report_of({}, reference=None)),
    (warnings.no_holdout, report_of({"holdout_loss": 9.0})),
    (warnings.membership_uncertain, report_of({}, power={"detectable_auc": 0.6})),
    (warnings.membership_uncertain, report_of({}, power=None)),
    (warnings.never_told_apart, report_of({}, before={"membership_auc_error": 0.2})),
    (warnings.never_told_apart, report_of({"holdout_loss": None}, before={"membership_auc_error": None})),
    (warnings.attack_tells_the_texts, report_of({"membership_auc": 0.51, "membership_auc_min_k": 0.49})),
    (warnings.attack_tells_the_texts, report_of({"membership_auc": 0.6}, sequences=(10, 20))),
    (warnings.attack_tells_the_texts, report_of({"holdout_loss": None, "membership_auc": None})),
    (warnings.attack_tells_the_texts, report_of({"membership_auc_paired": 0.7, "membership_p_paired": 0.06})),
    (warnings.damage, report_of({"validation_loss": 2.09})),
    (warnings.probe_diverged, report_of({"relearned_fall": None}, before={"forget_losses": [2.0]})),
    (warnings.hidden, NEARLY_FALLS),
    (warnings.hidden, report_of({"relearned_fall": None})),
    (warnings.exposed, report_of({"exposure_bits": [4.3]})),
    (warnings.exposed, STANDS_OUT_ANYWAY),
    (warnings.exposed, report_of({"exposure_bits": []})),
]


@pytest.mark.parametrize(("rule", "report"), NEARLY)
def test_what_is_no_fault_is_not_warned_of(rule, report):
    assert list(rule(warnings.evidence_of(report))) == []


def test_every_rule_has_a_case_of_each_kind():
    assert {rule for rule, *_ in FAULTS} == {rule for rule, *_ in NEARLY} == set(warnings.RULES)


def test_warnings_come_in_the_order_of_the_rules():
    report = report_of(
        {"validation_loss": 2.2, "exposure_bits": [5.0, None]}, before={"exposure_bits": [8.0, 8.0]}
    )
    report["measures"]["reference"]["exposure_bits"] = [2.0, 2.0]
    report["result"]["reached"] = False
    heads = ("the target loss", "the loss on what should stay", "secret 1", "the exposure of secret 2")
    said = warnings.warnings_of(report)
    assert [w.startswith(head) for w, head in zip(said, heads, strict=True)] == 4 * [True]
