"""Cures for K-FAC's step against closed forms, and what is measured beside them on a tiny case."""

import dataclasses

import pandas as pd
import pytest
import torch
from helpers import random_sequences, tiny_model
from tiny_tales import TINY, tiny_cases

from unlearnlib import weights
from unlearnlib.curvature.kronecker import kfac
from unlearnlib.curvature.per_sequence_gradients import sequence_gradients
from unlearnlib.experiment import last_gap
from unlearnlib.losses import batched, mean_loss, sequence_losses, token_losses
from unlearnlib.measures.evaluation import membership_auc
from unlearnlib.models.training import Training

FORGET, RETAIN = random_sequences(3), random_sequences(8, seed=1)
DAMPING = 0.1


def test_every_text_rises_by_its_own_and_no_shorter_step_does_that():
    model = tiny_model()
    like, G = weights.snapshot(model), sequence_gradients(model, FORGET)
    curvature, rises = kfac(model, RETAIN), torch.tensor([0.1, 0.5, -0.2], dtype=torch.float64)
    step = last_gap.targets_direction(curvature, G, rises, like, DAMPING)
    torch.testing.assert_close(G @ weights.flatten(step), rises)

    def length(v):
        return weights.dot(v, weights.add(curvature.matvec(v), v, DAMPING)).item()

    for seed in range(3):  # add what changes no loss to first order
        row = weights.flatten(weights.random_vector(like, torch.Generator().manual_seed(seed)))
        row -= G.T @ torch.linalg.solve(G @ G.T, G @ row)
        assert length(weights.add(step, weights.unflatten(row, like), 1e-3)) > length(step)


def test_equal_rises_of_one_text_are_the_step_of_fisher_removal():
    model = tiny_model()
    like, G, curvature = weights.snapshot(model), sequence_gradients(model, FORGET[:1]), kfac(model, RETAIN)
    step = last_gap.targets_direction(curvature, G, torch.tensor([1.0]), like, DAMPING)
    assert weights.cosine(step, curvature.solve(weights.unflatten(G[0], like), DAMPING)) == pytest.approx(1)


def test_weights_of_tokens_are_those_of_the_model_as_it_is():
    model = tiny_model()
    plain = weights.mean_gradient(model, FORGET, sequence_losses)
    same = last_gap.weighted_gradient(model, FORGET, 0)
    torch.testing.assert_close(weights.flatten(same), weights.flatten(plain))
    power = 3
    unlikely = (1 - (-batched(token_losses, model, FORGET)).exp()) ** power
    live = list(weights.parameters(model).values())
    total = (unlikely * token_losses(model, FORGET)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, live)])
    found = weights.flatten(last_gap.weighted_gradient(model, FORGET, power))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, weights.flatten(plain), rtol=1e-3)


def test_a_profile_of_tokens_has_the_means_of_equal_parts_in_order():
    by = torch.tensor([[5.0, 1.0, 3.0], [2.0, 6.0, 4.0]])
    table = last_gap.token_profile({"itself": by, "ten": 10 * by}, by, parts=3)
    assert table["itself"].tolist() == [1.5, 3.5, 5.5]
    assert table["ten"].tolist() == [15, 35, 55]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    profile = dataclasses.replace(TINY, holdout=12, references=1, training=Training(epochs=40, learning_rate=1e-2))
    profile = dataclasses.replace(profile, relearning_steps=2)
    with tiny_cases(profile, tmp_path_factory.mktemp("cache")) as [case]:
        chosen = {"kfac": {"damping": 1e-3}, "newton_descent": {"learning_rate": 3e-3}}
        report, models = last_gap.compare(case, chosen, lambda model: kfac(model, case.estimation), 100)
        yield case, report, models


def test_methods_are_matched_by_loss_and_by_distance(compared):
    case, report, models = compared
    table = pd.DataFrame(report.rows).pivot_table(index="method", columns="metric", values="value")
    forget, holdout = table["forget_loss"], table["holdout_loss"]
    assert set(models) == {"retrained", "retrained:again", "original", "kfac", "newton_descent"}
    for method in ("kfac", "newton_descent"):
        assert table.loc[method, "reached"] == 1
        assert forget[method] == pytest.approx(forget["retrained"], abs=0.011)
        assert mean_loss(models[method], case.splits.forget) == pytest.approx(forget[method], abs=1e-5)
        off = holdout[method] - holdout["retrained"]
        assert forget[f"{method}:distance"] == pytest.approx(forget["retrained"] + off, abs=0.011)
        assert table.loc[method].notna()["relearned_net_nats"]
    # A gradient of each text and factors of each kept one at the least; and a step of each is counted.
    assert table.loc["kfac", "plain_passes"] > len(case.splits.forget) + len(case.estimation)


def test_the_attack_by_calibrated_losses_is_the_losses_less_the_references(compared):
    case, report, models = compared
    [reference] = case.references()
    scores = [
        batched(sequence_losses, reference, rows) - batched(sequence_losses, models["kfac"], rows)
        for rows in (case.splits.forget, case.splits.holdout)
    ]
    found = {(row["method"], row["metric"]): row["value"] for row in report.rows}
    assert found["kfac", "membership_auc_calibrated_loss"] == pytest.approx(membership_auc(*scores))
    assert report.reference_tokens.shape == (6, case.profile.length - 1)


def test_every_cure_comes_to_the_target_and_the_oracle_knows_the_texts(compared):
    case, report, _ = compared
    model = case.original()
    factors, delta = (
        kfac(model, case.estimation),
        weights.mean_gradient(model, case.splits.forget, sequence_losses),
    )
    trial = last_gap.GapReport(case, report.retrained)
    paths = last_gap.cures(trial, factors, delta, 1e-3, lambda model: kfac(model, case.estimation), 8)
    for name, path in paths.items():
        assert trial.match(name, path, brief=True).reached, name
    assert {"kfac", "kfac:targets", "kfac:tokens1", "kfac:steps", "ekfac", "newton_cg:blocks"} <= set(paths)
    told = {(row["method"], row["metric"]): row["value"] for row in trial.rows}
    assert told["kfac:targets", "loss_correlation"] > told["kfac", "loss_correlation"]
