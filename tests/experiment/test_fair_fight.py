import dataclasses

import pytest
import torch
from tiny_tales import TINY, tiny_cases

from unlearnlib.experiment import chapters, comparison, fair_fight, profiles
from unlearnlib.experiment.contenders import contenders_on
from unlearnlib.experiment.curvatures import curvature_builders
from unlearnlib.experiment.report import Report
from unlearnlib.losses import mean_loss, sequence_losses
from unlearnlib.measures.extraction import continuations
from unlearnlib.verdicts import results

PROFILE = dataclasses.replace(TINY, relearning_steps=2, references=0)


@pytest.fixture(scope="module")
def fought(tmp_path_factory):
    with tiny_cases(PROFILE, tmp_path_factory.mktemp("cache")) as [case]:
        report = Report(case, case.retrained(), shares=(1.0,))
        builds = curvature_builders(case.estimation)
        chosen = comparison.choose_settings(report, ("gradient_ascent", "kfac"), builds, most=3)
        yield report, chosen, fair_fight.serve(report, chosen, builds, max_steps=20)


def value(report, method, metric):
    [found] = [r["value"] for r in report.rows if r["method"] == method and r["metric"] == metric]
    return found


def test_a_request_is_served_from_nothing_and_all_of_it_is_counted(fought):
    report, chosen, losses = fought
    case = report.case
    for method in chosen:
        assert report.matches[method].reached
        assert losses[method].shape == (len(case.validation),)
        assert value(report, method, "validation_loss") == pytest.approx(losses[method].mean().item())
    # Ascent's gradient is a pass over the forget set; K-FAC reads the rest of the retain set beside it.
    evaluated = {method: report.matches[method].evaluations * len(case.splits.forget) / 3 for method in chosen}
    rest = {method: value(report, method, "plain_passes") - evaluated[method] for method in chosen}
    assert rest["gradient_ascent"] == pytest.approx(len(case.splits.forget))
    assert rest["kfac"] >= len(case.splits.forget) + len(case.estimation)


def test_the_losses_are_those_of_the_model_that_was_made(fought):
    report, _, losses = fought
    builds = curvature_builders(report.case.estimation)
    path = contenders_on(report.case, builds)["gradient_ascent"].path()
    path.to(report.target)
    with torch.no_grad():
        torch.testing.assert_close(losses["gradient_ascent"], sequence_losses(path.model, report.case.validation))


def test_along_the_way_losses_and_texts_are_those_of_the_model_there(fought):
    report, chosen, _ = fought
    case, builds = report.case, curvature_builders(report.case.estimation)
    prompts = case.splits.forget[:2, :4]
    table = fair_fight.along(report, chosen, builds, (0, 0.5, 1), prompts, 3, max_steps=20)
    retrained, table = table.iloc[0], table.iloc[1:]
    assert retrained["method"] == "retrained"
    assert retrained["forget"] == pytest.approx(report.target)
    assert list(table["method"]) == ["gradient_ascent"] * 3 + ["kfac"] * 3
    assert table["reached"].all()
    goals = [report.original_loss, (report.original_loss + report.target) / 2, report.target]
    assert table["forget"].to_list() == pytest.approx(goals * 2, abs=0.02)
    original = case.original()
    start = table[table["share"] == 0]
    assert start["holdout"].to_list() == pytest.approx([mean_loss(original, case.splits.holdout)] * 2)
    said = case.tokenizer.batch_decode(continuations(original, prompts, 3))
    assert all(written == said for written in start["written"])
    path = contenders_on(case, builds)["kfac"].path(**chosen["kfac"])
    path.to(report.target)
    assert table.iloc[-1]["retain"] == pytest.approx(mean_loss(path.model, case.splits.retain))
    assert table.iloc[-1]["written"] == case.tokenizer.batch_decode(continuations(path.model, prompts, 3))


def test_every_trial_of_a_search_is_in_the_table(fought, tmp_path):
    report, chosen, _ = fought
    table = fair_fight.searches_table(report)
    assert table.groupby("method").size().to_dict() == {m: report.choices[m].tried for m in chosen}
    best = table[table["reached"] == 1].groupby("method")["value"].min()
    found = report.choices["kfac"].table
    least = found[found["reached"]]["validation_loss"].min()
    assert best["kfac"] == pytest.approx(least - report.retrained_validation)
    assert set(table.query("method == 'kfac'")["setting"]) == {f"damping={d:.3g}" for d in found["damping"]}
    results.write_results(table, tmp_path, "searches")  # no row twice


def test_undominated_methods():
    points = {"good": (1, 5), "cheap": (3, 1), "worse": (2, 6), "same": (1, 5)}
    assert fair_fight.undominated(points) == ["good", "cheap", "same"]


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_the_chapter_compares_methods_there_are_with_trials_enough_for_each(profile, fought):
    report, *_ = fought
    _, sizes = chapters.chapter("fair_fight", profile)
    known = contenders_on(report.case, curvature_builders(report.case.estimation))
    for method in sizes.methods:
        grids = known[method].knobs.values()
        assert 1 + sum(len(grid) - 1 for grid in grids) <= sizes.most
