import pytest
import torch
from helpers import ARCHITECTURES, random_sequences, tiny_model

from unlearnlib.measures.evaluation import mean_kl
from unlearnlib.measures.rounding import matrices, round_to_nearest, rounded, survival


def test_by_hand():
    weights = torch.tensor([[7.0, 3.4, -1.6, 0.4], [0.0, 0.0, 0.0, 0.0], [-0.7, 0.06, 0.3, 0.04]])
    expected = torch.tensor([[7.0, 3.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.7, 0.1, 0.3, 0.0]])
    torch.testing.assert_close(round_to_nearest(weights, 4), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_values_none_far_from_its_weight(bits):
    weights = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(weights, bits)
    half = weights.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1) / 2
    assert ((found - weights).abs() <= half * 1.0001).all()
    assert all(len(row.unique()) <= 2**bits - 1 for row in found)


def test_a_row_needs_two_bits():
    with pytest.raises(ValueError, match="at least 2"):
        round_to_nearest(torch.ones(1, 2), 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_a_model_only_the_linear_layers_change(architecture):
    model = tiny_model(architecture)
    before = {name: p.clone() for name, p in model.named_parameters()}
    other = rounded(model, 4)
    changed = {name for name, p in other.named_parameters() if not torch.equal(p, before[name])}
    matrices = {name for name, p in before.items() if p.ndim == 2 and "emb" not in name and "lm_head" not in name}
    assert changed == matrices - {"transformer.wte.weight", "transformer.wpe.weight"}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if architecture == "gpt2":  # stored the other way round: a column is an output
        column = dict(other.named_parameters())["transformer.h.0.mlp.c_fc.weight"][:, 0]
        assert len(column.abs().unique()) <= 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_more_bits_come_closer(architecture):
    model, sequences = tiny_model(architecture), random_sequences(4)
    kl = [mean_kl(model, rounded(model, bits), sequences) for bits in (3, 5, 8, 16)]
    assert kl == sorted(kl, reverse=True)
    assert kl[-1] < 1e-6 < kl[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_matrices_are_views_that_write_through(architecture):
    model = tiny_model(architecture)
    found = matrices(model)
    live = dict(model.named_parameters())
    assert all(live[name].numel() == matrix.numel() for name, matrix in found.items())
    name, matrix = next((name, matrix) for name, matrix in found.items() if "fc" in name or "up_proj" in name)
    assert matrix.shape[0] > matrix.shape[1]  # more outputs than inputs, however it is stored
    matrix.zero_()
    assert not live[name].any()


def test_what_survives_by_hand():
    before, after = (tiny_model("opt") for _ in range(2))
    for model, row in ((before, [7.0, 1.2, 0.0, -2.4]), (after, [7.0, 1.6, 0.3, -2.4])):
        for matrix in matrices(model).values():
            matrix.zero_()
        matrices(model)["model.decoder.layers.0.self_attn.k_proj.weight"][0, :4] = torch.tensor(row)
    total = sum(matrix.numel() for matrix in matrices(before).values())
    found = survival(before, after, 4)  # the spacing is 1: one of the two that moved crosses to another value
    assert found.changed == pytest.approx(1 / total)
    assert found.expected == pytest.approx((0.4 + 0.3) / total)
    assert found.kept == pytest.approx(0.4 / (0.4**2 + 0.3**2))
    with pytest.raises(ValueError, match="has moved"):
        survival(before, before, 4)


def test_of_a_small_movement_all_is_kept_on_average():
    before, after = (tiny_model("opt", seed=seed) for seed in (0, 0))
    generator = torch.Generator().manual_seed(1)
    for matrix, moved in zip(matrices(before).values(), matrices(after).values(), strict=True):
        for one in (matrix, moved):
            one.copy_(
                torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype) if one is matrix else matrix
            )
            one[:, 0] = 5  # sets the spacing, and does not move
        moved[:, 1:] += 0.2 * torch.randn(moved[:, 1:].shape, generator=generator, dtype=matrix.dtype)
    fine, coarse = (survival(before, after, bits) for bits in (4, 2))
    assert fine.changed == pytest.approx(fine.expected, rel=0.1)  # uniform enough: the spacing is 0.7 σ
    assert fine.kept == pytest.approx(1, abs=0.1)
    assert coarse.kept < 0.4  # at 5 σ hardly a weight is near a boundary
