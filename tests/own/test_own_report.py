import re

import pytest
import torch

from unlearnlib.measures.evaluation import membership_auc
from unlearnlib.own import report as own_report
from unlearnlib.own import warnings


def test_the_error_of_an_auc_of_a_half_is_mann_and_whitneys():
    for n, m in ((5, 9), (40, 300)):
        assert own_report.auc_error(0.5, n, m) == pytest.approx(((n + m + 1) / (12 * n * m)) ** 0.5)


def test_an_area_of_one_or_none_is_not_known_exactly():
    for n, m in ((2, 1), (5, 9), (40, 300)):
        assert own_report.auc_error(1.0, n, m) > 0
        assert own_report.auc_error(0.0, n, m) > 0
    assert own_report.auc_error(1.0, 2, 1) > 0.25


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 3), (5, 9), (20, 40)])
def test_chance_is_hardly_ever_called_an_attack(n, m):
    """Scores without any difference give an area that is warned of about once in twenty times at most."""
    draw, alarms = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        auc = membership_auc(torch.rand(n, generator=draw), torch.rand(m, generator=draw))
        error = own_report.auc_error(auc, n, m)
        report = report_of({"membership_auc": auc, "membership_auc_error": error}, sequences=(n, m))
        alarms += any("AUC" in w and "and not" in w for w in warnings.warnings_of(report))
    assert alarms <= 28


def evidence(**changes):
    values = {
        "forget_loss": 3.0,
        "retain_loss": 2.0,
        "holdout_loss": 4.0,
        "membership_auc": 0.5,
        "membership_auc_min_k": 0.5,
        "membership_auc_error": 0.01,
        "relearned_fall": 0.0,
        "forget_losses": [3.0] * 40,
        "exposure_bits": [8.0],
    }
    return values | changes


def report_of(after, reference="same", before=None, sequences=(400, 4000), method="kfac", **result):
    """A report without a fault, but for what is given."""
    before = evidence(forget_loss=2.0, membership_auc=0.9, **before or {})
    measured = {"before": before, "after": evidence(exposure_bits=[1.0]) | after}
    if reference is not None:
        measured["reference"] = evidence(exposure_bits=[2.0])
    good = {"reached": True, "strength": 0.5, "target_loss": 3.0, "loss_before_rounding": 3.0, "dtype": "bfloat16"}
    good |= {"damping": 0.1, "validation_loss_by_damping": {0.01: 5.0, 0.1: 4.0, 1.0: 5.0}}
    asked = {"sequences": dict(zip(("forget", "holdout"), sequences, strict=True)), "method": method}
    return {"request": asked, "measures": measured, "result": good | result}


def test_a_report_without_a_fault_has_no_warnings():
    assert warnings.warnings_of(report_of({})) == []


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (report_of({}, reached=False), "was not reached"),
        (report_of({}, strength=0.0), "nothing was changed: .* 2.00 nats, is at the target"),
        (report_of({}, strength=0.0, method="fisher_forgetting"), "noise: .* 3.00 nats, is at the target"),
        # Every strength that was tried made the loss infinite.
        (
            report_of({"forget_loss": 2.0}, strength=0.0, reached=False, loss_before_rounding=2.0),
            "3.00 nats was not reached: the method ended at 2.00",
        ),
        (report_of({"forget_loss": 3.1}), "in bfloat16 moved the forget loss from 3.00 to 3.10"),
        (report_of({}, damping=1.0), "the best λ, 1, is at an end of the grid"),
        (report_of({}, before={"forget_losses": [2.0] * 31}), "only 31 sequences"),
        (report_of({}, reference=None), "no retrained reference"),
        (report_of({"holdout_loss": None}), "no holdout file"),
        (report_of({"retain_loss": 2.2}), "the loss on what should stay rose by 0.20 nats"),
        (report_of({"relearned_fall": 0.3}), "falls by 0.30 nats, 0.30 more than in the reference"),
        (report_of({"membership_auc_error": 0.05}), "known to ±0.10 only"),
        (report_of({"membership_auc": 0.55}), "attack by loss still finds the texts: AUC 0.55 and not 0.50"),
        (report_of({"membership_auc_min_k": 0.4}), "too unlikely now.* attack by Min-K%: AUC 0.40 and not 0.50"),
        (report_of({"exposure_bits": [5.0]}), "secret 1 still stands out, with 5.0 bits"),
        (report_of({"exposure_bits": [None]}), "secret 1 could not be measured.* digits and the letters a to z"),
        (report_of({"relearned_fall": None}), "probe diverged"),
        (report_of({}, before={"exposure_bits": [1.0]}), "secret 1 did not stand out before"),
        (report_of({}, before={"membership_auc_error": 0.3}), "even before, the texts .* were not told"),
    ],
)
def test_each_fault_has_its_warning(report, message):
    [warning] = warnings.warnings_of(report)
    assert re.search(message, warning)


def test_the_fall_when_relearning_is_told_from_what_exceeds_the_references():
    report = report_of({"relearned_fall": 0.5})
    report["measures"]["reference"]["relearned_fall"] = 0.2
    [warning] = warnings.warnings_of(report)
    assert "falls by 0.50 nats, 0.30 more than in the reference: part of the texts may be hidden" in warning
