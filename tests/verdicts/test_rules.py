"""Verdicts on effects that are made up here."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from unlearnlib.verdicts import rules
from unlearnlib.verdicts.rules import INCONCLUSIVE, NOT_REPRODUCED, NOT_RUN, REPRODUCED


@pytest.mark.parametrize(
    ("interval", "rule", "expected"),
    [
        ((-0.2, -0.1), rules.below(), REPRODUCED),
        ((0.1, 0.2), rules.below(), NOT_REPRODUCED),
        ((-0.1, 0.2), rules.below(), INCONCLUSIVE),
        ((-0.1, 0.0), rules.below(), INCONCLUSIVE),
        ((0.0, 0.0), rules.below(), INCONCLUSIVE),
        ((-0.2, -0.1), rules.below(-0.3), NOT_REPRODUCED),
        ((-0.2, -0.1), rules.below(-0.15), INCONCLUSIVE),
        ((0.1, 0.2), rules.above(), REPRODUCED),
        ((-0.2, -0.1), rules.above(), NOT_REPRODUCED),
        ((math.nan, math.nan), rules.below(), INCONCLUSIVE),
        ((math.nan, math.nan), rules.above(), INCONCLUSIVE),
    ],
)
def test_verdict_is_where_the_interval_lies(interval, rule, expected):
    assert rules.verdict(interval, rule) == expected


def test_one_failure_fails_a_claim_and_one_doubt_leaves_it_open():
    assert rules.combine([REPRODUCED] * 3) == REPRODUCED
    assert rules.combine([REPRODUCED, INCONCLUSIVE]) == INCONCLUSIVE
    assert rules.combine([REPRODUCED, INCONCLUSIVE, NOT_REPRODUCED]) == NOT_REPRODUCED
    assert rules.combine([REPRODUCED, NOT_RUN]) == NOT_RUN
    assert rules.combine([NOT_RUN, NOT_REPRODUCED]) == NOT_REPRODUCED
    with pytest.raises(ValueError, match="at least one test"):
        rules.combine([])


def test_one_success_suffices_where_something_is_claimed_somewhere():
    assert rules.combine([NOT_REPRODUCED, INCONCLUSIVE, NOT_RUN, REPRODUCED], every=False) == REPRODUCED
    assert rules.combine([NOT_REPRODUCED, NOT_RUN], every=False) == NOT_RUN
    assert rules.combine([NOT_REPRODUCED, INCONCLUSIVE], every=False) == INCONCLUSIVE
    assert rules.combine([NOT_REPRODUCED] * 2, every=False) == NOT_REPRODUCED


def test_a_test_is_judged_by_students_interval_of_its_mean():
    values = pd.Series([-0.9, -0.1, -0.1, -0.1, -0.1])  # all of one sign, but one seed carries the mean
    test = rules.judge(values, rules.below())
    ends = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([test["low"], test["high"]], [ends.low, ends.high])
    assert (test["agree"], test["pairs"], test["verdict"]) == (5, 5, INCONCLUSIVE)
    assert rules.judge(values - 0.3, rules.below())["verdict"] == REPRODUCED
    assert rules.judge(values - 0.3, rules.below(), allowed=[NOT_REPRODUCED])["verdict"] == INCONCLUSIVE
    assert rules.judge(values[:2], rules.below())["verdict"] == INCONCLUSIVE


def test_effects_are_written_with_their_sign():
    assert rules.effect_text(pd.Series({"mean": -0.431, "low": -0.5, "high": 0.004})) == "-0.43 [-0.50, +0.00]"
    assert rules.effect_text(pd.Series({"mean": 1.25, "low": math.nan, "high": math.nan}), 1) == "+1.2"
    assert rules.effect_text(pd.Series(rules.not_run("C1", "four_datasets"))) == "–"
