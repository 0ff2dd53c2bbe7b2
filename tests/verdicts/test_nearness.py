import pandas as pd
import pytest

from unlearnlib.verdicts import results, rules
from unlearnlib.verdicts.nearness import FIRST, SECOND, nearer_retrained

WIGGLE = [0.0, 0.01, -0.01]


def table(levels, metric="way_left"):
    return pd.DataFrame(
        {"corpus": "c", "model": "m", "method": method, "seed": seed, "metric": metric, "value": level + wiggle}
        for method, level in levels.items()
        for seed, wiggle in enumerate(WIGGLE if method in FIRST else WIGGLE[::-1])
    )


@pytest.mark.parametrize(
    ("second", "expected"),
    [(0.7, rules.REPRODUCED), (1.3, rules.NOT_REPRODUCED), (1.0, rules.INCONCLUSIVE)],
)
def test_nearer_is_less_of_the_way_left(second, expected):
    tests = nearer_retrained(table(dict.fromkeys(SECOND, second) | dict.fromkeys(FIRST, 1.0)))
    assert len(tests) == len(SECOND) * len(FIRST)
    assert set(tests["verdict"]) == {expected}
    assert tests["mean"].tolist() == pytest.approx([second - 1.0] * len(tests))
    assert rules.conclude(tests)["nearer, way_left"] == expected


def test_one_pair_that_fails_decides():
    levels = dict.fromkeys(SECOND, 0.7) | {FIRST[0]: 0.5, FIRST[1]: 1.0}
    tests = nearer_retrained(table(levels, "way_left_curvature"), "way_left_curvature")
    assert rules.conclude(tests)["nearer, way_left_curvature"] == rules.NOT_REPRODUCED
    assert tests.set_index(["method", "against"])["verdict"].eq(rules.REPRODUCED).sum() == 2


def test_of_one_seed_nothing_follows(tmp_path):
    one = table(dict.fromkeys((*SECOND, *FIRST), 1.0)).query("seed == 0")
    results.write_results(one, tmp_path, "moved_weights")
    read = results.read_results(tmp_path, "moved_weights")
    assert rules.conclude(nearer_retrained(read))["nearer, way_left"] == rules.INCONCLUSIVE
