import math

import pytest
import torch
from helpers import ARCHITECTURES, tiny_model
from scipy import stats

from unlearnlib import weights
from unlearnlib.measures import movement
from unlearnlib.models import loading

PLACES = {
    "model.decoder.embed_tokens.weight": (None, "embedding"),
    "model.decoder.layers.11.self_attn.k_proj.weight": (11, "key"),
    "model.decoder.layers.0.self_attn.k_proj.bias": (0, "bias"),
    "model.decoder.layers.3.self_attn.out_proj.weight": (3, "attention out"),
    "model.decoder.layers.3.self_attn_layer_norm.bias": (3, "norm"),
    "model.decoder.layers.3.fc1.weight": (3, "MLP in"),
    "transformer.wpe.weight": (None, "embedding"),
    "transformer.h.2.attn.c_attn.weight": (2, "query, key, value"),
    "transformer.h.2.attn.c_proj.weight": (2, "attention out"),
    "transformer.h.2.mlp.c_proj.weight": (2, "MLP out"),
    "transformer.h.2.mlp.c_fc.weight": (2, "MLP in"),
    "transformer.ln_f.weight": (None, "norm"),
    "model.layers.4.self_attn.o_proj.weight": (4, "attention out"),
    "model.layers.4.mlp.gate_proj.weight": (4, "MLP in"),
    "model.layers.4.mlp.down_proj.weight": (4, "MLP out"),
    "model.norm.weight": (None, "norm"),
    "lm_head.weight": (None, "head"),
    "gpt_neox.embed_in.weight": (None, "embedding"),
    "embed_out.weight": (None, "head"),
    "gpt_neox.layers.1.attention.query_key_value.weight": (1, "query, key, value"),
    "gpt_neox.layers.1.attention.dense.weight": (1, "attention out"),
    "gpt_neox.layers.1.mlp.dense_h_to_4h.weight": (1, "MLP in"),
    "gpt_neox.layers.1.mlp.dense_4h_to_h.weight": (1, "MLP out"),
}


@pytest.mark.parametrize(("name", "expected"), PLACES.items())
def test_a_name_tells_layer_and_kind(name, expected):
    assert movement.place(name) == expected


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "neox"])
def test_every_parameter_has_a_place(architecture):
    if architecture == "neox":
        config = loading.small_gpt_neox(40, hidden_size=16, layers=2, heads=2, context=32)
        model = loading.load_model(config, device="cpu")
    else:
        model = tiny_model(architecture)
    places = [movement.place(name) for name, _ in model.named_parameters()]
    assert {layer for layer, _ in places} == {None, 0, 1}
    assert {"embedding", "attention out", "MLP in", "MLP out", "norm"} <= {kind for _, kind in places}


def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mixer\.conv'.*KINDS"):
        movement.place("model.layers.0.mixer.conv")


def test_relative_movement_by_hand():
    start = {"h.0.attn.c_attn.weight": torch.tensor([[3.0, 4.0]]), "h.0.ln_1.weight": torch.tensor([2.0])}
    start |= {"h.0.ln_2.weight": torch.tensor([0.0]), "h.1.mlp.c_fc.bias": torch.tensor([0.0])}
    delta = {name: torch.ones_like(x) for name, x in start.items()}
    found = movement.relative_movement(delta, start)
    assert found[0, "query, key, value"] == pytest.approx(math.sqrt(2) / 5)
    assert found[0, "norm"] == pytest.approx(math.sqrt(2) / 2)
    assert math.isnan(found[1, "bias"])


def test_kurtosis_is_scipys_and_least_for_signs():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3 + 1
    assert movement.excess_kurtosis(values) == pytest.approx(stats.kurtosis(values.numpy()))
    assert movement.excess_kurtosis(torch.tensor([1.0, -1.0, -1.0, 1.0])) == pytest.approx(-2)
    with pytest.raises(ValueError, match="alike"):
        movement.excess_kurtosis(torch.ones(4))


def test_parameters_made_alike_have_one_scale():
    delta = {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([[100.0]]), "c": torch.zeros(2)}
    found = movement.alike(delta)
    assert found["a"].square().mean().item() == pytest.approx(1)
    assert found["a"][1] / found["a"][0] == pytest.approx(-4 / 3)
    assert found["b"].item() == pytest.approx(1)
    assert found["c"].tolist() == [0, 0]


def test_the_largest_share_of_a_normal_sample_is_that_of_the_formula():
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = stats.norm.ppf(0.995)
    expected = 2 * (z * stats.norm.pdf(z) + 0.005)
    assert movement.largest_share(values) == pytest.approx(expected, rel=0.02)
    assert movement.largest_share(torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.25) == pytest.approx(0.25)
    assert movement.largest_share(torch.tensor([0.0, -5.0, 0.0, 0.0]), 0.25) == 1


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_lies_between_0_and_1(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        movement.largest_share(torch.ones(3), share)


def test_nothing_has_no_largest_part():
    with pytest.raises(ValueError, match="nothing has moved"):
        movement.largest_share(torch.zeros(3))


def test_the_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    left, right = movement.subspace_overlap(a, b, 3)
    for found, turn in ((left, lambda x: x), (right, lambda x: x.T)):
        (u, _, _), (w, _, _) = (torch.linalg.svd(turn(x)) for x in (a, b))
        cosines = torch.linalg.svdvals(u[:, :3].T @ w[:, :3])
        assert found == pytest.approx(cosines.square().mean().item())
    assert movement.subspace_overlap(a, -2 * a, 2) == pytest.approx((1, 1))
    full = movement.subspace_overlap(a, b, 6)
    assert full[1] == pytest.approx(1)  # six right singular vectors span all six columns
    assert full[0] < 1


def test_of_subspaces_drawn_at_random_the_overlap_is_k_over_n():
    generator = torch.Generator().manual_seed(0)
    pairs = [
        movement.subspace_overlap(*torch.randn(2, 20, 10, generator=generator, dtype=torch.float64), 2)
        for _ in range(400)
    ]
    left, right = torch.tensor(pairs).mean(dim=0).tolist()
    assert left == pytest.approx(2 / 20, rel=0.1)
    assert right == pytest.approx(2 / 10, rel=0.1)


@pytest.mark.parametrize("k", [0, 4])
def test_there_are_not_more_singular_vectors_than_the_smaller_side(k):
    with pytest.raises(ValueError, match=f"no {k} singular"):
        movement.subspace_overlap(torch.ones(3, 5), torch.ones(3, 5), k)


def test_the_way_left_is_that_to_the_mean_whatever_the_chance():
    generator = torch.Generator().manual_seed(0)
    d, draws = 40, 4000
    way, delta = (torch.randn(d, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.linspace(0.2, 2, d, dtype=torch.float64)  # the matrix of a metric, and the spread of the chance
    for matrix in (torch.ones_like(scale), scale):
        found = []
        for _ in range(draws):
            r, again = (
                {"w": way + scale * torch.randn(d, generator=generator, dtype=torch.float64)} for _ in range(2)
            )
            at, image, image_again = {"w": delta}, {"w": matrix * delta}, {"w": matrix * again["w"]}
            base = weights.dot(r, image_again).item()
            found.append([movement.way_left(at, r, image, image_again) * base if base > 0 else math.nan, base])
        above, below = torch.tensor(found).nanmean(dim=0).tolist()
        assert below == pytest.approx((way * matrix * way).sum().item(), rel=0.1)
        assert above == pytest.approx(((delta - way) * matrix * (delta - way)).sum().item(), rel=0.1)


def test_the_original_has_all_of_the_way_left_and_the_mean_none():
    r, again = {"w": torch.tensor([2.0, 1.0, 0.0])}, {"w": torch.tensor([2.0, 0.0, 1.0])}
    nothing, mean = {"w": torch.zeros(3)}, {"w": torch.tensor([2.0, 0.5, 0.5])}
    assert movement.way_left(nothing, r, nothing, again) == 1
    assert movement.way_left(mean, r, mean, again) == pytest.approx(
        -0.5 / 4
    )  # chance is taken off, and overshoots
    # a step of t times the length at a cosine c: 1 - 2ct + t²
    straight = {"w": torch.tensor([2.0, 0.0, 0.0])}
    step = {"w": torch.tensor([0.6, 0.8, 0.0])}
    assert movement.way_left(step, straight, step, straight) == pytest.approx(1 - 2 * 0.6 * 0.5 + 0.25)


def test_without_a_way_there_is_nothing_left_of_it():
    r = {"w": torch.tensor([1.0, 0.0])}
    again = {"w": torch.tensor([-1.0, 1.0])}
    with pytest.raises(ValueError, match="chance hides the way"):
        movement.way_left(r, r, r, again)
