"""From measured effects to verdicts: rules that are fixed in advance, intervals, and how tests are combined.

An *effect* is a difference measured once a seed, or once a model. A test holds the interval of its mean against a
rule, and a table of tests, a row each, decides a claim.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from unlearnlib.verdicts.results import interval

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_RUN = "reproduced", "not reproduced", "inconclusive", "not run"


@dataclass(frozen=True)
class Rule:
    """Where the claim ``holds`` and where it ``fails``: two open intervals (from, to) of effects."""

    holds: tuple[float, float]
    fails: tuple[float, float]


def below(limit: float = 0.0) -> Rule:
    """The claim that an effect is below ``limit``."""
    return Rule((-math.inf, limit), (limit, math.inf))


def above(limit: float = 0.0) -> Rule:
    """The claim that an effect is above ``limit``."""
    return Rule((limit, math.inf), (-math.inf, limit))


def verdict(ends: tuple[float, float], rule: Rule) -> str:
    """Reproduced if all of an interval lies where the claim holds, not reproduced if all of it where it fails.

    Anything else is inconclusive, an unknown interval (NaN, of one or two seeds) among it.
    """
    low, high = ends
    if rule.holds[0] < low and high < rule.holds[1]:
        return REPRODUCED
    if rule.fails[0] < low and high < rule.fails[1]:
        return NOT_REPRODUCED
    return INCONCLUSIVE


def combine(verdicts: Iterable[str], every: bool = True) -> str:
    """One verdict from those of all tests of a claim.

    Each must be reproduced for the claim to be, and one that is not reproduced fails it. Or, of a claim that
    something is so *somewhere*, not ``every``: one that is reproduced suffices, and all must fail to fail it.
    """
    verdicts = list(verdicts)
    if not verdicts:
        raise ValueError("a claim needs at least one test")
    first, last = (NOT_REPRODUCED, REPRODUCED) if every else (REPRODUCED, NOT_REPRODUCED)
    for outcome in (first, NOT_RUN, INCONCLUSIVE):
        if outcome in verdicts:
            return outcome
    return last


def judge(
    values: pd.Series,
    rule: Rule,
    allowed: Sequence[str] = (REPRODUCED, NOT_REPRODUCED),
    decides: bool = True,
    **labels: object,
) -> dict:
    """Test effects, one a seed or model, against ``rule``: one row of a table of tests.

    The verdict is by Student's interval of the mean; one that is not ``allowed`` becomes inconclusive. The columns
    are those of ``all_tests``; ``labels`` fill them.
    """
    low, high = interval(values)
    outcome = verdict((low, high), rule)
    row = {"claim": "", "exhibit": "", "corpus": "", "model": "", "method": "", "against": ""}
    row |= {"mean": values.mean(), "low": low, "high": high, "unit": "nats", "pairs": len(values)}
    row |= {"agree": int(((rule.holds[0] < values) & (values < rule.holds[1])).sum())}
    row |= {"verdict": outcome if outcome in allowed else INCONCLUSIVE, "decides": decides, "every": True}
    return row | {"holds_from": rule.holds[0], "holds_to": rule.holds[1], "note": ""} | labels


def not_run(claim: str, exhibit: str, decides: bool = True, corpus: str = "–", **labels: object) -> dict:
    """The row of a test whose exhibit has not been run."""
    row = judge(pd.Series(dtype=float), below(), decides=decides, claim=claim, exhibit=exhibit, corpus=corpus)
    return row | {"model": "–", "verdict": NOT_RUN} | labels


def conclude(tests: pd.DataFrame) -> pd.Series:
    """The verdict on each claim of a table of tests, from those tests that decide; if none does, inconclusive."""
    found = {}
    for claim, of_claim in tests.groupby("claim", sort=False):
        deciding = of_claim[of_claim["decides"]]
        found[claim] = combine(deciding["verdict"], deciding["every"].all()) if len(deciding) else INCONCLUSIVE
    return pd.Series(found, dtype=object)


def weakest(tests: pd.DataFrame) -> pd.Series:
    """The deciding test on which a claim's verdict hangs, among those that came out as the claim did.

    It is the one whose interval, or else mean, reaches furthest towards where the claim fails; or, where one test
    suffices, furthest away from there. Of a claim that is not run it is so among the tests that were. If none
    decides, the first.
    """
    deciding = tests[tests["decides"]]
    if deciding.empty:
        return tests.iloc[0]
    every = deciding["every"].all()
    outcome = combine(deciding["verdict"], every)
    if outcome != NOT_RUN:
        deciding = deciding[deciding["verdict"] == outcome]
    low, high = (deciding[name].fillna(deciding["mean"]) for name in ("low", "high"))
    inside = np.fmin(low - deciding["holds_from"], deciding["holds_to"] - high)
    if inside.isna().all():
        return deciding.iloc[0]
    return deciding.loc[inside.idxmin() if every else inside.idxmax()]


def effect_text(test: pd.Series, digits: int = 2) -> str:
    """Write the effect of one test, as in ``-0.43 [-0.51, -0.40]``; a dash where nothing was measured."""
    mean, low, high = (f"{round(test[name], digits) + 0.0:+.{digits}f}" for name in ("mean", "low", "high"))
    if math.isnan(test["mean"]):
        return "–"
    return mean if math.isnan(test["low"]) else f"{mean} [{low}, {high}]"
