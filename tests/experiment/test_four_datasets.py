import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.experiment import case as one_case
from unlearnlib.experiment import chapters, curvatures, four_datasets, profiles, request_sets
from unlearnlib.experiment.report import Report
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
GRIDS = {
    "fisher_recursion": (1e-3, 1e-2),
    "fisher_dual": (1e-2,),
    "fisher_diagonal": (1e-3, 1e-2),
    "kfac": (1e-2,),
    "gradient_difference": (1e-3, 3e-3),
    "npo": ((1e-3, 0.1), (3e-3, 0.01)),
}
SECOND_ORDER = ("fisher_recursion", "fisher_dual", "fisher_diagonal", "kfac")
MATCHED = ("gradient_ascent", "gradient_difference", "npo", *SECOND_ORDER, "fisher_forgetting")
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
def sweeps(case):
    return four_datasets.sweep_settings(Report(case, case.retrained()), GRIDS, builders(case))


@pytest.fixture(scope="module")
def chosen(sweeps):
    return {method: matching.best_setting(sweep) for method, sweep in sweeps.items()}


@pytest.fixture(scope="module")
def report(case, chosen):
    found = four_datasets.QuestionReport(case, case.retrained(), shares=SHARES)
    four_datasets.references(found)
    four_datasets.first_order(found, chosen)
    seconds = four_datasets.second_order(found, chosen, builders(case))
    assert seconds.keys() == set(SECOND_ORDER)
    assert min(seconds.values()) >= 0
    return found


def values(report, metric):
    return {row["method"]: row["value"] for row in report.rows if row["metric"] == metric}


# Settings


def test_every_setting_is_judged_by_validation_at_matched_forgetting(case, sweeps):
    assert {method: tuple(sweep["setting"]) for method, sweep in sweeps.items()} == GRIDS
    assert all(sweep["reached"].all() for sweep in sweeps.values())
    model, forget = case.original(), case.splits.forget
    live = weights.parameters(model)
    delta = dict(zip(live, torch.autograd.grad(loss(model, forget), live.values()), strict=True))
    squares = {name: torch.zeros_like(p) for name, p in live.items()}
    for sequence in case.estimation[:6]:
        gradients = torch.autograd.grad(loss(model, sequence[None]), live.values())
        for name, gradient in zip(live, gradients, strict=True):
            squares[name] += gradient**2 / 6
    for _, row in sweeps["fisher_diagonal"].iterrows():
        direction = {name: delta[name] / (squares[name] + row["setting"]) for name in delta}
        path = matching.Line(case.original(), direction, forget)
        assert path.to(loss(case.retrained(), forget).item()).reached
        validation = loss(path.model, case.validation).item()
        assert row["validation_loss"] == pytest.approx(validation, abs=0.01)
        assert row["excess"] == pytest.approx(
            validation - loss(case.retrained(), case.validation).item(), abs=0.01
        )


@pytest.mark.parametrize(("method", "setting"), [("gradient_difference", 3e-3), ("npo", (3e-3, 0.05))])
def test_steps_of_adam_are_those_of_the_loss_written_out(case, method, setting):
    rate, beta = setting if method == "npo" else (setting, None)
    path = four_datasets.adam_path(case, method, setting)
    model, original, forget, retain = case.original(), case.original(), case.splits.forget, case.estimation
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(3):  # all sequences are in every batch, for there are fewer than a batch holds
        if method == "npo":
            p, before = (
                torch.stack([-(len(row) - 1) * loss(m, row[None]) for row in forget]) for m in (model, original)
            )
            value = (2 / beta * torch.log1p(torch.exp(beta * (p - before.detach())))).mean()
        else:
            value = loss(model, retain) - loss(model, forget)
        assert next(path.steps) == pytest.approx(value.item(), abs=1e-4)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert path.max_steps == four_datasets.MAX_STEPS


def test_no_setting_that_reaches_the_target_is_an_error(case, monkeypatch):
    monkeypatch.setattr(four_datasets, "MAX_STEPS", 1)
    grids = {"gradient_difference": (1e-6,)}
    sweeps = four_datasets.sweep_settings(Report(case, case.retrained()), grids, builders(case))
    with pytest.raises(ValueError, match="reaches the target: widen the grid"):
        matching.best_setting(sweeps["gradient_difference"])


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
        patch.setattr(request_sets, "architectures", lambda settings: {"OPT": [small]})
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
    rows = four_datasets.serve(request, 1e-2, 3e-3)
    assert {(row["size"], row["kind"], row["seed"]) for row in rows} == {(4, "clustered", 0)}
    found = {(row["method"], row["metric"]): row["value"] for row in rows}
    original, retrained = request.original(), request.retrained()
    sets = {"forget": request.splits.forget, "holdout": request.splits.holdout, "related": request.related}
    for name, sequences in sets.items():
        assert found["original", f"{name}_loss"] == pytest.approx(loss(original, sequences).item(), rel=1e-5)
        assert found["retrained", f"{name}_loss"] == pytest.approx(loss(retrained, sequences).item(), rel=1e-5)
    assert found["retrained", "kl_holdout"] == pytest.approx(0, abs=1e-6)
    for method in ("gradient_ascent", "kfac", "gradient_difference"):
        assert found[method, "reached"] == 1
        assert found[method, "strength"] > 0
        target = found["retrained", "forget_loss"]
        assert found[method, "forget_loss"] == pytest.approx(target, abs=1.01 * matching.TOLERANCE)
        assert math.isfinite(found[method, "related_loss"])


# Settings of the chapter


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_the_chapter_has_a_grid_for_every_method_that_has_a_setting(profile):
    _, sizes = chapters.chapter("four_datasets", profile)
    assert sizes.grids.keys() == {*SECOND_ORDER, "gradient_difference", "npo"}
    assert set(sizes.corpora.split(",")) <= corpora.CORPORA.keys()
    assert sizes.shares[-1] == 1.0
    assert all(len(setting) == 2 for setting in sizes.grids["npo"])
