import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import VOCABULARY, random_sequences, tiny_model
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.experiment import case, profiles, request_series, request_steps
from unlearnlib.losses import mean_loss
from unlearnlib.methods import forgetting_noise, matching
from unlearnlib.models import loading
from unlearnlib.models.training import Training
from unlearnlib.texts.sequences import Splits

DAMPING = 0.1


def make_case():
    """4 forget, 32 retain (4 of them validation) and 6 holdout sequences of random tokens."""
    profile = dataclasses.replace(
        profiles.PROFILES["quick"],
        corpus="tales",
        model=loading.small_opt(VOCABULARY, hidden_size=16, layers=1, heads=2),
        training=Training(epochs=2, learning_rate=1e-2),
    )
    rows = random_sequences(42, seed=9).split([4, 32, 6])
    return case.Case(profile, 3, None, Splits(*rows, documents={n: [n] for n in ("forget", "retain", "holdout")}))


def loss(model, sequences):
    """Mean of per-sequence means, by the textbook call."""
    logits = model(input_ids=sequences).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean()


def row(model):
    return weights.flatten(weights.snapshot(model))


@dataclasses.dataclass
class Explicit:
    """A curvature diag(a) + b bᵀ, as the matrix that it is."""

    matrix: torch.Tensor

    def matvec(self, v):
        return weights.unflatten(self.matrix @ weights.flatten(v), v)

    def __post_init__(self):
        self.eigen = torch.linalg.eigh(self.matrix)

    def power(self, v, exponent, damping):
        values, vectors = self.eigen
        return weights.unflatten(vectors @ ((values + damping) ** exponent * (vectors.T @ weights.flatten(v))), v)

    def solve(self, v, damping):
        damped = self.matrix + damping * torch.eye(len(self.matrix), dtype=self.matrix.dtype)
        return weights.unflatten(torch.linalg.solve(damped, weights.flatten(v)), v)


def small_model():
    """A tiny model in which two layers are trained: few enough weights for an explicit matrix."""
    model = tiny_model(seed=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.self_attn.out_proj" in name or "final_layer_norm" in name)
    return model


@pytest.fixture
def model():
    return small_model()


@pytest.fixture(scope="module")
def curvature():
    d = len(row(small_model()))
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(d, 3, generator=generator, dtype=torch.float64)
    return Explicit(torch.diag(torch.rand(d, generator=generator, dtype=torch.float64)) + b @ b.T)


FORGET, KEPT = random_sequences(4, seed=1), random_sequences(8, seed=2)


def trained_gradient(model, sequences):
    """The gradient of that loss, all trained parameters in one row."""
    live = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([row.flatten() for row in torch.autograd.grad(loss(model, sequences), live)])


def target_above(model, forget=FORGET):
    return mean_loss(model, forget) + 0.05


# The series


def test_sets_are_cut_from_the_forget_sequences_and_then_from_the_retain_sequences():
    case = make_case()
    series = request_series.RequestSeries(case, number=3, size=3)
    first, second, third = series.sets
    assert torch.equal(first, case.splits.forget[:3])
    assert torch.equal(second, torch.cat([case.splits.forget[3:], case.splits.retain[:2]]))
    assert torch.equal(third, case.splits.retain[2:5])
    assert torch.equal(series.kept, case.splits.retain[5:28])
    assert torch.equal(series.choice, case.splits.retain[28:30])
    assert torch.equal(series.probed, case.splits.retain[30:])


def test_a_single_validation_sequence_cannot_both_choose_and_measure():
    case = make_case()
    case = dataclasses.replace(case, splits=dataclasses.replace(case.splits, retain=case.splits.retain[:15]))
    with pytest.raises(ValueError, match="take 16 retain sequences or more"):
        request_series.RequestSeries(case, number=2, size=2)


def test_a_model_of_the_moment_is_trained_without_what_was_asked_so_far():
    case = make_case()
    series = request_series.RequestSeries(case, number=3, size=2)
    assert torch.equal(series.run(3).sequences, case.splits.retain[2:])
    assert series.run(0).folder == case.runs()["original"].folder
    assert series.run(2).folder == case.runs()["retrained"].folder
    assert series.run(3).folder != case.runs()["retrained"].folder
    assert series.run(3).seed == case.seed


@pytest.mark.parametrize(("number", "size"), [(0, 4), (4, 0), (8, 4)])
def test_requests_that_leave_nothing_are_refused(number, size):
    with pytest.raises(ValueError, match=f"cannot make {number} requests of {size} sequences.*no more than 31"):
        request_series.RequestSeries(make_case(), number, size)


def test_a_table_of_what_the_model_is_after_each_request(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path))
    case = make_case()
    series = request_series.RequestSeries(case, number=3, size=2)
    retrained = series.retrained
    assert series.targets == pytest.approx([loss(retrained, s).item() for s in series.sets], rel=1e-5)
    model, seen = case.original(), []

    class Louder:
        """A path that makes the logits larger, whatever the target is."""

        def __init__(self, model, forget, request):
            self.model, self.forget, self.request = model, forget, request

        def to(self, target):
            seen.append((loss(self.model, self.forget).item() - target, self.request))
            with torch.no_grad():
                self.model.lm_head.weight.mul_(1.1)
            after = target + {1: -0.02, 2: 0.0, 3: 5.0}[self.request]  # short, there, far above
            return matching.Match(0.25 * self.request, after, self.request == 2, 1)

    assert [match.strength for match in series.follow("kfac", model, Louder)] == [0.25, 0.5, 0.75]
    table = {(r["metric"], r["request"]): r["value"] for r in series.rows}
    assert {(r["method"], r["seed"], r["corpus"], r["model"]) for r in series.rows} == {
        ("kfac", 3, "tales", "opt-16x1")
    }
    assert [request for _, request in seen] == [1, 2, 3]
    for excess, request in seen:
        assert table["before_excess", request] == pytest.approx(excess, abs=1e-5)
        assert table["strength", request] == 0.25 * request
        assert table["served", request] == (request >= 2)
    # The last rows, by hand, from the model as it now is.
    each = [
        F.cross_entropy(model(input_ids=s).logits[:, :-1].mT, s[:, 1:], reduction="none").mean(1).detach()
        for s in (*series.sets, case.splits.holdout)
    ]
    excesses = [losses.mean().item() - target for losses, target in zip(each[:3], series.targets, strict=True)]
    assert table["forget_excess", 3] == pytest.approx(excesses[2], abs=1e-5)
    assert table["earlier_excess", 3] == pytest.approx((excesses[0] + excesses[1]) / 2, abs=1e-5)
    assert table["earlier_lowest", 3] == pytest.approx(min(excesses[:2]), abs=1e-5)
    assert table["holdout_loss", 3] == pytest.approx(each[3].mean().item(), rel=1e-5)
    assert table["validation_loss", 3] == pytest.approx(loss(model, case.splits.retain[30:]).item(), rel=1e-5)
    auc = roc_auc_score([1] * 6 + [0] * 6, -np.concatenate([losses.numpy() for losses in each]))
    assert table["membership_auc", 3] == pytest.approx(auc)
    p, q = (m(input_ids=case.splits.holdout).logits[:, :-1].log_softmax(2) for m in (retrained, model))
    assert table["kl_holdout", 3] == pytest.approx((p.exp() * (p - q)).sum(2).mean().item(), rel=1e-4)
    assert ("earlier_excess", 1) not in table
    # After two requests the case's own forget set is forgotten, and nothing else.
    values, twin = series.measure("twin", case.retrained(), 2), case.retrained()
    p, q = (m(input_ids=case.splits.holdout).logits[:, :-1].log_softmax(2) for m in (retrained, twin))
    assert values["kl_holdout"] == pytest.approx((p.exp() * (p - q)).sum(2).mean().item(), rel=1e-4)
    assert values["kl_moment"] == pytest.approx(0, abs=1e-9)
    assert "kl_moment" in {metric for metric, request in table if request == 2}
    values = series.measure("retrained", retrained, 0)
    assert values["kl_holdout"] == pytest.approx(0, abs=1e-9)
    assert "membership_auc" not in values


MEASURED = {"served": [1, 2, 3, 4], "holdout_loss": [2, 4]}


def test_a_model_is_measured_now_and_then_but_every_request_is_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path))
    series = request_series.RequestSeries(make_case(), number=4, size=1, every=2)
    series.follow("kfac", series.case.original(), request_steps.ascent_step)
    noted = {metric: [r["request"] for r in series.rows if r["metric"] == metric] for metric in MEASURED}
    assert noted == MEASURED
    assert series.trails == {}


def test_a_trail_holds_the_weights_before_the_first_request_and_after_each(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path))
    series = request_series.RequestSeries(make_case(), number=2, size=2)
    model = series.case.original()
    before = weights.snapshot(model)
    matches = series.follow("gradient_ascent", model, request_steps.ascent_step, trail=True)
    [first, second, third] = series.trails["gradient_ascent"]
    torch.testing.assert_close(first, before, rtol=0, atol=0)
    torch.testing.assert_close(third, weights.snapshot(model), rtol=0, atol=0)
    weights.set_weights(model, second)
    assert loss(model, series.sets[0]).item() == pytest.approx(matches[0].loss, abs=1e-5)


def test_references_are_measured_as_often_as_the_methods(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path))
    series = request_series.RequestSeries(make_case(), number=4, size=1, every=2)
    series.reference()
    of_holdout = {(r["method"], r["request"]): r["value"] for r in series.rows if r["metric"] == "holdout_loss"}
    assert of_holdout.keys() == {("original", 0), ("retrained", 2), ("retrained", 4)}
    holdout = series.case.splits.holdout
    assert of_holdout["original", 0] == pytest.approx(loss(series.case.original(), holdout).item(), rel=1e-5)
    assert of_holdout["retrained", 4] == pytest.approx(loss(series.retrained, holdout).item(), rel=1e-5)
    p, q = (
        m(input_ids=holdout).logits[:, :-1].log_softmax(2)
        for m in (series.case.retrained(), series.case.retrained_again())
    )
    assert series.floor == pytest.approx((p.exp() * (p - q)).sum(2).mean().item(), rel=1e-4)


def test_a_method_breaks_down_at_the_first_set_that_was_forgotten_before_it_was_asked_for():
    excesses = {("a", 0): [-1, 0.02, 0.3], ("a", 1): [0.005, -1, 0.02], ("b", 0): [-1, 0.009, -1]}
    table = pd.DataFrame(
        {"method": method, "seed": seed, "metric": "before_excess", "request": request, "value": value}
        for (method, seed), values in excesses.items()
        for request, value in enumerate(values, start=1)
    )
    other = table.assign(metric="forget_excess", value=1.0, method="b")
    assert request_series.broken_down(pd.concat([table, other])).to_dict() == {("a", 0): 2, ("a", 1): 3}


def test_reference_models_are_strangers_to_all_the_sets_and_to_one_another(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(request_series, "load_trained", runs.append)
    series = request_series.RequestSeries(make_case(), number=3, size=3)
    assert len(list(series.references())) == series.case.profile.references > 1
    forgotten = {tuple(sequence.tolist()) for one in series.sets for sequence in one}
    for run in runs:
        assert forgotten.isdisjoint(tuple(sequence.tolist()) for sequence in run.sequences)
        assert len(run.sequences) == 36 - 9
    assert len({run.seed for run in runs} | {series.case.seed}) == len(runs) + 1


def test_a_setting_is_chosen_by_the_loss_on_its_own_half_after_the_first_requests(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARNLIB_CACHE", str(tmp_path))
    series = request_series.RequestSeries(make_case(), number=3, size=2)
    grid = (2e-3, 1e-2, 5e-2)

    def step(learning_rate):
        return request_steps.difference_step(series.kept, learning_rate, 1.0, seed=0)

    chosen = series.choose("gradient_difference", {"learning_rate": grid}, step, requests=2, most=3)
    losses = {}
    for rate in grid:
        model = series.case.original()
        for request, (forget, target) in enumerate(zip(series.sets[:2], series.targets[:2], strict=True), start=1):
            step(rate)(model, forget, request).to(target)
        losses[rate] = loss(model, series.choice).item()
    table = series.choices["gradient_difference"].table
    assert table["reached"].all()
    assert dict(zip(table["learning_rate"], table["validation_loss"], strict=True)) == pytest.approx(losses)
    assert chosen["learning_rate"] == min(losses, key=losses.get)
    noted = {row["metric"]: row["value"] for row in series.rows}
    assert (noted["settings_tried"], series.rows[0]["request"]) == (3, 0)
    assert noted["choosing_passes"] > 0


# The steps


def test_ascent_moves_along_the_gradient_to_the_target(model):
    start, along, target = row(model), trained_gradient(model, FORGET), target_above(model)
    match = request_steps.ascent_step(model, FORGET, 1).to(target)
    assert match.reached
    assert loss(model, FORGET).item() == pytest.approx(target, abs=matching.TOLERANCE)
    torch.testing.assert_close(row(model) - start, match.strength * along, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("above", [0.0, 0.3])
def test_a_set_that_is_forgotten_already_is_left_alone(model, curvature, above):
    start, target = row(model), mean_loss(model, FORGET) - above
    steps = {
        "ascent": request_steps.ascent_step,
        "difference": request_steps.difference_step(KEPT, 1e-2, 1.0, seed=0),
        "batches": request_steps.batches_step(1e-2, seed=0),
        "fisher": request_steps.fisher_step(lambda model: curvature, DAMPING, refresh=True),
        "noise": request_steps.noise_step(curvature, DAMPING, seed=0),
    }
    for name, step in steps.items():
        match = step(model, FORGET, 1).to(target)
        assert match.strength == 0, name
        assert match.reached == (above == 0), name
        assert torch.equal(row(model), start), name


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_gradient_difference_takes_adams_steps_and_stops_at_the_target(model, weight):
    target = target_above(model)
    twin = small_model()
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=1e-3)
    match = request_steps.difference_step(KEPT, 1e-3, weight, seed=0)(model, FORGET, 1).to(target)
    assert match.reached
    assert match.strength > 1
    for _ in range(math.ceil(match.strength)):  # all of FORGET and all of KEPT are one batch each
        before = row(twin)
        optimizer.zero_grad()
        (weight * loss(twin, KEPT) - loss(twin, FORGET)).backward()
        optimizer.step()
    share = match.strength - math.floor(match.strength) or 1.0
    torch.testing.assert_close(row(model), before + share * (row(twin) - before), rtol=1e-6, atol=1e-8)


def test_a_batch_of_ascent_is_a_quarter_of_the_set(model):
    start, at = row(model), mean_loss(model, FORGET)
    gradients = [trained_gradient(model, one[None]) for one in FORGET]
    request_steps.batches_step(1e-4, seed=0, most=1)(model, FORGET, 1).to(at + 10)
    moved = row(model) - start
    apart = [(moved / 1e-4 - gradient).norm() / gradient.norm() for gradient in gradients]
    assert min(apart) < 1e-3
    assert sorted(apart)[1] > 0.1


def test_the_opening_serves_the_first_requests_in_turn_and_can_start_again(model):
    sets = (FORGET, random_sequences(4, seed=7))
    targets = (mean_loss(model, sets[0]) + 0.05, mean_loss(model, sets[1]) + 0.1)
    opening = request_steps.Opening(model, request_steps.ascent_step, sets, (*targets, 99.0))
    first = opening.to(targets[-1])
    end, start = row(model), opening.start
    weights.set_weights(model, start)
    by_hand = [
        request_steps.ascent_step(model, forget, 1).to(target)
        for forget, target in zip(sets, targets, strict=True)
    ]
    assert torch.equal(row(model), end)
    assert first.strength == sum(match.strength for match in by_hand)
    assert first.reached
    assert first.loss == by_hand[-1].loss
    assert opening.to(targets[-1]) == first
    assert torch.equal(row(model), end)
    weights.set_weights(model, start)
    short = request_steps.Opening(model, request_steps.batches_step(1e-9, 0, most=1), sets, (targets[0], 0.0))
    assert not short.to(0.0).reached  # the last set is past its target, the first has not come to its own


def test_a_step_of_fisher_removal_is_the_solution_with_the_explicit_matrix(model, curvature):
    start, delta = row(model), trained_gradient(model, FORGET)
    expected = torch.linalg.solve(curvature.matrix + DAMPING * torch.eye(len(start), dtype=start.dtype), delta)
    path = request_steps.fisher_step(lambda model: curvature, DAMPING, refresh=True)(model, FORGET, 1)
    match = path.to(target_above(model))
    assert match.reached
    torch.testing.assert_close(row(model) - start, match.strength * expected, rtol=1e-6, atol=1e-9)


def test_curvature_is_built_once_or_at_the_weights_of_each_request(model, curvature):
    for refresh, expected in ((False, 1), (True, 3)):
        at = []

        def build(model, at=at):
            at.append(row(model))
            return curvature

        step = request_steps.fisher_step(build, DAMPING, refresh)
        before = []
        for request in (1, 2, 3):
            before.append(row(model))
            step(model, FORGET, request).to(target_above(model))
        assert len(at) == expected
        assert all(torch.equal(a, b) for a, b in zip(at, before, strict=False))
        assert not torch.equal(before[0], before[2])


def test_noise_costs_what_was_allowed_to_second_order(model, curvature):
    """Where nothing is left to forget, what moves the weights is s C^(-1/4) n, and its damage is the allowance."""
    allowed = 0.003
    target = mean_loss(model, FORGET) - 1.0  # nothing to do, so only the noise moves the weights
    start = row(model)
    moves = []
    for request, seed in ((1, 0), (2, 0), (1, 1)):
        weights.set_weights(model, weights.unflatten(start, weights.snapshot(model)))
        step = request_steps.fisher_step(lambda model: curvature, DAMPING, refresh=False, noise=allowed, seed=seed)
        step(model, FORGET, request).to(target)
        moves.append(row(model) - start)
    for move in moves:
        assert (move @ curvature.matrix @ move / 2).item() == pytest.approx(allowed, rel=1e-6)
        damped = curvature.matrix + DAMPING * torch.eye(len(move), dtype=move.dtype)
        values, vectors = torch.linalg.eigh(damped)
        white = values**0.25 * (vectors.T @ move)
        white = white / white.std()
        assert abs((white**4).mean().item() - 3) < 1.0  # Gaussian once the shape is undone
        half = len(white) // 2
        assert 0.7 < (white[:half].std() / white[half:].std()).item() < 1.4
    cosines = [torch.cosine_similarity(moves[0], other, dim=0).item() for other in moves[1:]]
    assert all(abs(cosine) < 0.35 for cosine in cosines)


def test_the_damage_of_noise_adds_up_like_a_random_walk(curvature):
    """K draws cost K times one on average, and not K² times: ½ tr(C Σ K) with Σ = s² C_λ^(-1/2)."""
    like = weights.snapshot(small_model())
    d = len(weights.flatten(like))
    values, vectors = torch.linalg.eigh(curvature.matrix + DAMPING * torch.eye(d, dtype=torch.float64))
    sigma = (vectors * values**-0.5) @ vectors.T
    damages = []
    for seed in range(60):
        walk = sum(weights.flatten(forgetting_noise(curvature, like, DAMPING, 100 * seed + k)) for k in range(4))
        damages.append((walk @ curvature.matrix @ walk / 2).item())
    expected = 4 * torch.trace(curvature.matrix @ sigma).item() / 2
    assert np.mean(damages) == pytest.approx(expected, abs=4 * np.std(damages) / math.sqrt(len(damages)))
    assert np.std(damages) / math.sqrt(len(damages)) < 0.05 * expected


def test_no_length_of_noise_does_damage_where_there_is_no_curvature(model):
    flat = Explicit(torch.zeros(len(row(model)), len(row(model)), dtype=torch.float64))
    with pytest.raises(ValueError, match="the curvature is zero along the noise"):
        request_steps.noise_length(flat, weights.snapshot(model), 0.01)


def test_noise_alone_moves_along_its_own_direction(model, curvature):
    start, target = row(model), target_above(model)
    match = request_steps.noise_step(curvature, DAMPING, seed=2)(model, FORGET, 5).to(target)
    noise = forgetting_noise(curvature, weights.snapshot(model), DAMPING, seed=2005)
    assert match.reached
    torch.testing.assert_close(row(model) - start, match.strength * weights.flatten(noise), rtol=1e-6, atol=1e-9)


def test_all_at_once_starts_from_the_original_weights_each_time(curvature):
    original, model = small_model(), small_model()
    second = random_sequences(4, seed=7)
    start = row(original)
    target = {1: target_above(original), 2: target_above(original, second)}
    step = request_steps.joint_step(original, curvature, DAMPING)
    step(model, FORGET, 1).to(target[1])
    match = step(model, second, 2).to(target[2])
    assert match.reached
    both = torch.cat([FORGET, second])
    assert loss(model, both).item() == pytest.approx((target[1] + target[2]) / 2, abs=matching.TOLERANCE)
    damped = curvature.matrix + DAMPING * torch.eye(len(start), dtype=start.dtype)
    expected = torch.linalg.solve(damped, trained_gradient(original, both))
    assert torch.cosine_similarity(row(model) - start, expected, dim=0).item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(row(original), start)
