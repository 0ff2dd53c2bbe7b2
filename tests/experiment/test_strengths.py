import dataclasses

import pandas as pd
import pytest
import torch
from scipy.stats import linregress
from tiny_tales import TINY, tiny_cases

from unlearnlib import weights
from unlearnlib.curvature import kronecker
from unlearnlib.experiment.strengths import Strengths
from unlearnlib.losses import batched, mean_loss, sequence_losses
from unlearnlib.models import loading
from unlearnlib.models.training import Training, load_trained

PROXY, PROXY_TRAINING = loading.small_opt(300, hidden_size=8, layers=1, heads=2), Training(3, learning_rate=1e-2)
DAMPINGS = (1e-5, 1e-3, 1e-1, 10.0)
PROFILE = dataclasses.replace(TINY, holdout=12, training=Training(epochs=30, learning_rate=1e-2))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with tiny_cases(PROFILE, tmp_path_factory.mktemp("cache")) as [case]:
        yield Strengths(case, PROXY, PROXY_TRAINING, DAMPINGS)


@pytest.fixture(scope="module")
def table(study):
    rows = pd.DataFrame(study.rows())
    return rows.pivot(index="method", columns="metric", values="value")


def losses(model, case):
    rows = {name: getattr(case.splits, name) for name in ("forget", "retain", "holdout")}
    return {name: batched(sequence_losses, model, values).double() for name, values in rows.items()}


def test_every_way_estimates_from_the_original_what_it_says(study, table):
    case, own = study.case, losses(study.case.original(), study.case)
    mean = {name: values.mean().item() for name, values in own.items()}
    assert table.loc["holdout", "estimate"] == pytest.approx(mean["holdout"])
    assert table.loc["gap", "estimate"] == pytest.approx(mean["forget"] + mean["holdout"] - mean["retain"])

    run = dataclasses.replace(case.runs()["retrained"], source=PROXY, training=PROXY_TRAINING)
    without = losses(load_trained(run), case)
    line = linregress(without["holdout"].numpy(), own["holdout"].numpy())
    expected = line.intercept + line.slope * without["forget"].mean().item()
    assert table.loc["proxy", "estimate"] == pytest.approx(expected)

    knowing = losses(load_trained(dataclasses.replace(run, sequences=case.splits.train)), case)
    start, end = (knowing[name].mean().item() for name in ("forget", "holdout"))
    share = (without["forget"].mean().item() - start) / (end - start)
    expected = mean["forget"] + share * (mean["holdout"] - mean["forget"])
    assert table.loc["proxy:twice", "estimate"] == pytest.approx(expected)


def test_errors_are_against_the_retrained_model_and_steps_end_at_the_estimates(study, table):
    truth = losses(study.case.retrained(), study.case)["forget"].mean().item()
    assert (table["error"] - (table["estimate"] - truth)).abs().max() < 1e-6
    assert table.loc["retrained", "error"] == 0
    assert set(table.index) == {"retrained", *study.targets()}
    assert table["reached"].all()
    further = table.sort_values("estimate")
    assert further["holdout_excess"].iloc[-1] > further["holdout_excess"].iloc[0]


def test_the_rise_of_kept_texts_is_on_average_what_tells_them_from_unseen_ones(study):
    """With the λ that is chosen, up to interpolation between those of the grid."""
    case, own = study.case, losses(study.case.original(), study.case)
    model = case.original()
    curvature = kronecker.kfac(model, case.estimation, seed=case.seed)
    g = weights.mean_gradient(model, case.splits.retain, sequence_losses)

    def rise(rows, damping):
        delta = weights.mean_gradient(model, rows, sequence_losses)
        return 6 / 36 * weights.dot(delta, curvature.solve(weights.difference(delta, g), damping)).item()

    assert study.rise(study.gradients[0], 0.1) == pytest.approx(rise(case.splits.forget, 0.1), rel=1e-4)
    gap = (own["holdout"].mean() - own["retain"].mean()).item()
    blocks = case.estimation.split(6)[:4]
    grid = torch.logspace(-5, 1, 61).tolist()
    closest = min(grid, key=lambda x: abs(sum(rise(block, x) for block in blocks) / 4 - gap))
    expected = own["forget"].mean().item() + rise(case.splits.forget, closest)
    fine = dataclasses.replace(study, dampings=tuple(grid))
    assert fine.left_out().loss == pytest.approx(expected, abs=0.1 * gap)


@pytest.mark.parametrize("dampings", [(1e-5, 1e-4), (1.0, 10.0)])
def test_a_grid_that_does_not_reach_the_right_damping_is_widened(study, dampings):
    wide = tuple(10.0**i for i in range(-5, 2))
    expected = dataclasses.replace(study, dampings=wide).left_out()
    found = dataclasses.replace(study, dampings=dampings).left_out()
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.error == pytest.approx(expected.error, rel=1e-4)


def test_the_natural_step_has_the_length_of_the_formula(study):
    case, model = study.case, study.case.original()
    found = pd.DataFrame(study.natural()).pivot(index="damping", columns="method", values="value")
    curvature = kronecker.kfac(model, case.estimation, seed=case.seed)
    start, truth = weights.snapshot(model), study.truth
    delta, g = (
        weights.mean_gradient(model, rows, sequence_losses) for rows in (case.splits.forget, case.splits.retain)
    )
    for name, v, share in (("step", delta, 6 / 30), ("step:difference", weights.difference(delta, g), 6 / 36)):
        weights.set_weights(model, start, curvature.solve(v, 0.1), share)
        after = mean_loss(model, case.splits.forget)
        assert found.loc[0.1, name] == pytest.approx(after - truth, abs=1e-4)
    assert (found["predicted"].diff().dropna() < 0).all()  # more damping, shorter steps
