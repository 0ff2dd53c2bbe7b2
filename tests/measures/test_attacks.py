import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from unlearnlib.measures import attacks


def test_calibration_takes_away_what_every_model_knows():
    easy = torch.tensor([3.0, -1.0, 0.5])  # how likely a text is under any model
    own = torch.tensor([0.2, 0.0, -0.1])
    references = easy + torch.tensor([[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5]])
    torch.testing.assert_close(attacks.calibrated(easy + own, references), own)


@pytest.mark.parametrize("references", [torch.empty(0, 3), torch.zeros(3), torch.zeros(2, 4)])
def test_calibration_without_references_of_the_same_texts_is_refused(references):
    with pytest.raises(ValueError, match="at least one reference"):
        attacks.calibrated(torch.zeros(3), references)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("false_alarms", [0.01, 0.05])
def test_the_rate_agrees_with_the_roc_curve_of_sklearn(seed, false_alarms):
    rng = np.random.default_rng(seed)
    members, others = rng.normal(1, 1, 70), rng.normal(0, 1, 230)
    alarms, found, _ = roc_curve(
        np.r_[np.ones(70), np.zeros(230)], np.r_[members, others], drop_intermediate=False
    )
    expected = found[alarms <= false_alarms].max()
    rate = attacks.true_positive_rate(torch.tensor(members), torch.tensor(others), false_alarms)
    assert rate == pytest.approx(expected, abs=1e-12)


def test_ties_are_not_found():
    others = torch.zeros(200)
    assert attacks.true_positive_rate(torch.zeros(10), others) == 0
    assert attacks.true_positive_rate(torch.tensor([0.0, 1.0]), others) == 0.5


def test_too_few_to_speak_of_rare_alarms():
    with pytest.raises(ValueError, match="100 others"):
        attacks.true_positive_rate(torch.zeros(5), torch.zeros(99))
    with pytest.raises(ValueError, match="0 members"):
        attacks.true_positive_rate(torch.zeros(0), torch.zeros(500))


def test_an_interval_of_a_rate_against_its_definition():
    low, high = attacks.rate_interval(3, 20)
    assert stats.binom.sf(2, 20, low) == pytest.approx(0.025)
    assert stats.binom.cdf(3, 20, high) == pytest.approx(0.025)
    assert attacks.rate_interval(0, 64)[0] == 0


@pytest.mark.parametrize("found", [0, 1, 3, 8])
def test_the_chance_of_a_blind_attack_against_a_count_of_all_orders(found):
    """In every order as likely as any other, ``found`` or more of 8 members stand above the second of 150."""
    members, others = torch.full((8,), -1.0), torch.arange(150.0)
    members[:found] = 148.5  # above all of the others but one
    above = [math.comb(x + 1, x) * math.comb(8 - x + 148, 8 - x) for x in range(found, 9)]
    expected = sum(above) / math.comb(158, 8)
    assert attacks.rate_chance(members, others) == pytest.approx(expected, rel=1e-9)


def shadow_game(seed=0, models=16, texts=300):
    """Scores whose truth is known: a text's own ease, plus 1 where a model was trained on it, plus noise."""
    rng = np.random.default_rng(seed)
    ease, inside = rng.normal(0, 3, texts), np.zeros((models, texts), dtype=bool)
    for column in inside.T:
        column[rng.permutation(models)[: models // 2]] = True
    scores = ease + inside + rng.normal(0, 0.5, inside.shape)
    member = rng.random(texts) < 0.5
    return ease + member + rng.normal(0, 0.5, texts), scores, inside, member


@pytest.mark.parametrize("per_sequence", [False, True])
def test_lira_against_log_densities_of_scipy(per_sequence):
    own, scores, inside, _ = shadow_game()
    expected = []
    means = [[scores[side[:, i], i].mean() for i in range(len(own))] for side in (inside, ~inside)]
    sides = zip((inside, ~inside), means, strict=True)
    left = [[scores[side[:, i], i] - m for i, m in enumerate(mean)] for side, mean in sides]
    pooled = [np.sqrt(sum((x**2).sum() for x in side) / sum(len(x) - 1 for x in side)) for side in left]
    for i, s in enumerate(own):
        sd = [np.sqrt((side[i] ** 2).sum() / (len(side[i]) - 1)) for side in left] if per_sequence else pooled
        expected.append(stats.norm.logpdf(s, means[0][i], sd[0]) - stats.norm.logpdf(s, means[1][i], sd[1]))
    ratios = attacks.lira(*map(torch.tensor, (own, scores, inside)), per_sequence=per_sequence)
    np.testing.assert_allclose(ratios, expected, rtol=1e-12, atol=1e-12)


def test_lira_finds_what_the_score_alone_does_not():
    own, scores, inside, member = shadow_game()
    ratios = attacks.lira(*map(torch.tensor, (own, scores, inside))).numpy()
    assert roc_auc_score(member, ratios) > 0.9 > 0.65 > roc_auc_score(member, own)


def test_calibration_ranks_as_one_sided_lira_with_one_variance():
    """With one variance, log N(s; out) ranks scores above their means by s - mean: nothing else is left."""
    own, scores, inside, _ = map(torch.tensor, shadow_game())
    outside = torch.where(inside, torch.nan, scores)
    mean = outside.nanmean(dim=0)
    p = stats.norm.sf((own - mean) / 0.7)  # how unlikely a score so high is outside
    assert (np.argsort(-p) == np.argsort((own - mean).numpy())).all()


def test_lira_needs_two_models_on_each_side_and_scores_that_vary():
    own, scores, inside, _ = map(torch.tensor, shadow_game(models=4, texts=5))
    with pytest.raises(ValueError, match="inside of two shadow models"):
        attacks.lira(own, scores[:2], inside[:2] & False)
    with pytest.raises(ValueError, match="outside of two shadow models"):
        attacks.lira(own, scores, inside | True)
    with pytest.raises(ValueError, match="all tied"):
        attacks.lira(own, torch.zeros_like(scores), inside)
    with pytest.raises(ValueError, match="need shadow scores"):
        attacks.lira(own[:4], scores, inside)
    with pytest.raises(ValueError, match="two shadow models"):
        attacks.lira(own[:0], scores[:, :0], inside[:, :0])


def test_the_normal_formulas_against_many_draws():
    members, others = (0.3, 2.0), (0.0, 1.0)
    rng = np.random.default_rng(1)
    a, b = (torch.tensor(rng.normal(*side, 40_000)) for side in (members, others))
    auc = roc_auc_score(np.r_[np.ones(40_000), np.zeros(40_000)], np.r_[a, b])
    assert attacks.normal_auc(members, others) == pytest.approx(auc, abs=0.006)
    assert attacks.normal_rate(members, others) == pytest.approx(attacks.true_positive_rate(a, b), abs=0.012)
    # Equal means, so that no attack by the mean can succeed, and still far more than 1 % are found.
    assert attacks.normal_auc((0, 2), (0, 1)) == 0.5
    assert attacks.normal_rate((0, 2), (0, 1)) == pytest.approx(stats.norm.cdf(-2.3263 / 2), abs=1e-4)


@pytest.mark.parametrize("members", [[float("nan"), 1.0], [float("inf"), 1.0]])
def test_scores_that_are_not_finite_are_no_attack(members):
    with pytest.raises(ValueError, match="not finite"):
        attacks.true_positive_rate(torch.tensor(members), torch.zeros(200))
    with pytest.raises(ValueError, match="between 0 and 1"):
        attacks.true_positive_rate(torch.zeros(3), torch.zeros(200), false_alarms=1.0)
