import pandas as pd
import pytest

from unlearnlib.verdicts import INCONCLUSIVE, NOT_REPRODUCED, NOT_RUN, REPRODUCED, conclude
from unlearnlib.verdicts.onion import onion_tests

SEEDS = 4


def made(targeted=0.8, random=0.6, recursion=0.5, crossed=0.2, retrained=0.55, reached=1.0, seeds=SEEDS):
    rows = []
    for seed in range(seeds):
        luck = 0.01 * (-1) ** seed
        cells = {
            ("original", "none", "found_staying"): 0.5,
            ("retrained", "targeted", "found_staying"): targeted + luck,
            ("retrained", "random", "found_staying"): random - luck,
            ("retrained", "targeted", "fidelity"): retrained - luck,
            ("kfac", "targeted", "fidelity"): 0.1,
            ("kfac", "targeted", "fidelity_crossed"): 0.4 + luck,
            ("kfac", "targeted", "reached"): 1.0,
            ("fisher_recursion", "targeted", "fidelity"): recursion + luck / 2,
            ("fisher_recursion", "targeted", "fidelity_crossed"): crossed,
            ("fisher_recursion", "targeted", "reached"): reached,
        }
        rows += [
            {"corpus": "c", "model": "m", "method": m, "seed": seed, "metric": k, "value": v, "layer": layer}
            for (m, layer, k), v in cells.items()
        ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("change", "onion", "own"),
    [
        ({}, REPRODUCED, REPRODUCED),
        ({"targeted": 0.55}, NOT_REPRODUCED, REPRODUCED),  # more than before, fewer than after a random removal
        ({"targeted": 0.4, "random": 0.3}, NOT_REPRODUCED, REPRODUCED),  # the other way round
        ({"random": 0.805}, INCONCLUSIVE, REPRODUCED),
        ({"crossed": 0.6}, REPRODUCED, NOT_REPRODUCED),  # like retraining, but without whatever layer
        ({"recursion": 0.3}, REPRODUCED, NOT_REPRODUCED),  # sees the layer, and is far from retraining
        ({"recursion": 0.45}, REPRODUCED, INCONCLUSIVE),  # at the margin
        ({"reached": 0.5}, REPRODUCED, INCONCLUSIVE),
        ({"seeds": 2}, INCONCLUSIVE, INCONCLUSIVE),
    ],
)
def test_the_rules(change, onion, own):
    verdicts = conclude(onion_tests(made(**change)))
    assert verdicts.to_dict() == {"onion": onion, "onion own": own}


def test_other_methods_are_shown_and_decide_nothing():
    tests = onion_tests(made())
    assert not tests.loc[tests["method"] == "kfac", "decides"].any()
    assert (tests.loc[tests["method"] == "kfac", "verdict"] == NOT_REPRODUCED).all()
    assert tests["pairs"].eq(SEEDS).all()


def test_an_exhibit_that_was_not_run_has_no_verdict():
    assert (conclude(onion_tests(None)) == NOT_RUN).all()
