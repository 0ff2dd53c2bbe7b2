import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from unlearnlib.measures import power
from unlearnlib.measures.evaluation import auc_error


@pytest.mark.parametrize(("members", "others"), [(3, 5), (2, 6)])
def test_p_values_are_those_of_counting_all_orders(members, others):
    """Every choice of ranks for the members is equally likely if nothing tells them apart."""
    scores = torch.randn(members + others, generator=torch.Generator().manual_seed(1))
    scores[:members] += 1

    def area(chosen):
        rest = [i for i in range(members + others) if i not in chosen]
        return sum(i > j for i in chosen for j in rest) / (members * others)

    ranks = scores.argsort().argsort().tolist()
    observed = abs(area(ranks[:members]) - 0.5)
    areas = [area(chosen) for chosen in itertools.combinations(range(members + others), members)]
    expected = sum(abs(value - 0.5) >= observed - 1e-12 for value in areas) / len(areas)
    assert power.rank_test(scores[:members], scores[members:]) == pytest.approx(expected)


def test_the_power_of_a_single_sequence_is_an_integral():
    """One member among 99 others is an outlier at 5 % if at most one of them is beyond it, on either side."""
    z = np.linspace(-8, 12, 20001)
    below = norm.cdf(z)
    for auc in (0.5, 0.9, 0.99):
        beyond = [p**99 + 99 * p**98 * (1 - p) for p in (below, 1 - below)]
        shift = math.sqrt(2) * norm.ppf(auc)
        expected = np.trapezoid(norm.pdf(z - shift) * sum(beyond), z)
        assert power.attack_power(auc, 1, 99) == pytest.approx(expected, abs=0.04)


def test_with_many_sequences_it_is_that_of_the_normal_approximation():
    members, others, auc = 60, 200, 0.6
    null = math.sqrt((members + others + 1) / (12 * members * others))
    away = (auc - 0.5 - norm.ppf(0.975) * null) / auc_error(auc, members, others)
    assert power.attack_power(auc, members, others) == pytest.approx(norm.cdf(away), abs=0.04)


def test_the_smallest_area_that_is_noticed():
    found = power.detectable_auc(20, 100)
    assert power.attack_power(found, 20, 100) >= 0.8 > power.attack_power(found - 0.01, 20, 100)
    assert power.detectable_auc(1, 30) is None  # the most extreme of 31 ranks is not rare enough, on two sides
    assert power.attack_power(0.99, 1, 30) == 0
    assert power.detectable_auc(200, 400) < found


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="at least one of each"):
        power.rank_test(torch.ones(0), torch.ones(3))
    with pytest.raises(ValueError, match="at least one of each"):
        power.attack_power(0.7, 3, 0)
    with pytest.raises(ValueError, match="strictly between"):
        power.attack_power(1.0, 3, 3)
