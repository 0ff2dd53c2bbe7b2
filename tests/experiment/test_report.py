import dataclasses
import subprocess
import sys

import pandas as pd
import pytest
import torch
from tiny_tales import TINY, tiny_cases

from unlearnlib import weights
from unlearnlib.experiment import case as one_case
from unlearnlib.experiment import chapters, profiles
from unlearnlib.experiment.report import SHARES, Report, frontier_table, results_table, sweeps_table
from unlearnlib.experiment.sizes import CHAPTERS
from unlearnlib.losses import mean_loss
from unlearnlib.measures import extraction, rounding
from unlearnlib.methods import first_order, matching, walks
from unlearnlib.verdicts import results

TINY_PROFILE = dataclasses.replace(TINY, seeds=(0, 1))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    with tiny_cases(TINY_PROFILE, tmp_path_factory.mktemp("cache")) as made:
        yield made


def test_the_three_models_are_trained_on_what_their_names_say(cases):
    case = cases[0]
    runs = case.runs()
    assert torch.equal(runs["original"].sequences, torch.cat([case.splits.forget, case.splits.retain]))
    assert torch.equal(runs["retrained"].sequences, case.splits.retain)
    assert torch.equal(runs["retrained_again"].sequences, case.splits.retain)
    assert runs["original"].seed == runs["retrained"].seed != runs["retrained_again"].seed
    assert len({run.folder for case in cases for run in case.runs().values()}) == 6


def test_every_copy_of_a_model_is_fresh(cases):
    first = cases[0].original()
    with torch.no_grad():
        first.lm_head.weight.zero_()
    assert cases[0].original().lm_head.weight.abs().sum() > 0


def test_a_report_says_what_the_measures_say(cases):
    case = cases[0]
    report = Report(case, case.retrained())
    original = case.original()
    values = report.measure("original", original, strength=3.0)
    assert values["forget_loss"] == pytest.approx(mean_loss(original, case.splits.forget), rel=1e-5)
    assert values["holdout_loss"] == pytest.approx(mean_loss(original, case.splits.holdout), rel=1e-5)
    assert values["strength"] == 3.0
    assert report.measure("retrained", case.retrained())["kl_holdout"] == pytest.approx(0, abs=1e-9)
    report.probe("retrained", case.retrained())
    table = pd.DataFrame(report.rows)
    for metric in ("relearned_nats", "relearned_net_nats"):
        assert table.loc[table["metric"] == metric, "value"].item() == 0  # against itself
    assert set(table.columns) == set(results.COLUMNS) - {"exhibit"}
    assert (table["model"] == "opt-16x1").all()


def test_rounding_and_extraction_are_measured_where_they_are_asked_for(cases):
    case = cases[0]
    original = case.original()
    plain = Report(case, case.retrained()).measure("original", original)
    values = Report(case, case.retrained(), rounding=True, extraction=8).measure("original", original)
    more = {
        f"{metric}_{bits}bit" for metric in ("forget_loss", "holdout_loss", "membership_auc") for bits in (4, 8)
    }
    assert values.keys() - plain.keys() == more | {"extraction_el10"}
    coarse = rounding.rounded(original, 4)
    assert values["holdout_loss_4bit"] == pytest.approx(mean_loss(coarse, case.splits.holdout), rel=1e-5)
    gaps = [abs(values[f"forget_loss_{bits}bit"] - values["forget_loss"]) for bits in (4, 8)]
    assert gaps[0] > gaps[1]
    assert values["extraction_el10"] == extraction.extraction_likelihood(original, case.splits.forget)


def test_curvature_and_choices_see_different_parts_of_the_retain_set(cases):
    case = cases[0]
    assert torch.equal(torch.cat([case.estimation, case.validation]), case.splits.retain)
    assert len(case.validation) == len(case.splits.retain) // 8 > 0


@pytest.mark.parametrize("number", [2, 3, 7, 8, 17])
def test_a_small_retain_set_has_both_parts(cases, number):
    splits = dataclasses.replace(cases[0].splits, retain=cases[0].splits.retain[:number])
    case = dataclasses.replace(cases[0], splits=splits)
    assert (len(case.validation), len(case.estimation)) == {
        2: (1, 1),
        3: (1, 2),
        7: (1, 6),
        8: (1, 7),
        17: (2, 15),
    }[number]
    assert torch.equal(torch.cat([case.estimation, case.validation]), splits.retain)


def test_a_retain_set_that_cannot_be_parted_is_refused(cases):
    splits = dataclasses.replace(cases[0].splits, retain=cases[0].splits.retain[:1])
    with pytest.raises(ValueError, match=r"1 retain sequence is too few: .* at least 2"):
        dataclasses.replace(cases[0], splits=splits)


def test_a_report_follows_a_direction_through_the_target(cases):
    case = cases[0]
    report = Report(case, case.retrained())
    model = case.original()
    delta = first_order.ascent_direction(model, case.splits.forget)
    report.reference("original", case.original())
    report.reference("retrained", report.retrained)
    match = report.follow("gradient_ascent", matching.Line(model, delta, case.splits.forget))
    assert match.reached
    assert match.loss == pytest.approx(report.target, abs=matching.TOLERANCE)
    assert report.matches["gradient_ascent"] == match
    assert len(report.curves["gradient_ascent"]) == 31
    frontier = frontier_table([report])
    points = frontier.pivot_table(index=["method", "share"], columns="metric", values="value")
    assert list(points.index) == [("gradient_ascent", share) for share in SHARES] + [("original", 0.0)]
    gap = report.target - report.original_loss
    for (_, share), excess in points["forget_excess"].items():
        assert excess == pytest.approx((share - 1) * gap, abs=matching.TOLERANCE)
    table = results_table([report])
    at_match = table.query("method == 'gradient_ascent' and metric == 'forget_loss'")["value"].item()
    assert at_match == pytest.approx(match.loss, rel=1e-5)


def adam_walk(case, max_steps=1000):
    model, splits = case.original(), case.splits
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    steps = walks.descend(model, first_order.ascent_loss, splits.forget, case.estimation, optimizer, seed=0)
    return matching.Walk(model, steps, splits.forget, max_steps)


def test_a_report_counts_steps_from_the_first_one_on(cases):
    case = cases[0]
    report = Report(case, case.retrained(), shares=(0.5, 0.75, 1.0, 1.25))
    match = report.follow("gradient_ascent", adam_walk(case))
    straight = adam_walk(case).to(report.target)
    assert match.reached
    assert match.strength == pytest.approx(straight.strength, abs=0.5)  # both within tolerance of the target
    assert straight.strength > 3
    [noted] = (row["value"] for row in report.rows if row["metric"] == "strength")
    assert noted == match.strength
    most = Report(case, case.retrained()).follow("gradient_ascent", adam_walk(case, max_steps=3))
    assert (most.strength, most.reached) == (3, False)


def test_a_report_says_what_a_method_cost(cases):
    """Steps are differentiated passes over both batches; the loss is looked at once before and after each."""
    case = cases[0]
    report = Report(case, case.retrained(), shares=(1.0,))
    walk = adam_walk(case, max_steps=3)  # which looks at the loss as soon as it is made
    assert report.target - report.original_loss > 0.01
    match, number = report.follow("gradient_ascent", walk), len(case.splits.forget)
    assert (match.strength, match.evaluations) == (3, 4)
    assert report.costs["gradient_ascent"].plain_passes == pytest.approx(3 * number + 3 * number / 3)
    assert report.costs["gradient_ascent"].seconds > 0


def test_a_brief_match_is_measured_and_not_probed_nor_on_the_frontier(cases):
    case = cases[0]
    report = Report(case, case.retrained(), rounding=True)
    model = case.original()
    delta = first_order.ascent_direction(model, case.splits.forget)
    match = report.match("gradient_ascent", matching.Line(model, delta, case.splits.forget), brief=True)
    assert match.loss == pytest.approx(report.target, abs=matching.TOLERANCE)
    metrics = {row["metric"] for row in report.rows}
    assert {"holdout_loss", "strength", "reached"} <= metrics
    assert not {"relearned_nats", "forget_loss_4bit"} & metrics
    assert (report.frontier, report.curves) == ([], {})
    report.match("again", matching.Line(model, delta, case.splits.forget, weights.snapshot(case.original())))
    assert {"relearned_nats", "forget_loss_4bit"} <= {row["metric"] for row in report.rows}


def test_a_sweep_is_above_the_retrained_model_on_the_validation_sequences(cases):
    case = cases[0]
    report = Report(case, case.retrained())
    model = case.original()
    delta = first_order.ascent_direction(model, case.splits.forget)
    table = report.sweep([1.0], lambda _: matching.Line(model, delta, case.splits.forget))
    assert table["reached"].all()
    matching.Line(model, delta, case.splits.forget).to(report.target)
    expected = mean_loss(model, case.validation) - mean_loss(case.retrained(), case.validation)
    assert table["excess"].item() == pytest.approx(expected)


def test_sweeps_become_tidy_results_that_can_be_written(cases, tmp_path):
    sweep = pd.DataFrame({"setting": [1e-3, 1e-2], "validation_loss": [3.5, 3.25], "strength": [1.0, 2.0]})
    sweep = sweep.assign(reached=[True, False], excess=[0.5, 0.25])
    tidy = sweeps_table(
        cases[1], [sweep.assign(method="kfac", sweep="damping"), sweep.assign(method="m", sweep="s")]
    )
    results.write_results(tidy, tmp_path, "sweeps")
    again = results.read_results(tmp_path, "sweeps").query("method == 'kfac'")
    assert again["value"].tolist() == [0.5, 0.25]
    assert again["setting"].tolist() == [1e-3, 1e-2]
    assert again["reached"].tolist() == [1, 0]
    assert set(again["model"]) == {one_case.model_name(TINY_PROFILE)}
    assert set(again["corpus"]) == {"tales"}
    assert set(again["seed"]) == {1}


def test_a_method_that_cannot_forget_is_reported_where_it_ended(cases):
    case = cases[0]
    report = Report(case, case.retrained())
    model = case.original()
    end = report.follow("finetuned", matching.Walk(model, [], case.splits.forget))
    assert (end.strength, end.reached) == (0.0, False)
    assert [point["share"] for point in report.frontier] == [SHARES[0]]
    table = results_table([report])
    assert table.query("metric == 'reached'")["value"].item() == 0.0


def test_every_chapter_has_every_profile_and_the_same_settings_in_each():
    for name, by_profile in CHAPTERS.items():
        assert list(by_profile) == list(profiles.PROFILES), name
        fields = {field.name for field in dataclasses.fields(profiles.Profile)}
        own = {frozenset(settings.keys() - fields) for settings in by_profile.values()}
        assert len(own) == 1, name


def test_a_chapter_changes_the_profile_and_brings_its_own_settings():
    settings, sizes = chapters.chapter("repeated_requests", "quick")
    assert (settings.seeds, sizes.number) == ((0,), 6)
    assert (settings.relearning_steps, settings.references) == (10, 1)
    others = {"seeds": (0, 1), "relearning_steps": 30, "relearning_rate": 1e-4, "references": 2}
    assert dataclasses.replace(settings, **others) == profiles.get_profile("quick")
    settings, _ = chapters.chapter("repeated_requests", "cpu", "tales", seeds=2)
    assert (settings.name, settings.corpus, settings.seeds) == ("cpu", "tales", (0, 1))
    with pytest.raises(ValueError, match="unknown chapter 'requests': choose one of unlearning_problem,"):
        chapters.chapter("requests", "quick")
    with pytest.raises(ValueError, match="unknown profile 'fast'"):
        chapters.chapter("newton", "fast")
    assert chapters.chapter("case_studies", "quick", "tales")[0].corpus == "tales"  # in place of its own, posts
    with pytest.raises(ValueError, match="a profile has no lenght: choose from corpus, "):
        chapters.chapter("real_model", "quick", lenght=3)


@pytest.mark.parametrize("shares", [(0.5,), (1.0, 0.5), ()])
def test_shares_without_the_target_or_out_of_order_are_refused(cases, shares):
    with pytest.raises(ValueError, match=r"must ascend and hold 1\.0"):
        Report(cases[0], cases[0].retrained(), shares=shares)


def test_unknown_profiles_corpora_and_numbers_are_refused():
    assert profiles.get_profile("quick", "tales", 2).seeds == (0, 1)
    assert profiles.get_profile("quick").corpus == "reuters"
    with pytest.raises(ValueError, match="unknown profile 'fast': choose one of quick, cpu, gpu"):
        profiles.get_profile("fast")
    with pytest.raises(ValueError, match="unknown corpus 'news'"):
        profiles.get_profile("quick", "news")
    with pytest.raises(ValueError, match="at least one seed, not 0"):
        profiles.get_profile("quick", seeds=0)


EXPERIMENT = """
import sys
import pandas as pd
from test_report import TINY_PROFILE
from unlearnlib.experiment import case as one_case
from unlearnlib.experiment.report import Report
from unlearnlib.losses import mean_loss
from unlearnlib.methods import first_order, matching, walks
from unlearnlib.verdicts import results
import torch

corpus = one_case.load_corpus("tales")
one_case.load_corpus = lambda name: corpus
import os
os.environ["UNLEARNLIB_CACHE"] = sys.argv[1] + "/cache"
rows = []
for case in one_case.make_cases(TINY_PROFILE):
    report = Report(case, case.retrained())
    model = case.original()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    splits = case.splits
    loss = first_order.with_retain(first_order.ascent_loss, 1.0)
    steps = walks.descend(model, loss, splits.forget, splits.retain, optimizer, seed=0)
    target = mean_loss(model, splits.forget) + 0.2
    match = matching.Walk(model, steps, splits.forget).to(target)
    report.measure("gradient_difference", model, strength=match.strength)
    report.probe("gradient_difference", model)
    rows += report.rows
results.write_results(pd.DataFrame(rows), sys.argv[1], "twice")
"""


def test_the_same_experiment_twice_from_nothing_gives_the_same_bytes(tmp_path, pytestconfig):
    written = []
    for name in ("first", "second"):
        command = [sys.executable, "-c", EXPERIMENT, str(tmp_path / name)]
        folder = pytestconfig.rootpath / "tests" / "experiment"
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        written.append((tmp_path / name / "twice.csv").read_bytes())
    assert written[0] == written[1]
    assert written[0].count(b"\n") > 20


def test_the_second_corpus_has_enough_text_at_every_profile():
    for name in ("quick", "cpu"):
        settings = profiles.on_second_corpus(profiles.get_profile(name), 3)
        assert (settings.corpus, settings.seeds) == ("socialiqa", (0, 1, 2))
        corpus = one_case.load_corpus(settings.corpus)
        tokenizer = one_case.train_tokenizer(corpus["text"], settings.vocabulary)
        sizes = {split: getattr(settings, split) for split in ("forget", "retain", "holdout")}
        for seed in settings.seeds:
            splits = one_case.make_splits(corpus, tokenizer, length=settings.length, seed=seed, **sizes)
            assert {split: len(getattr(splits, split)) for split in sizes} == sizes
    assert profiles.on_second_corpus(settings, 1).corpus == "reuters"
