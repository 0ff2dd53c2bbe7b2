import copy
import math

import pytest
import torch
from helpers import random_sequences, tiny_model
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.methods import first_order


def reference_loss(model, sequences):
    """Mean of per-sequence means, by the textbook call."""
    logits = model(input_ids=sequences).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean()


@pytest.fixture
def case():
    return tiny_model(), random_sequences(6, seed=1), random_sequences(6, seed=2)


def test_direction_is_autograds_gradient(case):
    model, forget, _ = case
    direction = first_order.ascent_direction(model, forget)
    expected = torch.autograd.grad(reference_loss(model, forget), list(weights.parameters(model).values()))
    for ours, theirs in zip(direction.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_losses_are_what_they_are_called(case):
    model, forget, retain = case
    f, r = reference_loss(model, forget), reference_loss(model, retain)
    torch.testing.assert_close(first_order.ascent_loss(model, forget, retain), -f)
    torch.testing.assert_close(first_order.retain_loss(model, forget, retain), r)
    original = tiny_model(seed=5)
    p = original(input_ids=retain).logits[:, :-1].log_softmax(2)
    q = model(input_ids=retain).logits[:, :-1].log_softmax(2)
    kl = (p.exp() * (p - q)).sum(2).mean()
    assert kl > 1e-6
    torch.testing.assert_close(first_order.kl_loss(original)(model, forget, retain), kl)


def test_the_kl_term_pulls_nowhere_at_the_original(case):
    model, forget, retain = case
    loss = first_order.with_retain(first_order.ascent_loss, 3.0, first_order.kl_loss(copy.deepcopy(model)))
    pulled = torch.autograd.grad(loss(model, forget, retain), list(weights.parameters(model).values()))
    plain = first_order.ascent_direction(model, forget)
    for ours, theirs in zip(pulled, plain.values(), strict=True):
        torch.testing.assert_close(ours, -theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.3, 8.0])
def test_what_is_kept_is_added_with_its_weight(case, weight):
    model, forget, retain = case
    f, r = reference_loss(model, forget), reference_loss(model, retain)
    difference = first_order.with_retain(first_order.ascent_loss, weight)
    torch.testing.assert_close(difference(model, forget, retain), weight * r - f)
    kept = first_order.with_retain(difference, 2.0, lambda model, forget, retain: forget.sum() + 10 * retain.sum())
    extra = 2.0 * (forget.sum() + 10 * retain.sum())
    torch.testing.assert_close(kept(model, forget, retain), weight * r - f + extra)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_that_means_nothing_is_refused(weight):
    with pytest.raises(ValueError, match=f"finite and at least 0, not {weight}"):
        first_order.with_retain(first_order.ascent_loss, weight)


def log_likelihoods(model, sequences):
    """log p of each whole sequence given its first token, by the textbook call."""
    logits = model(input_ids=sequences).logits[:, :-1]
    return -F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").sum(1)


def gradient(model, value):
    return torch.autograd.grad(value, list(weights.parameters(model).values()), retain_graph=True)


@pytest.mark.parametrize("beta", [0.03, 0.5, 2.0])
def test_npo_is_its_formula_and_weighs_each_sequence_as_it_should(case, beta):
    model, forget, retain = case
    original = tiny_model(seed=5)
    found = first_order.npo_loss(original, beta)(model, forget, retain)
    p, p0 = log_likelihoods(model, forget), log_likelihoods(original, forget).detach()
    ratio = (p - p0).detach().exp()
    assert ratio.log().abs().max() > 0.1  # the two models do differ
    # -(2/β) log sigmoid(-β log p/p₀), written out.
    expected = -2 / beta * (1 / (1 + ratio**beta)).log().mean()
    torch.testing.assert_close(found, expected)
    weight = 2 * ratio**beta / (1 + ratio**beta)
    for ours, theirs in zip(gradient(model, found), gradient(model, (weight * p).mean()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_npo_with_small_beta_is_ascent_and_bounded_below_as_ascent_is_not(case):
    model, forget, retain = case
    original = copy.deepcopy(model)
    at_start = first_order.npo_loss(original, 0.7)(model, forget, retain)
    assert at_start.item() == pytest.approx(2 / 0.7 * math.log(2))
    for p in weights.parameters(model).values():  # away from the start, where every weight is 1 whatever β
        p.data.mul_(1.2)
    npo = first_order.npo_loss(original, 1e-9)(model, forget, retain)
    tokens = forget.shape[1] - 1
    ascent = gradient(model, first_order.ascent_loss(model, forget, retain))
    for ours, theirs in zip(gradient(model, npo), ascent, strict=True):
        torch.testing.assert_close(ours, tokens * theirs, rtol=1e-6, atol=1e-10)
    values = {}
    for scale in (1.0, 50.0):
        for p in weights.parameters(model).values():
            p.data.mul_(scale)
        values[scale] = [
            loss(model, forget, retain).item()
            for loss in (first_order.npo_loss(original, 0.1), first_order.ascent_loss)
        ]
    assert values[50.0][1] < -50  # ascent falls without end
    assert 0 <= values[50.0][0] < values[1.0][0]


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_npo_refuses_a_beta_that_means_nothing(case, beta):
    with pytest.raises(ValueError, match=f"must be positive and finite, not {beta}"):
        first_order.npo_loss(case[0], beta)


@pytest.mark.parametrize(("beta", "gamma"), [(0.03, 0.0), (0.7, 0.0), (2.5, 1.3)])
def test_simnpo_is_its_formula_and_weighs_each_sequence_as_it_should(case, beta, gamma):
    model, forget, retain = case
    found = first_order.simnpo_loss(beta, gamma)(model, forget, retain)
    p, tokens = log_likelihoods(model, forget), forget.shape[1] - 1
    # -(2/β) log sigmoid(-(β/T) log p - γ), written out: with the power of p it is a rational function.
    odds = p.exp() ** (beta / tokens) * math.exp(gamma)
    torch.testing.assert_close(found, -2 / beta * (1 / (1 + odds)).log().mean())
    weight = (2 * odds / (1 + odds)).detach() / tokens
    for ours, theirs in zip(gradient(model, found), gradient(model, (weight * p).mean()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_simnpo_with_small_beta_is_ascent(case):
    model, forget, retain = case
    simnpo = first_order.simnpo_loss(1e-9)(model, forget, retain)
    ascent = first_order.ascent_loss(model, forget, retain)
    for ours, theirs in zip(gradient(model, simnpo), gradient(model, ascent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("beta", "gamma", "named"), [(0.0, 0.0, "β"), (math.nan, 0.0, "β"), (1.0, -0.1, "γ")])
def test_simnpo_refuses_settings_that_mean_nothing(beta, gamma, named):
    with pytest.raises(ValueError, match=f"{named} of SimNPO must be"):
        first_order.simnpo_loss(beta, gamma)


def activations(model, sequences, layer):
    """What the block of index ``layer`` receives, caught by a hook; that is what ``layer`` blocks give."""
    caught = []
    block = model.model.decoder.layers[layer]
    hook = block.register_forward_pre_hook(
        lambda _, inputs, named: caught.append(inputs[0] if inputs else named["hidden_states"]), with_kwargs=True
    )
    model(input_ids=sequences[:, :-1])
    hook.remove()
    return caught[0]


def test_rmu_is_the_distance_to_one_point_for_all_tokens(case):
    model, forget, retain = case
    far = first_order.rmu_loss(layer=1, length=1e4, seed=3)(model, forget, retain)
    assert far.item() == pytest.approx(1e8, rel=1e-2)  # the point has the length that is asked for
    h = activations(model, forget, 1)
    # ‖h - cu‖² is quadratic in c: values at three lengths give ‖h‖² and the mean of h·u, for a u of length 1.
    at = {c: first_order.rmu_loss(1, c, 3)(model, forget, retain) for c in (1.0, 2.0, 3.0)}
    torch.testing.assert_close(3 * at[1.0] - 3 * at[2.0] + at[3.0], h.square().sum(2).mean())
    u = torch.rand(h.shape[2], generator=torch.Generator().manual_seed(3), dtype=h.dtype)
    torch.testing.assert_close(at[2.0], (h - 2 * u / u.norm()).norm(dim=2).square().mean())
    assert first_order.rmu_loss(1, 2.0, 4)(model, forget, retain) != at[2.0]


def test_rmu_reaches_the_layers_up_to_its_own_and_no_others(case):
    model, forget, retain = case
    first_order.rmu_loss(1, 2.0, 0)(model, forget, retain).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(".layers.0." in name for name in reached)
    assert not any(".layers.1." in name or "decoder.final" in name for name in reached)


def test_the_activations_of_retained_texts_are_kept_where_they_were(case):
    model, forget, retain = case
    original = tiny_model(seed=5)
    found = first_order.activation_loss(original, 1)(model, forget, retain)
    moved = activations(model, retain, 1) - activations(original, retain, 1)
    torch.testing.assert_close(found, moved.norm(dim=2).square().mean())
    at_start = first_order.activation_loss(copy.deepcopy(model), 1)(model, forget, retain)
    assert at_start.item() == 0
    at_start.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_rmu_refuses_a_length_or_a_layer_that_means_nothing(case):
    model, forget, retain = case
    with pytest.raises(ValueError, match="random vector must be positive and finite, not 0"):
        first_order.rmu_loss(1, 0.0, 0)
    with pytest.raises(ValueError, match="has 2 blocks, so that there is no layer 3: choose 0 to 2"):
        first_order.rmu_loss(3, 1.0, 0)(model, forget, retain)
