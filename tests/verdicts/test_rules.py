"""Verdicts on effects made up here, and intervals against all resamples and a textbook."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from unlearnlib.verdicts import rules
from unlearnlib.verdicts.results import bootstrap_interval
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


def test_intervals_of_five_against_all_resamples_and_the_textbook():
    values = np.array([0.3, -0.1, 0.4, 0.25, 0.05])
    means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]  # all 5^5 resamples, none at random
    np.testing.assert_allclose(bootstrap_interval(values), np.quantile(means, [0.025, 0.975]), atol=0.011)
    half = 2.7764451052 * values.std(ddof=1) / math.sqrt(5)  # the 97.5 % point of t with 4 degrees, from a table
    np.testing.assert_allclose(rules.t_interval(values), [values.mean() - half, values.mean() + half])
    test = stats.ttest_rel(values + 7, np.full(5, 7.0)).confidence_interval(0.95)
    np.testing.assert_allclose(rules.t_interval(values), [test.low, test.high])
    assert all(np.isnan(rules.t_interval([1.0])))
    assert rules.t_interval([2.0, 2.0]) == (2.0, 2.0)


def test_effects_are_written_with_their_sign():
    assert rules.effect_text(pd.Series({"mean": -0.431, "low": -0.5, "high": 0.004})) == "-0.43 [-0.50, +0.00]"
    assert rules.effect_text(pd.Series({"mean": 1.25, "low": math.nan, "high": math.nan}), 1) == "+1.2"
    assert rules.effect_text(pd.Series(rules.not_run("C1", "four_datasets"))) == "–"
