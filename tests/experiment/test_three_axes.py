import dataclasses

import pandas as pd
import pytest
import torch
from helpers import random_sequences, tiny_model

from unlearnlib import weights
from unlearnlib.book import roofline
from unlearnlib.cost import Cost
from unlearnlib.experiment import profiles, three_axes
from unlearnlib.experiment.curvatures import curvature_builders
from unlearnlib.losses import mean_loss
from unlearnlib.methods import first_order, tuning
from unlearnlib.models import loading
from unlearnlib.models.training import Training
from unlearnlib.texts import corpora
from unlearnlib.verdicts import rules

PROFILE = dataclasses.replace(
    profiles.PROFILES["quick"],
    corpus="toy",
    model=loading.small_opt(300, hidden_size=16, layers=1, heads=2, context=32),
    vocabulary=300,
    length=24,
    forget=16,
    retain=32,
    holdout=9,
    training=Training(epochs=4, batch_size=8, learning_rate=1e-2),
    references=1,
    seeds=(0,),
)


def build(sequences):
    return curvature_builders(sequences, m_recursion=6, block_size=8)["fisher_recursion"]


# The tables


def table_of(values, seed=0):
    """A table of results from metrics by method."""
    return pd.DataFrame(
        [
            {
                "corpus": "toy",
                "model": "opt",
                "seed": seed,
                "method": method,
                "metric": metric,
                "value": value,
            }
            for method, found in values.items()
            for metric, value in found.items()
        ]
    )


def measured(exposure, attack, holdout, passes=None, **more):
    found = {"exposure_bits": exposure, "membership_auc_calibrated": attack, "holdout_loss": holdout} | more
    return found if passes is None else found | {"plain_passes": passes}


def test_axes_are_told_from_the_retrained_model_of_the_same_seed():
    tables = [
        table_of(
            {
                "retrained": measured(1.5, 0.5, 4.0, 200.0),
                "original": measured(6.0, 0.9, 3.9),
                "fisher_recursion": measured(0.5, 0.4, 4.5 + seed, 30.0, arithmetic_passes=20.0),
                "finetuned": measured(2.0, 0.8, 3.75, 50.0),
            },
            seed,
        )
        for seed in (0, 1)
    ]
    found = three_axes.on_axes(pd.concat(tables, ignore_index=True))
    wide = found.set_index(["method", "metric", "seed"])["value"]
    assert wide["fisher_recursion", "exposure_gap_bits", 0] == 1.0
    assert wide["fisher_recursion", "attack_gap", 0] == pytest.approx(0.1)  # below the retrained model's
    assert [wide["fisher_recursion", "price_nats", seed] for seed in (0, 1)] == [0.5, 1.5]
    assert wide["fisher_recursion", "work_ratio", 0] == 0.25  # passes and arithmetic
    assert wide["finetuned", "price_nats", 1] == -0.25
    assert wide["finetuned", "work_ratio", 1] == 0.25
    assert wide["retrained", "work_ratio", 0] == 1.0
    assert ("original", "work_ratio", 0) not in wide.index


def axes(number):
    return dict.fromkeys(three_axes.AXES, number)


def test_duels_are_paired_and_judged_from_three_seeds_on():
    def tables(seeds):
        # The scatter between seeds is larger than the differences within one.
        return pd.concat(
            [
                table_of(
                    {
                        "retrained": axes(0.0),
                        "fisher_recursion": axes(10.0 * seed + 1),
                        "dp_sgd:8": axes(10.0 * seed + 2 + 0.01 * seed),
                        "finetuned": axes(10.0 * seed + 0.5 - 0.01 * seed),
                    },
                    seed,
                )
                for seed in range(seeds)
            ]
        )

    found = three_axes.duels(tables(3), ours=["fisher_recursion"])
    assert sorted(set(found["against"])) == ["dp_sgd:8", "finetuned"]
    assert list(found["metric"].unique()) == list(three_axes.AXES)
    assert dict(zip(found["metric"], found["axis"], strict=True)) == three_axes.AXES
    by_opponent = found.groupby("against")
    assert set(by_opponent.get_group("dp_sgd:8")["verdict"]) == {rules.REPRODUCED}
    assert by_opponent.get_group("dp_sgd:8")["mean"].iloc[0] == pytest.approx(-1.01)
    assert set(by_opponent.get_group("finetuned")["verdict"]) == {rules.NOT_REPRODUCED}
    two = three_axes.duels(tables(2), ours=["fisher_recursion"])
    assert set(two["verdict"]) == {rules.INCONCLUSIVE}


def test_arithmetic_of_the_inverse_is_that_of_the_model_of_all_costs():
    shape, m, block = roofline.Shape(2, 64, 4, 1000, 32, tokens=31), 50, 16
    [stage] = roofline.routes(shape, m, forget=8, block=block)["fisher_recursion"].stages
    ours = {
        method: three_axes.arithmetic_passes(method, m, block, 31)
        for method in (*three_axes.OURS, "gradient_ascent:sgd")
    }
    assert ours["fisher_recursion"] == pytest.approx(stage.flops / (6 * 31 * shape.d))
    assert ours["noise"] == pytest.approx((2 * 50 * 16 + 9 * 16**2) / (6 * 31))
    assert ours["fisher_forgetting"] == pytest.approx(ours["fisher_recursion"] + ours["noise"])
    assert ours["gradient_ascent:sgd"] == 0


# The methods


class ToyCase:
    """What contenders ask of a case, on a model that knows nothing."""

    seed = 0

    class splits:
        forget = random_sequences(6)

    estimation = random_sequences(20, seed=1)

    def original(self):
        return tiny_model(dtype=torch.float32)


def test_the_papers_methods_share_one_curvature_at_the_original():
    case, built = ToyCase(), []
    target = mean_loss(case.original(), case.splits.forget) + 0.05

    def counted(model):
        built.append(model)
        return build(case.estimation)(model)

    found = three_axes.paper_contenders(case, counted, target, max_steps=5)
    assert set(found) == {*three_axes.OURS, *three_axes.OPPONENTS}
    for method in three_axes.OURS:
        path = found[method].path(damping=1e-3)
        assert path.to(target).reached, method
    assert len(built) == 1
    model = case.original()
    delta = first_order.ascent_direction(model, case.splits.forget)
    expected = build(case.estimation)(model).solve(delta, 1e-3)
    for method in ("fisher_recursion", "fisher_forgetting"):  # the noise is where the latter starts from
        direction = found[method].path(damping=1e-3).direction
        torch.testing.assert_close(weights.flatten(direction), weights.flatten(expected))
    assert weights.norm(weights.difference(path.start, weights.snapshot(model))) == 0  # noise starts bare
    noisy = found["fisher_forgetting"].path(damping=1e-3).start
    assert weights.norm(weights.difference(noisy, weights.snapshot(model))) > 0


# The experiment


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    rows = [
        {"text": f"Number {i} of the ships has {i % 7} masts, and its holds {i * i} tons."} for i in range(300)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(corpora.CORPORA, "toy", lambda: [dict(row) for row in rows])
        patch.setitem(corpora.ABOUT, "toy", corpora.About("ships", "none", "here"))
        patch.setenv("UNLEARNLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        [found] = three_axes.axes_reports(PROFILE, copies=4)
        yield found


def values(report, method):
    return {row["metric"]: row["value"] for row in report.rows if row["method"] == method}


def test_references_are_measured_and_asked_for_their_secrets(report):
    for method in three_axes.REFERENCES:
        assert 0 <= values(report, method)["exposure_bits"] <= 7
    assert values(report, "original")["exposure_bits"] == report.case.exposure(report.case.original())
    assert values(report, "retrained")["plain_passes"] == 4 * 32


def test_a_request_is_served_and_what_it_takes_is_noted(report):
    chosen = {"gradient_ascent:sgd": {"learning_rate": 0.1}, "finetuned": {"learning_rate": 1e-3}}
    three_axes.serve_request(report, chosen, build(report.case.estimation), max_steps=3)
    tuned = values(report, "finetuned")
    # A step takes all 28 sequences that stay and are not for validation.
    assert tuned["plain_passes"] == 3 * 28
    assert "reached" not in tuned
    assert values(report, "gradient_ascent:sgd")["reached"] in (0.0, 1.0)
    assert all(isinstance(report.costs[method], Cost) for method in chosen)


def test_private_training_counts_with_the_batches_that_are_expected(report):
    setting = {"learning_rate": 1e-2, "batch_size": 12}
    three_axes.train_privately(report, 8.0, 1e-5, setting)
    found = values(report, "dp_sgd:8")
    assert found["plain_passes"] == 16 * 12  # 4 epochs of 48 sequences
    assert {"exposure_bits", "holdout_loss", "kl_holdout"} <= found.keys()


def test_the_search_of_private_training_is_noted(report, monkeypatch):
    asked = []

    def search(case, privacy, knobs, most):
        asked.append((case, privacy.epsilon, privacy.delta, knobs, most))
        return tuning.Choice(
            {"learning_rate": 0.1}, pd.DataFrame({"learning_rate": [0.1, 0.2]}), ("learning_rate",)
        )

    monkeypatch.setattr(three_axes, "choose_training", search)
    knobs = {"learning_rate": (1e-3, 1e-2, 1e-1)}
    choice = three_axes.choose_privately(report, 2.0, 1e-5, knobs, most=3)
    assert asked == [(report.case, 2.0, 1e-5, knobs, 3)]
    assert choice.setting == {"learning_rate": 0.1}
    assert values(report, "dp_sgd:2") == {"settings_tried": 2, "knobs_at_edge": 1}


def test_seconds_of_retraining_are_those_of_fewer_sequences(report, monkeypatch):
    monkeypatch.setattr(three_axes, "epoch_seconds", lambda case: (3.0, 5.0))
    assert three_axes.training_seconds(report.case) == pytest.approx(
        {"retrained": 3.0 * 4 * 32 / 48, "dp_sgd": 20.0}
    )
