import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve

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
