import dataclasses

import pytest
import torch
from tiny_tales import TINY, tiny_cases

from unlearnlib import weights
from unlearnlib.curvature.newton import GaussNewton
from unlearnlib.experiment import chapters, moved_weights, profiles
from unlearnlib.experiment.contenders import contenders_on
from unlearnlib.experiment.curvatures import curvature_builders
from unlearnlib.experiment.report import Report, results_table
from unlearnlib.measures import rounding
from unlearnlib.methods import ascent_direction
from unlearnlib.models.training import load_start
from unlearnlib.verdicts import results


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A report with everything noted, and the displacements."""
    profile = dataclasses.replace(TINY, references=0)
    with tiny_cases(profile, tmp_path_factory.mktemp("cache")) as [case]:
        report = Report(case, case.retrained(), shares=(1.0,))
        builds = curvature_builders(case.estimation)
        chosen = {"gradient_ascent": {}, "kfac": {"damping": 1e-3}}
        found = moved_weights.displacements(report, chosen, builds, max_steps=20)
        moved_weights.measure_movements(report, found, top=2)
        moved_weights.measure_rounding(report, found)
        curvature = GaussNewton(case.original(), case.estimation[:4])
        moved_weights.measure_norms(report, found, curvature)
        yield report, found


def value(report, method, metric):
    [found] = [r["value"] for r in report.rows if r["method"] == method and r["metric"] == metric]
    return found


def test_another_order_is_of_the_same_sequences_from_the_same_start(moved):
    case = moved[0].case
    for name, run in moved_weights.other_orders(case).items():
        known = case.runs()[name.partition(":")[0]]
        assert not torch.equal(run.sequences, known.sequences)
        assert torch.equal(run.sequences.unique(dim=0), known.sequences.unique(dim=0))
        starts = [weights.flatten(weights.snapshot(load_start(r.source, r, seed=r.seed))) for r in (run, known)]
        assert torch.equal(*starts)
        assert run.folder != known.folder


def test_displacements_lead_from_the_original_to_the_matched_models(moved):
    report, found = moved
    assert list(found) == ["retrained", "original:order", "retrained:order", "gradient_ascent", "kfac"]
    case = report.case
    start = weights.snapshot(case.original())
    assert all(report.matches[method].reached for method in ("gradient_ascent", "kfac"))
    for name, expected in (("retrained", weights.snapshot(case.retrained())), ("kfac", None)):
        if expected is None:
            path = contenders_on(case, curvature_builders(case.estimation))[name].path(damping=1e-3)
            path.to(report.target)
            expected = weights.snapshot(path.model)
        there = weights.flatten(weights.add(start, found[name]))
        torch.testing.assert_close(there, weights.flatten(expected))


def test_movements_are_noted(moved):
    report, found = moved
    start = weights.snapshot(report.case.original())
    length = weights.norm(found["kfac"])
    assert value(report, "kfac", "movement") == pytest.approx(length)
    assert value(report, "kfac", "relative_movement") == pytest.approx(length / weights.norm(start))
    apart = weights.norm(weights.difference(found["kfac"], found["retrained"]))
    assert value(report, "kfac", "distance_to_retrained") == pytest.approx(apart)
    c = value(report, "kfac", "cosine_retrained")
    far = value(report, "retrained", "movement")
    assert apart**2 == pytest.approx(length**2 + far**2 - 2 * c * length * far)  # the law of cosines
    shapes = [matrix.shape for matrix in rounding.matrices(report.case.original()).values()]
    for place, side in enumerate(("left", "right")):
        chance = sum(2 / shape[place] for shape in shapes) / len(shapes)
        assert value(report, "chance", f"overlap_{side}") == pytest.approx(chance)
        assert 0 < value(report, "kfac", f"overlap_{side}") < 1


def test_ascent_is_the_shortest_and_the_norms_are_those_of_the_matrix(moved):
    report, found = moved
    case = report.case
    curvature = GaussNewton(case.original(), case.estimation[:4])
    delta = found["kfac"]
    expected = weights.dot(delta, curvature.matvec(delta)).sqrt().item()
    assert value(report, "kfac", "curvature_norm") == pytest.approx(expected)
    per_nat = {
        name: value(report, name, "movement") / value(report, name, "linear_forgetting")
        for name in ("gradient_ascent", "kfac")
    }
    gradient = ascent_direction(case.original(), case.splits.forget)
    assert per_nat["gradient_ascent"] == pytest.approx(1 / weights.norm(gradient), rel=1e-4)
    assert per_nat["gradient_ascent"] < per_nat["kfac"]


def test_rounding_is_noted_with_what_is_left(moved):
    report, found = moved
    case = report.case
    model = case.original()
    weights.set_weights(model, weights.snapshot(model), found["kfac"])
    left = rounding.survival(case.original(), model, 4)
    for name in ("changed", "expected", "kept"):
        assert value(report, "kfac", f"{name}_4bit") == pytest.approx(getattr(left, name))
    assert value(report, "original", "forget_loss_8bit") == pytest.approx(
        value(report, "original", "forget_loss"), abs=0.05
    )


def test_the_tables_can_be_written(moved, tmp_path):
    report, found = moved
    places = moved_weights.places_table(report, found)
    assert set(places["layer"]) == {"", "0"}
    results.write_results(places, tmp_path, "moved_weights_places")
    results.write_results(results_table([report]), tmp_path, "moved_weights")
    assert len(results.read_results(tmp_path, "moved_weights_places")) == len(places)


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_the_chapter_compares_methods_that_there_are(moved, profile):
    settings, sizes = chapters.chapter("moved_weights", profile)
    case = moved[0].case
    known = contenders_on(case, curvature_builders(case.estimation))
    assert set(sizes.methods) <= set(known)
    assert sizes.products <= settings.retain - settings.retain // 8
    assert settings.references == 0
