import pandas as pd
import pytest

from unlearnlib.verdicts.leads import distances, lead

# Of each family one method that is good on the first seed by luck, and one that is good on all others.
ROWS = pd.DataFrame(
    {
        "lucky": [0.0, 0.9, 0.9, 0.9],
        "steady": [0.5, 0.6, 0.5, 0.6],
        "odd": [0.0, 0.8, 0.8, 0.8],
        "sound": [0.2, 0.2, 0.3, 0.2],
        "retrained:again": [0.1, -0.1, 0.1, -0.1],
    }
)
FIRST, SECOND = ("lucky", "steady"), ("odd", "sound")


def test_the_best_of_a_seed_are_named_by_the_other_seeds():
    found = lead(ROWS, FIRST, SECOND)
    assert found.bests == ("steady", "sound")
    # 0.5 - 0.2 and not 0.0 - 0.0, which the first seed itself would have named.
    assert found.values.to_list() == pytest.approx([0.3, 0.4, 0.2, 0.4])
    # By seed 1 alone sound and steady are the best, by seed 0 alone lucky and odd.
    assert lead(ROWS[:2], FIRST, SECOND).values.to_list() == pytest.approx([0.3, 0.1])
    assert lead(ROWS[:1], FIRST, SECOND).values.to_list() == pytest.approx([0.0])


def test_a_lead_counts_beyond_chance_and_with_an_interval_without_zero():
    found = lead(ROWS, FIRST, SECOND)
    assert found.chance == pytest.approx(0.1)
    assert found.winner == "second"
    assert lead(ROWS, SECOND, FIRST).winner == "first"
    for one, two in ((FIRST, SECOND), (SECOND, FIRST)):
        assert lead(ROWS.assign(**{"retrained:again": 0.5}), one, two).winner == "neither"  # no more than chance
        assert lead(ROWS[:2], one, two).winner == "neither"  # no interval
    spread = ROWS.assign(steady=[0.9, 0.1, 0.9, 0.4])
    assert lead(spread, ["steady"], ["sound"]).values.mean() > 0.3
    assert lead(spread, ["steady"], ["sound"]).winner == "neither"  # the interval has zero in it


def test_distances_have_a_sign_on_holdout_only():
    values = {"retrained": 2.0, "below": 1.5, "above": 2.25}
    metrics = ("holdout_loss", "retain_loss", "membership_auc_calibrated", "relearned_net_nats")
    rows = [
        {"corpus": "c", "method": method, "metric": metric, "seed": seed, "value": value + seed}
        for seed in (0, 1)
        for metric in metrics
        for method, value in values.items()
    ]
    found = distances(pd.DataFrame(rows))
    assert list(found) == ["holdout loss", "retain loss", "AUC", "relearned"]
    for measure, table in found.items():
        below = -0.5 if measure == "holdout loss" else 0.5
        assert table[["below", "above"]].to_numpy().tolist() == [[below, 0.25]] * 2
