import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.experiment import case as one_case
from unlearnlib.experiment import (
    chapters,
    comparison,
    contenders,
    curvatures,
    four_datasets,
    profiles,
    request_sets,
)
from unlearnlib.experiment.report import Report
from unlearnlib.losses import note_pass
from unlearnlib.methods import matching
from unlearnlib.models import loading
from unlearnlib.models.training import Training
from unlearnlib.texts import corpora

TOPICS = ("crude", "grain", "ship", "trade")
ROWS = [
    {
        "text": f"{i} ships with {i % 7} masts each; how many masts, on {TOPICS[i % 4]} day?\n#### {i * (i % 7)}",
        "answer": str(i * (i % 7)),
        "topic": TOPICS[i % 4],
    }
    for i in range(20, 220)
]
SHARES = (0.5, 1.0)
METHODS = ("gradient_ascent", "gradient_difference", "fisher_diagonal", "kfac")
MATCHED = (*METHODS, "fisher_forgetting")
PROFILE = dataclasses.replace(
    profiles.PROFILES["quick"],
    corpus="toy",
    model=loading.small_opt(300, hidden_size=16, layers=1, heads=2),
    vocabulary=300,
    length=24,
    forget=6,
    retain=32,
    holdout=8,
    training=Training(epochs=30, learning_rate=1e-2),
    seeds=(0,),
    relearning_steps=1,
)


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """A corpus with questions and topics, and a cache of its own for the models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(corpora.CORPORA, "toy", lambda: [dict(row) for row in ROWS])
        patch.setitem(corpora.ABOUT, "toy", corpora.About("sums", "none", "here"))
        patch.setenv("UNLEARNLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def case():
    [found] = one_case.make_cases(PROFILE)
    return found


def builders(case):
    return curvatures.curvature_builders(case.estimation, case.seed, 6, 6, 4)


def loss(model, sequences):
    """Mean of per-sequence means, by the textbook call."""
    logits = model(input_ids=sequences).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean()


@pytest.fixture(scope="module")
def chooser(case):
    """A report that has chosen the settings of all methods."""
    found = Report(case, case.retrained())
    comparison.choose_settings(found, METHODS, builders(case), most=6)
    return found


@pytest.fixture(scope="module")
def report(case, chooser):
    found = four_datasets.QuestionReport(case, case.retrained(), shares=SHARES)
    comparison.measure_references(found)
    chosen = {method: choice.setting for method, choice in chooser.choices.items()}
    comparison.follow_methods(found, chosen, builders(case))
    return found


def values(report, metric):
    return {row["method"]: row["value"] for row in report.rows if row["metric"] == metric}


# Settings


def test_settings_of_every_method_are_chosen_by_validation_at_matched_forgetting(case, chooser):
    assert tuple(chooser.choices) == METHODS
    tried = values(chooser, "settings_tried")
    assert tried["gradient_ascent"] == 1
    assert all(3 <= tried[method] <= 6 for method in METHODS[1:])
    model, forget = case.original(), case.splits.forget
    live = weights.parameters(model)
    delta = dict(zip(live, torch.autograd.grad(loss(model, forget), live.values()), strict=True))
    squares = {name: torch.zeros_like(p) for name, p in live.items()}
    for sequence in case.estimation[:6]:
        gradients = torch.autograd.grad(loss(model, sequence[None]), live.values())
        for name, gradient in zip(live, gradients, strict=True):
            squares[name] += gradient**2 / 6
    retrained = loss(case.retrained(), case.validation).item()
    for _, row in chooser.tried("fisher_diagonal").iterrows():
        direction = {name: delta[name] / (squares[name] + row["damping"]) for name in delta}
        path = matching.Line(case.original(), direction, forget)
        assert path.to(loss(case.retrained(), forget).item()).reached
        assert row["validation_loss"] == pytest.approx(loss(path.model, case.validation).item(), abs=0.01)
        assert row["excess"] == pytest.approx(row["validation_loss"] - retrained, abs=1e-5)


# The comparison


def test_all_methods_end_at_the_retrained_models_forget_loss(report):
    losses = values(report, "forget_loss")
    assert losses.keys() == {"retrained", "original", "retrained:again", "finetuned", *MATCHED}
    assert report.matches.keys() == report.costs.keys() == set(MATCHED)
    for method in MATCHED:
        assert losses[method] == pytest.approx(losses["retrained"], abs=1.01 * matching.TOLERANCE)
    assert losses["original"] < losses["retrained"] - 0.1
    points = {(point["method"], point["share"]) for point in report.frontier}
    assert points == {(method, share) for method in MATCHED for share in SHARES}


def test_half_of_the_noise_forgets_a_part_and_the_step_the_rest(report):
    strengths = {method: match.strength for method, match in report.matches.items()}
    assert 0 < strengths["fisher_forgetting"] < strengths["kfac"]


def test_passes_of_the_curvature_are_counted_with_each_method_that_needs_it(case, report):
    def build(model):
        note_pass(1000)
        return builders(case)["kfac"](model)

    dear = Report(case, case.retrained(), shares=(1.0,))
    comparison.follow_methods(dear, {"kfac": {"damping": 1e-3}}, {"kfac": build})
    assert min(values(dear, "plain_passes")[method] for method in ("kfac", "fisher_forgetting")) > 1000
    assert values(report, "plain_passes")["fisher_forgetting"] < 1000


def test_what_has_not_forgotten_is_not_probed(report):
    assert values(report, "relearned_nats").keys() == {"retrained", "retrained:again", *MATCHED}
    assert values(report, "relearned_nats")["retrained"] == 0


def test_fine_tuning_lowers_the_loss_of_what_is_kept(report):
    kept = values(report, "retain_loss")
    assert kept["finetuned"] < kept["original"]


# Questions


def test_every_measured_model_is_asked(case, report):
    assert report.questions.keys() == {"task_accuracy_forget", "task_accuracy"}
    measured = values(report, "holdout_loss").keys()
    for metric, questions in report.questions.items():
        assert values(report, metric).keys() == measured
        right = []
        for question in questions:
            rows = [case.tokenizer(question.prompt + option)["input_ids"] for option in question.options]
            cut = max(0, max(map(len, rows)) - PROFILE.length)
            stem = len(case.tokenizer(question.prompt.rstrip())["input_ids"]) - cut
            totals = []
            for row in rows:
                ids = torch.tensor(row[cut:])
                scores = F.log_softmax(case.original()(input_ids=ids[None]).logits[0].double(), dim=1)
                totals.append(scores[range(stem - 1, len(ids) - 1), ids[stem:]].sum().item())
            right.append(max(range(4), key=totals.__getitem__) == question.right)
        assert values(report, metric)["original"] == pytest.approx(sum(right) / len(right))


def test_questions_are_of_forgotten_and_of_other_documents(case, monkeypatch):
    monkeypatch.setattr(four_datasets, "ASKED", 2)
    texts = {f"toy/{i:05d}": row["text"] for i, row in enumerate(ROWS)}
    for metric, questions in four_datasets.questions_of(case).items():
        split = "forget" if metric == "task_accuracy_forget" else "holdout"
        asked = [question.prompt + question.options[question.right] for question in questions]
        assert asked == [texts[name] for name in case.splits.documents[split][:2]]
    short = dataclasses.replace(case, profile=dataclasses.replace(PROFILE, length=1))
    assert four_datasets.questions_of(short) == {"task_accuracy_forget": [], "task_accuracy": []}


def test_a_corpus_without_answers_has_no_questions(case, monkeypatch):
    monkeypatch.setitem(corpora.CORPORA, "toy", lambda: [{"text": row["text"]} for row in ROWS])
    assert four_datasets.questions_of(case) == {}


# Requests of several sizes


@pytest.fixture(scope="module")
def requests():
    small = dataclasses.replace(PROFILE, retain=16, training=Training(epochs=10, learning_rate=1e-2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_sets, "on_small_opt", lambda settings: small)
        settings = dataclasses.replace(PROFILE, seeds=(0, 1, 2))
        return request_sets.requests_of_sizes(settings, (1, 4), "crude")


def test_there_are_requests_of_every_size_and_kind_for_two_seeds(requests):
    assert [(r.seed, r.kind, r.size) for r in requests] == [
        (seed, kind, size) for seed in (0, 1) for kind in ("clustered", "random") for size in (1, 4)
    ]
    crude = {f"toy/{i:05d}" for i, row in enumerate(ROWS) if row["topic"] == "crude"}
    for request in requests:
        assert (set(request.splits.documents["forget"]) <= crude) == (request.kind == "clustered")


def test_serving_measures_all_at_the_requests_own_target(requests):
    request = next(request for request in requests if request.size == 4)
    chosen = {
        "gradient_ascent": {},
        "kfac": {"damping": 1e-2},
        "gradient_difference": {"learning_rate": 3e-3, "retain_weight": 2.0},
    }
    rows = four_datasets.serve(request, chosen)
    assert {(row["size"], row["kind"], row["seed"]) for row in rows} == {(4, "clustered", 0)}
    found = {(row["method"], row["metric"]): row["value"] for row in rows}
    original, retrained = request.original(), request.retrained()
    sets = {"forget": request.splits.forget, "holdout": request.splits.holdout, "related": request.related}
    for name, sequences in sets.items():
        assert found["original", f"{name}_loss"] == pytest.approx(loss(original, sequences).item(), rel=1e-5)
        assert found["retrained", f"{name}_loss"] == pytest.approx(loss(retrained, sequences).item(), rel=1e-5)
    assert found["retrained", "kl_holdout"] == pytest.approx(0, abs=1e-6)
    for method in chosen:
        assert found[method, "reached"] == 1
        assert found[method, "plain_passes"] > 0
        assert found[method, "strength"] > 0
        target = found["retrained", "forget_loss"]
        assert found[method, "forget_loss"] == pytest.approx(target, abs=1.01 * matching.TOLERANCE)
        assert math.isfinite(found[method, "related_loss"])


# Settings of the chapter


@pytest.mark.parametrize("name", ["four_datasets", "case_studies"])
@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_the_chapters_compare_contenders_there_are_with_trials_enough_for_each(case, profile, name):
    _, sizes = chapters.chapter(name, profile)
    known = contenders.contenders_on(case, builders(case))
    assert set(sizes.methods) <= known.keys()
    for method in sizes.methods:
        assert sizes.most >= 1 + sum(len(grid) - 1 for grid in known[method].knobs.values())


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_the_corpora_of_the_chapter_are_known_and_its_last_share_is_the_target(profile):
    _, sizes = chapters.chapter("four_datasets", profile)
    assert set(sizes.corpora.split(",")) <= corpora.CORPORA.keys()
    assert sizes.shares[-1] == 1.0
