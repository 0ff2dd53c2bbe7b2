"""The rule on real memories and planted ones, on tables made up here."""

import pandas as pd
import pytest

from unlearnlib import verdicts


def table(effects, reached=1.0, methods=("kfac", "fisher_recursion")):
    """Results in which real spans are left more often than planted ones by ``effects``, by corpus, one a seed."""
    rows = []
    for corpus, of_seeds in effects.items():
        for seed, effect in enumerate(of_seeds):
            for method in methods:
                common = {"corpus": corpus, "model": "tiny", "method": method, "seed": seed}
                values = {("reached", "all"): reached, ("not_removed", "real"): 0.3 + effect}
                values["not_removed", "planted"] = 0.3
                rows += [common | {"metric": m, "kind": k, "value": v} for (m, k), v in values.items()]
    return pd.DataFrame(rows)


CLEAR, AGAINST, OPEN = [0.2, 0.22, 0.21], [-0.2, -0.22, -0.21], [0.2, -0.2, 0.1]


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ({"a": CLEAR, "b": CLEAR}, verdicts.REPRODUCED),
        ({"a": CLEAR, "b": AGAINST}, verdicts.NOT_REPRODUCED),
        ({"a": CLEAR, "b": OPEN}, verdicts.INCONCLUSIVE),
        ({"a": CLEAR[:2], "b": CLEAR[:2]}, verdicts.INCONCLUSIVE),
    ],
)
def test_the_rule_asks_for_every_corpus(effects, expected):
    tests = verdicts.harder_to_remove(table(effects))
    assert verdicts.conclude(tests).tolist() == [expected]
    assert tests.loc[tests["decides"], "method"].tolist() == ["fisher_recursion"] * 2
    means = [sum(of_seeds) / len(of_seeds) for of_seeds in effects.values()]
    assert tests.loc[tests["decides"], "mean"].tolist() == pytest.approx(means)
    assert len(tests) == 4


def test_a_method_that_missed_matched_forgetting_concludes_nothing():
    tests = verdicts.harder_to_remove(table({"a": CLEAR}, reached=0.0))
    assert set(tests["verdict"]) == {verdicts.INCONCLUSIVE}
    assert set(tests["note"]) == {"missed matched forgetting"}


def test_seeds_without_known_canaries_do_not_count():
    found = table({"a": [*CLEAR, 0.5]})
    lost = (found["seed"] == 3) & (found["kind"] == "planted")
    tests = verdicts.harder_to_remove(found[~lost])
    assert set(tests["pairs"]) == {3}
