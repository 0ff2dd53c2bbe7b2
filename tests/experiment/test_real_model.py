import dataclasses

import pytest
import torch
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.curvature import fisher_dual, kronecker, per_sequence_gradients
from unlearnlib.experiment import case as one_case
from unlearnlib.experiment import chapters, profiles, real_model
from unlearnlib.experiment.report import Report
from unlearnlib.measures import extraction
from unlearnlib.methods import matching
from unlearnlib.models import loading
from unlearnlib.models.training import Training
from unlearnlib.texts import corpora

ROWS = [{"text": f"{i} ships with {i % 7} masts each; how many masts, on day {i % 4}?"} for i in range(20, 420)]
OTHER = ["Bread is dear.", "The mill has no wind.", "Nobody answered the door all winter.", "Salt keeps."]
# A quick profile has neither all methods nor the measures that take long: here everything is small instead.
ALL = chapters.chapter("real_model", "gpu")[1].methods
KNOBS = {
    "fisher_diagonal:expected": {"damping": (1e-4, 1e-3, 1e-2)},
    "kfac": {"damping": (1e-4, 1e-3, 1e-2)},
    "fisher_dual": {"damping": (1e-3, 1e-2, 1e-1)},
    "gradient_difference": {"learning_rate": (1e-3, 3e-3, 9e-3), "retain_weight": (0.5, 1.0, 2.0)},
}
SIZES = {"m_factors": 10, "m_dual": 6}
STEPS = 2
PROFILE = dataclasses.replace(
    profiles.PROFILES["quick"],
    corpus="toy",
    model=loading.small_opt(300, hidden_size=16, layers=2, heads=2),
    vocabulary=300,
    length=24,
    forget=6,
    retain=32,
    holdout=8,
    training=Training(epochs=30, learning_rate=1e-2),
    seeds=(0, 1),
    relearning_steps=1,
    last_blocks=1,
)


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """Small corpora, and a cache of its own for the models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(corpora.CORPORA, "toy", lambda: [dict(row) for row in ROWS])
        patch.setitem(corpora.ABOUT, "toy", corpora.About("sums", "none", "here"))
        for name in ("reuters", "socialiqa", "maths"):
            patch.setitem(corpora.CORPORA, name, lambda name=name: [{"text": name + text} for text in 20 * OTHER])
        patch.setenv("UNLEARNLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def cases():
    return one_case.make_cases(PROFILE)


def report_of(case, **deep):
    return Report(case, case.retrained(), shares=(1.0,), **deep)


@pytest.fixture(scope="module")
def first(cases):
    """The first case, with everything chosen and every method run."""
    case = cases[0]
    unlearner = real_model.Unlearner(
        report_of(case, rounding=True, extraction=7), real_model.builders(case, **SIZES), max_steps=40
    )
    tables = {method: unlearner.choose(method, knobs, 5) for method, knobs in KNOBS.items()}
    unlearner.chosen["kfac:damped"] = {"damping": 10 * unlearner.chosen["kfac"]["damping"]}
    unlearner.run(ALL, STEPS, keep=("gradient_ascent", "kfac", "kfac:damped"))
    return unlearner, tables


def loss(model, sequences):
    """Mean of per-sequence means, by the textbook call."""
    logits = model(input_ids=sequences).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean()


def row(vector):
    return weights.flatten(vector)


def values_of(report, method):
    return {entry["metric"]: entry["value"] for entry in report.rows if entry["method"] == method}


def test_curvatures_are_of_so_many_sequences_in_32_bits(cases):
    model, rows = cases[0].original(), cases[0].estimation
    alone = {
        "fisher_dual": fisher_dual.FisherDual(per_sequence_gradients.sequence_gradients(model, rows[:6])),
        "fisher_diagonal:expected": kronecker.diagonal_fisher(model, rows[:10]),
        "kfac": kronecker.kfac(model, rows[:10]),
    }
    v = weights.random_vector(weights.parameters(model), torch.Generator().manual_seed(0))
    builds = real_model.builders(cases[0], **SIZES)
    assert builds.keys() == alone.keys()
    for method, build in builds.items():
        with torch.autocast("cpu", torch.bfloat16):
            C = build(model)
        torch.testing.assert_close(row(C.solve(v, 1e-2)), row(alone[method].solve(v, 1e-2)), rtol=1e-3, atol=1e-3)


def test_formats_are_compared_with_what_32_bits_give(cases):
    model, forget = cases[0].original(), cases[0].splits.forget
    cosines, change = real_model.compare_formats(model, forget, cases[0].estimation[:8], dampings=(1e-1, 1e-6))
    live = list(weights.parameters(model).values())

    def flat_gradient():
        value = loss(model, forget)
        return value.item(), torch.cat([g.flatten() for g in torch.autograd.grad(value, live)])

    exact, gradient = flat_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        rough, rounded = flat_gradient()
    assert change == pytest.approx(abs(rough - exact), rel=0.1, abs=1e-4)
    assert cosines.iloc[0] == pytest.approx(torch.cosine_similarity(gradient, rounded, dim=0).item(), abs=1e-4)
    # The smaller λ is, the more of the factors' rounding is in the step.
    assert cosines.iloc[2] < cosines.iloc[1] < 1


def test_the_best_setting_is_chosen_and_its_step_kept(first, cases):
    unlearner, tables = first
    for method, table in tables.items():
        best = table[table["reached"]].sort_values("excess").iloc[0]
        assert unlearner.chosen[method] == {name: best[name] for name in KNOBS[method]}
        above = best["validation_loss"] - loss(unlearner.report.retrained, cases[0].validation).item()
        assert best["excess"] == pytest.approx(above, abs=1e-5)
    direction = unlearner.factors.solve(unlearner.forget_gradient, unlearner.chosen["kfac"]["damping"])
    assert torch.equal(row(unlearner.direction("kfac")), row(direction))
    model = cases[0].original()
    gradient = torch.autograd.grad(loss(model, cases[0].splits.forget), list(weights.parameters(model).values()))
    expected = torch.cat([g.flatten() for g in gradient])
    torch.testing.assert_close(row(unlearner.direction("gradient_ascent")), expected)


def test_all_methods_get_to_the_target(first):
    report = first[0].report
    assert list(report.matches) == list(ALL)
    for method, match in report.matches.items():
        assert match.reached, method
        assert abs(match.loss - report.target) <= matching.TOLERANCE
        assert values_of(report, method)["strength"] == match.strength
        assert {"forget_loss_4bit", "extraction_el10", "relearned_nats"} <= values_of(report, method).keys()


def test_what_was_built_before_a_method_is_followed_counts(first):
    unlearner, _ = first
    forget, report = len(unlearner.case.splits.forget), unlearner.report
    assert unlearner.spent["gradient_ascent"] == forget
    assert unlearner.spent["kfac"] >= SIZES["m_factors"]
    for method, built in (("gradient_ascent", 0.0), ("kfac", unlearner.spent["kfac"])):
        searched = forget * (report.matches[method].evaluations) / 3
        assert values_of(report, method)["plain_passes"] == pytest.approx(forget + built + searched)


def test_the_deep_measures_are_those_of_the_model(first):
    unlearner, _ = first
    weights.set_weights(unlearner.model, unlearner.kept["kfac"])
    share = extraction.extraction_likelihood(unlearner.model, unlearner.case.splits.forget, stride=7)
    measured = values_of(unlearner.report, "kfac")
    assert measured["extraction_el10"] == share
    assert measured["forget_loss"] == pytest.approx(loss(unlearner.model, unlearner.case.splits.forget).item())


def test_variants_of_kfac_differ_in_what_they_say(first):
    unlearner, _ = first
    ends = {method: values_of(unlearner.report, method)["holdout_loss"] for method in ALL if "kfac" in method}
    assert len({round(value, 6) for value in ends.values()}) == 4  # best λ, damped, refreshed and held
    held = unlearner.path("kfac:held", STEPS)
    assert not held.refresh
    assert torch.equal(held.hold, unlearner.case.estimation)
    refreshed = unlearner.path("kfac:refreshed", STEPS)
    assert refreshed.refresh
    assert refreshed.hold is None
    assert refreshed.build(unlearner.model) is unlearner.factors  # for the first step
    assert refreshed.build(unlearner.model) is not unlearner.factors


def test_later_cases_take_what_the_first_has_chosen(first, cases):
    chosen = first[0].chosen
    other = real_model.Unlearner(report_of(cases[1]), real_model.builders(cases[1], **SIZES), 40, chosen)
    other.run(("gradient_ascent", "kfac", "kfac:damped", "kfac:refreshed"), STEPS)
    assert all(match.reached for match in other.report.matches.values())
    assert other.kept == {}
    step = other.factors.solve(other.forget_gradient, chosen["kfac:damped"]["damping"])
    assert torch.equal(row(other.direction("kfac:damped")), row(step))
    assert torch.equal(row(weights.snapshot(other.model)), row(other.start))


def test_the_kept_models_are_listened_to_one_by_one(first, cases):
    unlearner, _ = first
    forget, target = cases[0].splits.forget, unlearner.report.target
    losses = unlearner.of_each(lambda model: loss(model, forget).item())
    assert list(losses) == ["original", "retrained", "gradient_ascent", "kfac", "kfac:damped"]
    assert losses.pop("original") == pytest.approx(loss(cases[0].original(), forget).item())
    assert losses.pop("retrained") == pytest.approx(target)
    assert all(abs(value - target) <= 1.1 * matching.TOLERANCE for value in losses.values())
    assert torch.equal(row(weights.snapshot(unlearner.model)), row(unlearner.start))


def test_other_corpora_are_cut_as_the_case_is(cases):
    samples = real_model.elsewhere(cases[0], 3)
    assert list(samples) == ["reuters", "socialiqa", "maths"]
    for name, sample in samples.items():
        assert sample.shape == (3, PROFILE.length)
        assert cases[0].tokenizer.decode(sample[0]).startswith(f"{name}Bread is dear.")


def test_the_bill_is_of_three_things(first):
    bill = first[0].bill(4)
    assert list(bill) == ["request", "factors", "plain"]
    assert all(spent.seconds > 0 and spent.peak_bytes > 0 for spent in bill.values())


def test_more_factors_than_sequences_are_refused_before_anything_is_trained(cases):
    with pytest.raises(ValueError, match="cannot take m = 29 of 28 sequences: choose m from 1 to 28"):
        real_model.builders(cases[0], 29, 6)
