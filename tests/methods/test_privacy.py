"""The accounts of differential privacy against closed forms and numerical integration."""

import math

import pytest
import torch
from scipy import integrate, stats

from unlearnlib.methods import privacy
from unlearnlib.methods.privacy import Privacy


def gaussian_delta(epsilon, mu):
    """δ of a shift by μ standard deviations (Balle & Wang 2018, theorem 8), in closed form."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(("noise", "steps"), [(5.0, 1), (5.0, 9), (20.0, 100)])
def test_epsilon_of_full_batches_against_the_closed_form(noise, steps):
    # T Gaussian mechanisms are one with μ = √T/σ. Its Rényi divergence of order a is aμ²/2.
    delta, mu = 1e-5, math.sqrt(steps) / noise
    found = privacy.spent_epsilon(noise, 1.0, steps, delta)
    orders = torch.tensor(privacy.ORDERS, dtype=torch.float64)
    by_hand = (orders * mu**2 / 2 + torch.log1p(-1 / orders) - (delta * orders).log() / (orders - 1)).min()
    assert found == pytest.approx(by_hand.item(), rel=1e-9)
    assert gaussian_delta(found, mu) <= delta  # it is a bound
    assert gaussian_delta(0.8 * found, mu) > delta  # and not a loose one


@pytest.mark.parametrize(("noise", "steps"), [(5.0, 9), (20.0, 100)])
def test_the_tighter_epsilon_is_the_closed_form_and_below_that_of_the_accountant(noise, steps):
    delta, mu = 1e-5, math.sqrt(steps) / noise
    found = privacy.tighter_epsilon(noise, 1.0, steps, delta)
    assert gaussian_delta(found, mu) <= delta < gaussian_delta(found - 0.03, mu)
    assert found < privacy.spent_epsilon(noise, 1.0, steps, delta)
    assert type(found) is float  # what pages format


def test_epsilon_of_one_subsampled_step_against_numerical_integration():
    noise, rate, delta = 0.8, 0.2, 1e-3

    def excess(x, epsilon):
        p, q = stats.norm.pdf(x, 0, noise), stats.norm.pdf(x, 1, noise)
        return max((1 - rate) * p + rate * q - math.exp(epsilon) * p, 0.0)

    found = privacy.spent_epsilon(noise, rate, 1, delta)
    exact = [
        integrate.quad(excess, -10, 15, args=(e,), limit=500, points=[0, 1, 3])[0] for e in (found, 0.5 * found)
    ]
    assert exact[0] <= delta < exact[1]


def test_noise_multiplier_keeps_the_promise_and_wastes_little():
    for epsilon in (0.5, 8.0, 500.0):
        promise = Privacy(epsilon)
        noise = privacy.noise_multiplier(promise, 0.05, 200)
        spent = privacy.spent_epsilon(noise, 0.05, 200, promise.delta)
        assert 0.98 * epsilon <= spent <= epsilon


def test_a_group_as_large_as_one_sequence_is_one_sequence():
    promise = Privacy(3.0)
    assert privacy.group_guarantee(promise, 1) == pytest.approx((3.0, 1e-5))
    epsilon, delta = privacy.group_guarantee(promise, 3)
    assert (epsilon, delta) == pytest.approx((9.0, 1e-5 * (1 + math.exp(3) + math.exp(6))))
    assert privacy.group_guarantee(promise, 1000)[1] == math.inf


def test_groups_that_make_no_sense_are_refused():
    for size in (0, -2):
        with pytest.raises(ValueError, match=f"at least one sequence, not {size}"):
            privacy.group_guarantee(Privacy(1.0), size)
        with pytest.raises(ValueError, match=f"at least one sequence, not {size}"):
            privacy.spent_epsilon(1.0, 0.1, 10, 1e-5, size)
    with pytest.raises(ValueError, match="nothing is promised to one sequence"):
        privacy.group_guarantee(Privacy(None), 2)


def test_group_of_a_full_batch_is_a_larger_shift():
    one = privacy.spent_epsilon(10.0, 1.0, 4, 1e-5)
    assert privacy.spent_epsilon(30.0, 1.0, 4, 1e-5, size=3) == pytest.approx(one)
    sizes = [privacy.spent_epsilon(5.0, 0.05, 50, 1e-5, size=size) for size in (1, 2, 8)]
    assert sizes == sorted(sizes)
    assert sizes[2] > 2 * sizes[1]


def test_auc_bound_holds_for_randomised_response():
    # Whether a sequence was in the data is announced truthfully with probability p = e^ε/(1 + e^ε). The score is
    # the announcement, so that a member beats a stranger with p², ties with 2p(1 - p), and the AUC is p.
    for epsilon in (0.1, 1.0, 3.0):
        p = math.exp(epsilon) / (1 + math.exp(epsilon))
        assert 0.5 < p**2 + p * (1 - p) <= privacy.auc_bound(epsilon, 0.0) < 1
    assert privacy.auc_bound(0.0, 0.0) == 0.5
    assert privacy.auc_bound(0.0, 0.1) == pytest.approx(0.6)  # with δ all may be told, once in a while
    assert privacy.auc_bound(math.log(2), 0.1) == pytest.approx(0.8)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_a_promise_must_be_positive(epsilon):
    with pytest.raises(ValueError, match=r"epsilon must be positive and finite.*None means no noise"):
        Privacy(epsilon)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_delta_is_a_probability(delta):
    with pytest.raises(ValueError, match=r"delta must lie between 0 and 1.*well below 1/n"):
        Privacy(1.0, delta)
