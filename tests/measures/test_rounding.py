import pytest
import torch
from helpers import ARCHITECTURES, random_sequences, tiny_model

from unlearnlib.measures.evaluation import mean_kl
from unlearnlib.measures.rounding import round_to_nearest, rounded


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
